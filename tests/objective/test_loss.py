"""The two losses: values by hand, and how they agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import (
    group_softmax_weights,
    grpo_loss,
    softmax_advantages,
    weighted_likelihood_loss,
)

NAN = jnp.nan


def total_gradient(loss, logp):
    return jax.jit(jax.grad(lambda x: loss(x).total))(logp)


# The simple form.


def test_weighted_likelihood_by_hand():
    logp = jnp.array([[[-1.0, -2.0], [-3.0, NAN]], [[-0.5, -0.5], [NAN, NAN]]])
    mask = jnp.array([[[True, True], [True, False]], [[True, True], [False, False]]])
    weights = jnp.array([[0.25, 0.75], [1.0, NAN]])
    # Prompt 1: 0.25 * 3 + 0.75 * 3 = 3; prompt 2: 1 * 1 and nothing.
    loss = weighted_likelihood_loss(logp, mask, weights)
    assert (loss.total, loss.weight, loss.value()) == (4.0, 2.0, 2.0)
    # By length: 0.25 * 1.5 + 0.75 * 3 = 2.625; 1 * 0.5.
    loss = weighted_likelihood_loss(logp, mask, weights, reduce="mean")
    assert (loss.total, loss.weight) == (3.125, 2.0)
    grad = jax.grad(lambda x: weighted_likelihood_loss(x, mask, weights).value())(logp)
    expected = [[[-0.125, -0.125], [-0.375, 0.0]], [[-0.5, -0.5], [0.0, 0.0]]]
    np.testing.assert_array_equal(grad, expected)


def test_a_single_group_needs_no_prompt_axis():
    loss = weighted_likelihood_loss(
        jnp.array([[-1.0], [-3.0]]), jnp.ones((2, 1), bool), jnp.array([0.5, 0.5])
    )
    assert (loss.total, loss.weight) == (2.0, 1.0)


def test_at_ratio_one_the_clipped_form_has_the_gradient_of_the_simple_form(
    random_group,
):
    group = random_group()
    logp, mask = group["logp"], group["mask"]
    weights = group_softmax_weights(group["rewards"])
    simple = total_gradient(lambda x: weighted_likelihood_loss(x, mask, weights), logp)
    for old_logp in (None, logp):
        clipped = total_gradient(
            lambda x, old=old_logp: (
                grpo_loss(
                    x, mask, weights, old_logp=old, aggregation="sequence_sum"
                ).loss
            ),
            logp,
        )
        np.testing.assert_allclose(clipped, simple, rtol=1e-6)


def test_at_ratio_one_they_agree_with_length_normalization_too(random_group):
    group = random_group(1)
    logp, mask, weights = group["logp"], group["mask"], group["rewards"]
    simple = total_gradient(
        lambda x: weighted_likelihood_loss(x, mask, weights, reduce="mean"), logp
    )
    clipped = total_gradient(lambda x: grpo_loss(x, mask, weights).loss, logp)
    np.testing.assert_allclose(clipped, simple, rtol=1e-6)


def test_softmax_advantages_are_softmax_weights_less_a_baseline(random_group):
    # sum_i (G * w_i - 1) * log pi_i = G * sum_i w_i * log pi_i - sum_i log pi_i
    group = random_group(2)
    logp, mask, rewards = group["logp"], group["mask"], group["rewards"]

    def gradient(weights):
        return total_gradient(
            lambda x: weighted_likelihood_loss(x, mask, weights), logp
        )

    np.testing.assert_allclose(
        gradient(softmax_advantages(rewards)),
        4 * gradient(group_softmax_weights(rewards)) - gradient(jnp.ones((2, 4))),
        atol=1e-5,
    )


def test_the_likelihood_surrogate_is_the_simple_form_with_weight_completions(
    random_group,
):
    group = random_group(3)
    logp, weights = group["logp"], group["rewards"]
    mask = jnp.ones_like(group["mask"])
    simple = weighted_likelihood_loss(logp, mask, weights)
    full = grpo_loss(
        logp, mask, weights, surrogate="likelihood", aggregation="sequence_sum"
    ).loss
    np.testing.assert_allclose(full.total, simple.total, rtol=1e-6)
    assert (simple.weight, full.weight) == (2.0, 8.0)  # N, and N * G


# The full form.


def test_grpo_loss_and_metrics_by_hand():
    # One sequence of four tokens with A = 1, one of one token with A = -1. Losses:
    #   0.5 -> -0.5   1.0 -> -1.0   1.5 -> -1.2 (high)   1.1 -> -1.1;   0.5 -> 0.8 (low)
    ratio = jnp.array([[0.5, 1.0, 1.5, 1.1], [0.5, 7.0, 7.0, 7.0]])
    mask = jnp.array([[True] * 4, [True, False, False, False]])
    old_logp = jnp.full((2, 4), -2.0)
    logp = old_logp + jnp.log(ratio)
    ref_logp = logp - jnp.log(2.0)  # k3 = 0.5 + 0.6931472 - 1 = 0.1931472 everywhere
    out = jax.jit(functools.partial(grpo_loss, kl_coef=0.04, entropy_coef=0.01))(
        logp,
        mask,
        jnp.array([1.0, -1.0]),
        old_logp=old_logp,
        ref_logp=ref_logp,
        entropy=jnp.full((2, 4), 1.5),
    )
    # Sequence means -3.8 / 4 = -0.95 and 0.8; their mean -0.075.
    # The loss is -0.075 + 0.04 * 0.1931472 - 0.01 * 1.5, or -0.0822741.
    np.testing.assert_allclose(out.loss.value(), -0.0822741, rtol=1e-5)
    values = {name: mean.value() for name, mean in out.metrics.items()}
    expected = {
        "policy_loss": -0.075,
        "kl": 0.1931472,
        "entropy": 1.5,
        "importance_ratio/mean": 0.92,  # (0.5 + 1 + 1.5 + 1.1 + 0.5) / 5
        "clip_ratio/low_mean": 0.2,
        "clip_ratio/high_mean": 0.2,
        "clip_ratio/region_mean": 0.4,
    }
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)


def test_on_policy_the_loss_is_minus_the_mean_advantage_and_learns_all_the_same():
    logp, mask = jnp.full((2, 3), -1.0), jnp.ones((2, 3), bool)
    advantages = jnp.array([1.0, -1.0])
    value, grad = jax.jit(
        jax.value_and_grad(lambda x: grpo_loss(x, mask, advantages).loss.value())
    )(logp)
    np.testing.assert_allclose(value, 0.0, atol=1e-7)
    np.testing.assert_allclose(grad, [[-1 / 6] * 3, [1 / 6] * 3], rtol=1e-6)


def test_a_group_of_equal_rewards_is_not_updated(random_group):
    group = random_group(4)
    advantages = softmax_advantages(jnp.full((2, 4), 0.1))
    grad = total_gradient(
        lambda x: grpo_loss(x, group["mask"], advantages).loss, group["logp"]
    )
    np.testing.assert_array_equal(grad, jnp.zeros((2, 4, 5)))


def test_without_reference_or_entropy_there_are_no_such_metrics(random_group):
    group = random_group()
    arguments = (group["logp"], group["mask"], group["rewards"])
    assert not {"kl", "entropy"} & grpo_loss(*arguments).metrics.keys()
    # With a reference and no coefficient the KL is reported and not in the loss.
    out = grpo_loss(*arguments, ref_logp=group["ref_logp"])
    assert out.metrics["kl"].value() > 0.0
    assert out.loss.value() == out.metrics["policy_loss"].value()


def test_the_sampler_correction_scales_the_surrogate_and_not_the_kl():
    mask, advantages = jnp.ones((1, 1), bool), jnp.array([2.0])
    out = grpo_loss(
        jnp.array([[-1.0]]),
        mask,
        advantages,
        ref_logp=jnp.array([[-1.0]]) - jnp.log(2.0),
        sampler_logp=jnp.array([[-1.0]]) - jnp.log(1.5),
        sampler_correction_cap=2.0,
        kl_coef=1.0,
    )
    # -1.5 * 2 + 0.1931472
    np.testing.assert_allclose(out.loss.value(), -2.8068528, rtol=1e-6)


@pytest.mark.parametrize(
    ("surrogate", "low", "high"),
    [("clip", 1, 1), ("cispo", 0, 1), ("likelihood", 0, 0)],
)
def test_clip_metrics_of_each_surrogate(surrogate, low, high):
    logp = jnp.log(jnp.array([[0.5], [6.0]]))
    out = grpo_loss(
        logp,
        jnp.ones((2, 1), bool),
        jnp.array([-1.0, 1.0]),
        old_logp=jnp.zeros((2, 1)),
        surrogate=surrogate,
        cispo_max_weight=5.0,
    )
    assert out.metrics["clip_ratio/low_mean"].total == low
    assert out.metrics["clip_ratio/high_mean"].total == high
    assert out.metrics["clip_ratio/region_mean"].total == low + high
