"""The same losses, gradients and metrics as TRL, from numbers that TRL computed.

`make_trl_reference.py` beside this file wrote them, and says how.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import grpo_loss

PATH = pathlib.Path(__file__).with_name("trl_reference.json")
REFERENCE = json.loads(PATH.read_text())


@pytest.fixture(params=REFERENCE["cases"])
def case(request):
    """One case's arguments and the loss, gradients and metrics that TRL gave."""
    return REFERENCE["cases"][request.param]


def test_loss_gradients_and_metrics_equal_those_of_trl(case):
    arrays = {name: jnp.array(x) for name, x in REFERENCE["inputs"].items()}
    logp, entropy = arrays.pop("logp"), arrays.pop("entropy")
    if case["on_policy"]:
        del arrays["old_logp"]

    def loss(logp, entropy):
        out = grpo_loss(logp, entropy=entropy, **arrays, **case["arguments"])
        return out.loss.value(), out.metrics

    (value, metrics), grads = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(logp, entropy)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    np.testing.assert_allclose(grads[0], case["logp_grad"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grads[1], case["entropy_grad"], rtol=1e-5, atol=1e-7)
    metrics = {name: mean.value() for name, mean in metrics.items()}
    for name in ("kl", "entropy"):
        if name in case["metrics"]:
            np.testing.assert_allclose(metrics[name], case["metrics"][name], rtol=1e-5)
    if case["arguments"].get("ratio_level") == "sequence":
        return  # TRL counts clipped sequences, we count their tokens.
    for name in ("low_mean", "high_mean", "region_mean"):
        name = f"clip_ratio/{name}"
        if name in case["metrics"]:
            np.testing.assert_allclose(metrics[name], case["metrics"][name], rtol=1e-5)
    if "cispo_clip_ratio" in case["metrics"]:
        np.testing.assert_allclose(
            metrics["clip_ratio/high_mean"],
            case["metrics"]["cispo_clip_ratio"],
            rtol=1e-5,
        )


def test_the_reference_puts_tokens_on_every_side_of_the_clip():
    inputs = {name: np.array(x) for name, x in REFERENCE["inputs"].items()}
    ratio = np.exp(inputs["logp"] - inputs["old_logp"])
    for sign in (-1, 1):
        rows = inputs["mask"] & (np.sign(inputs["advantages"]) == sign)[:, None]
        for inside in (ratio < 0.8, (ratio > 0.8) & (ratio < 1.2), ratio > 1.4):
            assert (inside & rows).any()
