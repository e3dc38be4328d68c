"""Ratios and surrogates: every sign and side of the clip, by hand, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import (
    cispo_surrogate,
    clipped_surrogate,
    importance_correction,
    log_importance_ratio,
)


def loss_and_slope(ratio, advantage, **options):
    """The clipped loss of one token, and its derivative by the ratio."""

    def loss(r):
        return clipped_surrogate(
            jnp.log(r)[None, None], jnp.array([advantage]), **options
        ).sum()

    return jax.value_and_grad(loss)(jnp.float32(ratio))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        # clip to [0.8, 1.2]; loss -min(r * A, clip(r) * A); slope -A, or 0 if clipped
        (2.0, 0.5, -1.0, -2.0),  # -min(1.0, 1.6): free to come back up
        (2.0, 1.0, -2.0, -2.0),
        (2.0, 1.5, -2.4, 0.0),  # -min(3.0, 2.4): held
        (-2.0, 0.5, 1.6, 0.0),  # -min(-1.0, -1.6): held
        (-2.0, 1.0, 2.0, 2.0),
        (-2.0, 1.5, 3.0, 2.0),  # -min(-3.0, -2.4): free to come back down
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_clip_for_every_sign_and_side(advantage, ratio, loss, slope):
    got = loss_and_slope(ratio, advantage)
    np.testing.assert_allclose(got, (loss, slope), rtol=1e-6, atol=1e-7)


def test_the_two_clip_bounds_are_separate():
    bounds = {"clip_low": 0.1, "clip_high": 0.5}
    np.testing.assert_allclose(
        loss_and_slope(1.4, 1.0, **bounds), (-1.4, -1.0), rtol=1e-6
    )
    np.testing.assert_allclose(
        loss_and_slope(1.6, 1.0, **bounds), (-1.5, 0.0), rtol=1e-6
    )
    np.testing.assert_allclose(
        loss_and_slope(0.85, -1.0, **bounds), (0.9, 0.0), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (-2.0, 2.0, 4.0, 2.0),  # below the bound of 3: as without it
        (-2.0, 4.0, 6.0, 0.0),  # min(8.0, 3 * 2.0)
        (-2.0, 0.5, 1.6, 0.0),
        (2.0, 4.0, -2.4, 0.0),  # positive advantages have the usual clip alone
    ],
)
def test_dual_clip_bounds_the_loss_of_negative_advantages(
    advantage, ratio, loss, slope
):
    got = loss_and_slope(ratio, advantage, dual_clip=3.0)
    np.testing.assert_allclose(got, (loss, slope), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [100.0, -100.0])
def test_a_log_ratio_of_a_hundred_gives_no_nan(advantage, log_ratio):
    def clipped(x):
        return clipped_surrogate(x, jnp.array([advantage])).sum()

    def cispo(x):
        return cispo_surrogate(x, x, jnp.array([advantage]), max_weight=5.0).sum()

    for function in (clipped, cispo):
        value, grad = jax.value_and_grad(function)(jnp.array([[log_ratio]]))
        assert jnp.isfinite(value)
        assert jnp.isfinite(grad).all()


def test_on_policy_the_gradient_is_minus_the_advantage():
    def loss(logp):
        mask = jnp.ones((2, 2), bool)
        log_ratio = log_importance_ratio(logp, jax.lax.stop_gradient(logp), mask)
        return clipped_surrogate(log_ratio, jnp.array([3.0, -0.5])).sum()

    value, grad = jax.value_and_grad(loss)(jnp.array([[-1.0, -2.0], [-0.3, -4.0]]))
    np.testing.assert_allclose(value, -3.0 * 2 + 0.5 * 2)
    np.testing.assert_allclose(grad, [[-3.0, -3.0], [0.5, 0.5]], rtol=1e-6)


def test_cispo_weights_carry_no_gradient_and_no_token_loses_its_own():
    # r = 0.5, 1, 3; capped at 2: weights 0.5, 1, 2. Loss -w * A * logp, slope -w * A.
    log_ratio = jnp.log(jnp.array([[0.5, 1.0, 3.0]]))
    old_logp = jnp.array([[-1.0, -2.0, -3.0]])

    def loss(logp):
        ratio = log_importance_ratio(logp, old_logp, jnp.ones((1, 3), bool))
        return cispo_surrogate(logp, ratio, jnp.array([1.5]), max_weight=2.0)

    logp = old_logp + log_ratio
    np.testing.assert_allclose(
        loss(logp), -jnp.array([[0.5, 1.0, 2.0]]) * 1.5 * logp, rtol=1e-6
    )
    grad = jax.grad(lambda x: loss(x).sum())(logp)
    np.testing.assert_allclose(grad, [[-0.75, -1.5, -3.0]], rtol=1e-6)


def test_the_cispo_cap_is_a_ratio_and_not_a_distance_from_one():
    # On-policy every weight is 1: a cap of 5 leaves it, and a cap of 0.2 is 0.2.
    def slope(max_weight):
        return jax.grad(
            lambda x: cispo_surrogate(
                x, jnp.zeros((1, 1)), jnp.ones(1), max_weight=max_weight
            ).sum()
        )(jnp.array([[-1.0]]))

    np.testing.assert_allclose(slope(5.0), [[-1.0]])
    np.testing.assert_allclose(slope(0.2), [[-0.2]])


def test_importance_correction_by_hand_and_without_gradient():
    # exp(log(0.6) - log(0.4)) = 1.5; exp(log(0.9) - log(0.1)) = 9, capped at 2.
    old_logp = jnp.log(jnp.array([[0.6, 0.9]]))
    sampler_logp = jnp.log(jnp.array([[0.4, 0.1]]))
    np.testing.assert_allclose(
        importance_correction(old_logp, sampler_logp), [[1.5, 2.0]], rtol=1e-6
    )
    grads = jax.grad(lambda *x: importance_correction(*x).sum(), argnums=(0, 1))(
        old_logp, sampler_logp
    )
    np.testing.assert_array_equal(grads, jnp.zeros((2, 1, 2)))


def test_a_sequence_ratio_is_the_mean_over_its_tokens_with_a_gradient_at_each():
    logp = jnp.array([[-1.0, -2.0, jnp.nan], [-1.0, jnp.inf, jnp.nan]])
    old_logp = jnp.array([[-1.1, -2.3, 0.0], [-0.5, 0.0, jnp.nan]])
    mask = jnp.array([[True, True, False], [True, False, False]])

    def log_ratio(x):
        return log_importance_ratio(x, old_logp, mask, level="sequence")

    # (0.1 + 0.3) / 2 = 0.2, and -0.5 / 1.
    np.testing.assert_allclose(
        log_ratio(logp), [[0.2, 0.2, 0.0], [-0.5, 0.0, 0.0]], rtol=1e-5
    )
    cotangent = jnp.arange(6.0).reshape(2, 3)
    grad = jax.grad(lambda x: jnp.sum(cotangent * log_ratio(x)))(logp)
    np.testing.assert_array_equal(grad, jnp.where(mask, cotangent, 0.0))


def test_no_gradient_reaches_the_old_policy():
    logp, mask = jnp.array([[-1.0, -2.0]]), jnp.ones((1, 2), bool)
    for level in ("token", "sequence"):
        grad = jax.grad(
            lambda x, level=level: log_importance_ratio(
                logp, x, mask, level=level
            ).sum()
        )(logp)
        np.testing.assert_array_equal(grad, jnp.zeros((1, 2)))


ZEROS = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: clipped_surrogate(ZEROS, ZEROS),
            r"advantages has shape \(2, 3\), expected \(2,\): log_ratio' without",
        ),
        (
            lambda: clipped_surrogate(ZEROS, jnp.zeros(2), clip_low=-0.2),
            "clip_low is -0.2, expected a finite number of at least 0",
        ),
        (
            lambda: clipped_surrogate(ZEROS, jnp.zeros(2), dual_clip=1.0),
            "dual_clip is 1.0, expected a finite number above 1",
        ),
        (
            lambda: cispo_surrogate(ZEROS, ZEROS, jnp.zeros(2), max_weight=0.0),
            "max_weight is 0.0, expected a finite number above 0",
        ),
        (
            lambda: cispo_surrogate(ZEROS, ZEROS[:1], jnp.zeros(2), max_weight=1.0),
            r"log_ratio has shape \(1, 3\), expected \(2, 3\)",
        ),
        (
            lambda: importance_correction(ZEROS, ZEROS, cap=-1.0),
            "cap is -1.0, expected a finite number above 0",
        ),
        (
            lambda: log_importance_ratio(ZEROS, ZEROS, jnp.ones((2, 3), int)),
            "mask has dtype int32, expected bool",
        ),
        (
            lambda: log_importance_ratio(
                ZEROS, ZEROS, jnp.ones((2, 3), bool), level="word"
            ),
            "level is 'word', expected one of token, sequence",
        ),
    ],
)
def test_wrong_arguments_are_named(without_shape_checks, call, message):
    with pytest.raises(ValueError, match=message):
        call()
