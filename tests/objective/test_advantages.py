"""Advantages of a group: by hand, exact zeros, completions without reward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import (
    centered_advantages,
    group_softmax_weights,
    leave_one_out_advantages,
    overlong_penalty,
    softmax_advantages,
    standardized_advantages,
)

ONE_SUCCESS = jnp.array([[1.0, 0.0, 0.0, 0.0]])
ESTIMATORS = {
    "softmax": softmax_advantages,
    "standardized": standardized_advantages,
    "batch": functools.partial(standardized_advantages, std_over="batch"),
    "centered": centered_advantages,
    "leave_one_out": leave_one_out_advantages,
}
every_estimator = pytest.mark.parametrize(
    "estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys()
)


def test_softmax_weights_by_hand():
    # e / (e + 3) = 2.7182818 / 5.7182818, and 1 / 5.7182818
    np.testing.assert_allclose(
        group_softmax_weights(ONE_SUCCESS), [[0.4753669] + [0.1748777] * 3], rtol=1e-6
    )
    # At tau = 1/2: e^2 = 7.3890561; 7.3890561 / 10.3890561, and 1 / 10.3890561
    np.testing.assert_allclose(
        group_softmax_weights(ONE_SUCCESS, temperature=0.5),
        [[0.7112346] + [0.0962551] * 3],
        rtol=1e-6,
    )


def test_softmax_advantages_by_hand():
    # 4 * 0.4753669 - 1, and 4 * 0.1748777 - 1
    np.testing.assert_allclose(
        softmax_advantages(ONE_SUCCESS), [[0.9014675] + [-0.3004892] * 3], rtol=1e-6
    )


def test_softmax_advantages_tend_to_centered_rewards_over_tau():
    rewards = jnp.array([[1.0, 2.0, 6.0]])  # mean 3
    advantages = softmax_advantages(rewards, temperature=1e6)
    np.testing.assert_allclose(advantages * 1e6, [[-2.0, -1.0, 3.0]], rtol=1e-5)


def test_softmax_weights_of_far_apart_rewards_do_not_overflow():
    rewards = jnp.array([[-1e30, 1e30, 1e30]])
    weights = group_softmax_weights(rewards, temperature=1e-3)
    np.testing.assert_array_equal(weights, [[0.0, 0.5, 0.5]])
    advantages = softmax_advantages(rewards, temperature=1e-3)
    np.testing.assert_allclose(advantages, [[-1.0, 0.5, 0.5]], rtol=1e-6)


def test_softmax_weights_maximize_reward_less_tau_times_kl():
    # Over distributions p on the group, sum(p * r) - tau * KL(p || uniform).
    generator = np.random.default_rng(0)
    rewards, tau = generator.normal(size=6), 0.7

    def regularized(p):
        return p @ rewards - tau * np.sum(p * np.log(6.0 * p), axis=-1)

    best = np.asarray(
        group_softmax_weights(jnp.array(rewards), temperature=tau), np.float64
    )
    others = generator.dirichlet(np.ones(6), size=1000)
    near = 0.99 * best + 0.01 * others
    assert regularized(best) > regularized(others).max()
    assert regularized(best) > regularized(near).max()


def test_standardized_advantages_use_the_unbiased_std():
    # mean 1/4; variance (9/16 + 3 * 1/16) / (4 - 1) = 1/4, std 1/2: 0.75 / 0.5 = 1.5.
    # The biased std, 0.4330127, would give 1.7320508.
    np.testing.assert_allclose(
        standardized_advantages(ONE_SUCCESS, eps=0.0), [[1.5] + [-0.5] * 3], rtol=1e-6
    )
    # With eps = 1e-4: 0.75 / 0.5001 = 1.4997001 and -0.25 / 0.5001 = -0.4999000
    np.testing.assert_allclose(
        standardized_advantages(ONE_SUCCESS),
        [[1.4997001] + [-0.4999000] * 3],
        rtol=1e-6,
    )


def test_standardized_over_the_batch_by_hand():
    # Group means 1 and 1. All four: mean 1, variance (1 + 1) / 3, std 0.8164966.
    advantages = standardized_advantages(
        jnp.array([[0.0, 2.0], [1.0, 1.0]]), eps=0.0, std_over="batch"
    )
    np.testing.assert_allclose(
        advantages, [[-1.2247449, 1.2247449], [0.0, 0.0]], rtol=1e-6
    )


def test_centered_and_leave_one_out_by_hand():
    rewards = jnp.array([[1.0, 2.0, 6.0]])
    np.testing.assert_allclose(centered_advantages(rewards), [[-2.0, -1.0, 3.0]])
    # Less the mean of the others: (2 + 6) / 2, (1 + 6) / 2 and (1 + 2) / 2.
    np.testing.assert_allclose(leave_one_out_advantages(rewards), [[-3.0, -1.5, 4.5]])


@every_estimator
def test_equal_rewards_give_advantage_exactly_zero(estimator):
    # A sum of seven 0.1 over 7 is not 0.1 in float32: the spread is max - min, not std.
    @jax.jit
    def advantages_and_grad(rewards):
        advantages, pull = jax.vjp(estimator, rewards)
        return advantages, pull(jnp.arange(14.0).reshape(2, 7))[0]

    for reward in (0.1, 1.0 / 3.0, -7.7, 1e6 + 0.1, 3e38):
        advantages, grad = advantages_and_grad(jnp.full((2, 7), reward))
        np.testing.assert_array_equal(advantages, np.zeros((2, 7)))
        assert np.isfinite(grad).all()


@every_estimator
def test_completions_without_reward_leave_the_statistics(estimator):
    whole = jnp.array([[1.0, 2.0, 6.0], [3.0, -1.0, 0.5]])
    with_holes = jnp.array([[1.0, jnp.nan, 2.0, 6.0], [3.0, -1.0, jnp.inf, 0.5]])
    valid = jnp.isfinite(with_holes)
    expected = np.zeros((2, 4))
    expected[np.asarray(valid)] = np.asarray(estimator(whole)).ravel()
    np.testing.assert_allclose(estimator(with_holes, valid=valid), expected, rtol=1e-6)


@every_estimator
@pytest.mark.parametrize("kept", [[], [1]])
def test_a_group_with_one_valid_reward_or_none_has_advantage_zero(estimator, kept):
    valid = jnp.zeros((1, 3), bool).at[0, jnp.array(kept, int)].set(True)
    rewards = jnp.where(valid, 5.0, jnp.nan)
    np.testing.assert_array_equal(estimator(rewards, valid=valid), jnp.zeros((1, 3)))


def test_softmax_weights_of_invalid_completions_are_zero():
    valid = jnp.array([[True, False, True], [False, False, False]])
    rewards = jnp.array([[0.0, jnp.nan, jnp.log(3.0)], [jnp.nan] * 3])
    np.testing.assert_allclose(
        group_softmax_weights(rewards, valid=valid),
        [[0.25, 0.0, 0.75], [0.0, 0.0, 0.0]],
        rtol=1e-6,
    )


@every_estimator
def test_a_missing_reward_that_is_not_marked_is_not_hidden(estimator):
    assert jnp.isnan(estimator(jnp.array([[1.0, jnp.nan, 2.0]]))).any()


@every_estimator
def test_integer_rewards_and_bare_groups_are_accepted(estimator):
    np.testing.assert_array_equal(
        estimator(jnp.array([1, 0, 0])), estimator(jnp.array([[1.0, 0.0, 0.0]]))[0]
    )


def test_overlong_penalty_by_hand():
    # max 100, cache 20: free up to 80; 90 is (80 - 90) / 20; -1 from 100 on.
    penalty = overlong_penalty(
        jnp.array([0, 80, 85, 90, 100, 150]), max_length=100, cache=20
    )
    np.testing.assert_allclose(penalty, [0.0, 0.0, -0.25, -0.5, -1.0, -1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: softmax_advantages(ONE_SUCCESS, temperature=0.0),
            "temperature is 0.0, expected a finite number above 0",
        ),
        (
            lambda: standardized_advantages(ONE_SUCCESS, eps=-1.0),
            "eps is -1.0, expected a finite number of at least 0",
        ),
        (
            lambda: standardized_advantages(ONE_SUCCESS, std_over="row"),
            "std_over is 'row', expected one of group, batch",
        ),
        (
            lambda: centered_advantages(ONE_SUCCESS, valid=jnp.ones((1, 3), bool)),
            r"valid has shape \(1, 3\), expected \(1, 4\): rewards'",
        ),
        (
            lambda: centered_advantages(ONE_SUCCESS, valid=jnp.ones((1, 4))),
            "valid has dtype float32, expected bool",
        ),
        (
            lambda: overlong_penalty(jnp.array([1]), max_length=10, cache=11),
            "cache is 11 tokens, expected 0 < cache <= max_length",
        ),
    ],
)
def test_wrong_arguments_are_named(without_shape_checks, call, message):
    with pytest.raises(ValueError, match=message):
        call()
