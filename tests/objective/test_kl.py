"""KL estimators: values, expectations over a whole distribution, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import kl_estimate, token_logprobs

LOGITS = jnp.array([0.3, -1.0, 0.8, 0.1])
REF_LOGITS = jnp.array([-0.5, 0.4, 0.2, 0.9])
VOCABULARY = jnp.arange(4)


def logprobs_of_every_token(logits):
    return token_logprobs(jnp.tile(logits, (4, 1)), VOCABULARY)


def expectation(logits, kind):
    """Mean of the estimate over tokens drawn from a policy that is held fixed."""
    logp = logprobs_of_every_token(logits)
    estimate = kl_estimate(logp, logprobs_of_every_token(REF_LOGITS), kind=kind)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * estimate)


def kl_divergence(logits, other):
    logp, other = logprobs_of_every_token(logits), logprobs_of_every_token(other)
    return jnp.sum(jnp.exp(logp) * (logp - other))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("k1", 0.6931472),  # log(0.5) - log(0.25)
        ("k2", 0.2402265),  # 0.6931472^2 / 2
        ("k3", 0.1931472),  # 0.25 / 0.5 + 0.6931472 - 1
    ],
)
def test_estimates_by_hand(kind, value):
    logp, ref_logp = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
    np.testing.assert_allclose(
        kl_estimate(logp, ref_logp, kind=kind), [value], rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind):
    np.testing.assert_allclose(
        expectation(LOGITS, kind), kl_divergence(LOGITS, REF_LOGITS), rtol=1e-6
    )


def test_k1_as_a_loss_has_a_gradient_of_zero_mean():
    grad = jax.grad(expectation)(LOGITS, "k1")
    np.testing.assert_allclose(grad, jnp.zeros(4), atol=1e-7)


def test_k2_has_the_gradient_of_the_reverse_and_k3_of_the_forward_divergence():
    np.testing.assert_allclose(
        jax.grad(expectation)(LOGITS, "k2"),
        jax.grad(kl_divergence)(LOGITS, REF_LOGITS),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        jax.grad(expectation)(LOGITS, "k3"),
        jax.grad(kl_divergence, argnums=1)(REF_LOGITS, LOGITS),
        rtol=1e-5,
    )


def test_k3_keeps_its_precision_near_zero():
    # q = 2^-13 exactly: q^2 / 2 * (1 + q / 3); exp(q) - q - 1 in float32 is 0 or 6e-8.
    q = 2.0**-13
    estimate, slope = jax.value_and_grad(lambda x: kl_estimate(x, jnp.zeros(1)).sum())(
        jnp.array([-q])
    )
    np.testing.assert_allclose(estimate, q**2 / 2 * (1 + q / 3), rtol=1e-6)
    np.testing.assert_allclose(slope, -np.expm1(q), rtol=1e-6)


def test_a_log_ratio_of_a_hundred_stays_finite():
    logp, ref_logp = jnp.array([-100.0, 0.0]), jnp.array([0.0, -100.0])
    # q = 100 is held at 20: exp(20) - 21. q = -100 is exact: exp(-100) + 100 - 1.
    np.testing.assert_allclose(
        kl_estimate(logp, ref_logp), [np.exp(20.0) - 21.0, 99.0], rtol=1e-6
    )
    grad = jax.grad(lambda x: kl_estimate(x, ref_logp).sum())(logp)
    np.testing.assert_allclose(grad, [0.0, 1.0])


def test_bfloat16_inputs_are_computed_in_float32():
    logp, ref_logp = jnp.array([-1.3]), jnp.array([-2.7])
    low = kl_estimate(logp.astype(jnp.bfloat16), ref_logp.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, kl_estimate(logp, ref_logp), rtol=0.02)


@pytest.mark.parametrize(
    ("ref_shape", "kind", "message"),
    [
        ((1, 3), "k3", r"ref_logp has shape \(1, 3\), expected \(2, 3\): logp's"),
        ((2, 3), "k4", "kind is 'k4', expected one of k1, k2, k3"),
    ],
)
def test_wrong_arguments_are_named(without_shape_checks, ref_shape, kind, message):
    with pytest.raises(ValueError, match=message):
        kl_estimate(jnp.zeros((2, 3)), jnp.zeros(ref_shape), kind=kind)
