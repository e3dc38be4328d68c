"""The traps: padding, huge ratios, empty completions, bfloat16, refused arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import (
    centered_advantages,
    grpo_loss,
    weighted_likelihood_loss,
)

NAN = jnp.nan

EVERY_FORM = {
    "clip": {"dual_clip": 3.0},
    "sequence": {"ratio_level": "sequence"},
    "cispo": {"surrogate": "cispo", "cispo_max_weight": 5.0},
    "likelihood": {"surrogate": "likelihood"},
}
every_form = pytest.mark.parametrize("form", EVERY_FORM.values(), ids=EVERY_FORM.keys())


def full_loss(logp, arrays, **options):
    return grpo_loss(
        logp,
        arrays["mask"],
        arrays["rewards"],
        old_logp=arrays["old_logp"],
        ref_logp=arrays["ref_logp"],
        sampler_logp=arrays["sampler_logp"],
        entropy=arrays["entropy"],
        kl_coef=0.04,
        entropy_coef=0.01,
        sampler_correction_cap=2.0,
        **options,
    )


@every_form
@pytest.mark.parametrize("junk", [NAN, jnp.inf, -jnp.inf])
def test_padding_may_hold_anything(random_group, form, junk):
    arrays = random_group(5)
    per_token = ("logp", "old_logp", "ref_logp", "sampler_logp", "entropy")
    dirty = arrays | {
        name: jnp.where(arrays["mask"], arrays[name], junk) for name in per_token
    }
    dirty["rewards"] = jnp.where(arrays["mask"].any(-1), arrays["rewards"], junk)
    run = _value_and_grad(tuple(form.items()))
    for one, other in zip(
        jax.tree.leaves(run(arrays["logp"], arrays)),
        jax.tree.leaves(run(dirty["logp"], dirty)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
        assert jnp.isfinite(other).all()


@functools.cache
def _value_and_grad(form):
    """One compiled loss and gradient for each form."""
    return jax.jit(
        jax.value_and_grad(
            lambda x, arrays: (
                (out := full_loss(x, arrays, **dict(form))).loss.value(),
                out.metrics,
            ),
            has_aux=True,
        )
    )


@every_form
@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_log_ratios_of_a_hundred_leave_the_gradient_finite(random_group, form, shift):
    arrays = random_group(6)
    arrays |= {name: arrays[name] + shift for name in ("old_logp", "ref_logp")}
    (loss, _), grad = _value_and_grad(tuple(form.items()))(arrays["logp"], arrays)
    assert jnp.isfinite(loss)
    assert jnp.isfinite(grad).all()


@every_form
def test_bfloat16_inputs_are_computed_in_float32(random_group, form):
    arrays = random_group(7)
    low = {
        name: x if x.dtype == bool else x.astype(jnp.bfloat16)
        for name, x in arrays.items()
    }
    rounded = {
        name: x if x.dtype == bool else x.astype(jnp.float32) for name, x in low.items()
    }
    run = _value_and_grad(tuple(form.items()))
    (loss, metrics), _ = run(low["logp"], low)
    assert {x.dtype for x in jax.tree.leaves((loss, metrics))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, run(rounded["logp"], rounded)[0][0], rtol=1e-6)


def test_nothing_but_empty_completions_is_a_loss_of_zero_with_zero_gradient(
    random_group,
):
    arrays = random_group(8)
    arrays["mask"] = jnp.zeros_like(arrays["mask"])
    (loss, metrics), grad = _value_and_grad(())(arrays["logp"], arrays)
    assert loss == 0.0
    assert all(mean.value() == 0.0 for mean in metrics.values())
    np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_an_empty_completion_does_not_dilute_the_mean_of_the_others():
    logp, advantages = jnp.full((2, 3), -1.0), jnp.array([1.0, 1.0])
    ended_at_once = jnp.array([[True] * 3, [False] * 3])
    assert grpo_loss(logp, ended_at_once, advantages).loss.value() == -1.0


def test_k1_as_a_loss_is_refused(random_group, without_shape_checks):
    arrays = random_group()
    with pytest.raises(ValueError, match='kl_estimator is "k1".*zero mean'):
        full_loss(arrays["logp"], arrays, kl_estimator="k1")


def test_cispo_without_its_cap_is_refused(random_group):
    arrays = random_group()
    with pytest.raises(ValueError, match=r'"cispo" needs cispo_max_weight.*5\.0'):
        full_loss(arrays["logp"], arrays, surrogate="cispo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": 0.04}, "kl_coef is set, so ref_logp is needed; got None"),
        ({"entropy_coef": 0.01}, "entropy_coef is set, so entropy is needed"),
        (
            {"sampler_correction_cap": 2.0},
            "sampler_correction_cap is set, so sampler_l",
        ),
        ({"surrogate": "ppo"}, "surrogate is 'ppo', expected one of clip, cispo, like"),
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4', expected one of k2, k3"),
        ({"aggregation": "sum"}, "aggregation is 'sum', expected one of sequence_m"),
        ({"ratio_level": "word"}, "^ratio_level is 'word', expected one of token, "),
        ({"old_logp": jnp.zeros((2, 4))}, r"old_logp has shape \(2, 4\), expected"),
        ({"entropy": jnp.zeros((2, 4, 1))}, r"entropy has shape \(2, 4, 1\), expected"),
        (
            {"advantages": jnp.zeros(2)},
            r"advantages has shape \(2,\), expected \(2, 4\)",
        ),
        ({"mask": jnp.ones((2, 4, 5))}, "mask has dtype float32, expected bool"),
    ],
)
def test_wrong_arguments_are_named(
    random_group, without_shape_checks, options, message
):
    group = random_group()
    arguments = {
        "logp": group["logp"],
        "mask": group["mask"],
        "advantages": centered_advantages(group["rewards"]),
    } | options
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments)


def test_weights_of_another_shape_are_named(random_group, without_shape_checks):
    group = random_group()
    with pytest.raises(ValueError, match=r"weights has shape \(2, 3\), expected"):
        weighted_likelihood_loss(group["logp"], group["mask"], jnp.zeros((2, 3)))
