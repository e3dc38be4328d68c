"""From rewards to advantages: penalties, masks and estimators, by hand."""

import jax.numpy as jnp
import numpy as np

from grpo_jax.config import ObjectiveConfig
from grpo_jax.training.advantages import _subtract_kl, advantages_and_mask

REWARDS = np.array([[0.0, 1, 2, 3], [1, 1, 1, 1], [0, 0, 0, 5], [-1, 1, 0, 0]])


def advantages(tools, rewards=REWARDS, lengths=None, finished=None, **objective):
    """Advantages and mask of completions of 4 tokens, or as long as `lengths` says."""
    prompts, group = np.shape(rewards)
    lengths = np.full((prompts, group), 4) if lengths is None else np.asarray(lengths)
    batch = tools.make_batch(prompts=prompts, group=group, length=7)
    return advantages_and_mask(
        jnp.asarray(rewards, jnp.float32),
        batch.replace(mask=jnp.asarray(np.arange(7) < lengths[..., None])),
        lengths=jnp.asarray(lengths),
        finished=jnp.asarray(
            np.ones(lengths.shape, bool) if finished is None else finished
        ),
        config=ObjectiveConfig(**objective),
        max_new_tokens=7,
    )


def test_a_completion_without_a_reward_leaves_its_group(tools):
    given, mask = advantages(tools, [[1.0, 3.0, np.nan, np.nan]], advantage="centered")
    # The mean of 1 and 3 is 2.
    np.testing.assert_allclose(given, [[-1, 1, 0, 0]])
    assert mask.all(axis=-1).sum() == 0 and mask.any(axis=-1).all()


def test_truncated_completions_do_not_count_where_they_are_masked(tools):
    finished = np.array([[True, False, True, False]])
    rewards = [[0.0, 1.0, 2.0, 3.0]]
    _, mask = advantages(tools, rewards, finished=finished, mask_truncated=True)
    np.testing.assert_array_equal(mask.any(axis=-1), finished)
    _, mask = advantages(tools, rewards, finished=finished)
    assert mask.any(axis=-1).all()


def test_long_completions_are_penalized_toward_the_limit(tools):
    # The limit is 7 and the tail 4 tokens: lengths 3, 5, 6, 7 lose 0, 1/2, 3/4, 1.
    given, _ = advantages(
        tools,
        [[1.0, 1.0, 1.0, 1.0]],
        lengths=[[3, 5, 6, 7]],
        overlong_share=4 / 7,
        advantage="centered",
    )
    # Rewards 1, 0.5, 0.25, 0 have the mean 0.4375.
    np.testing.assert_allclose(given, [[0.5625, 0.0625, -0.1875, -0.4375]], rtol=1e-6)


def test_a_deviation_over_the_batch_is_that_of_all_rewards(tools):
    given, _ = advantages(tools, advantage="standardized", std_over="batch")
    expected = (REWARDS - REWARDS.mean(axis=1, keepdims=True)) / (
        REWARDS.std(ddof=1) + 1e-4
    )
    np.testing.assert_allclose(given, expected, rtol=1e-5)


def test_the_kl_of_a_sequence_can_be_taken_from_its_reward():
    # Two sequences; log-ratios 0.5 and 0.25 count, the third is masked.
    rewards = jnp.array([[1.0, jnp.nan]])
    logp = jnp.array([[[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]]])
    ref_logp = jnp.array([[[-1.5, -2.25, -9.0], [-2.0, -2.0, -2.0]]])
    mask = jnp.array([[[True, True, False], [True, True, True]]])
    given = _subtract_kl(rewards, logp, ref_logp, mask, kl_coef=0.1)
    # 1 - 0.1 (0.5 + 0.25) = 0.925; no reward stays no reward.
    np.testing.assert_allclose(given, [[0.925, np.nan]], rtol=1e-6)


def test_the_kl_leaves_the_reward_before_groups_are_compared(tools):
    # Of the batch: sampler and reference differ by 0.1 nats per token.
    rewards = [[1.0, 1.0]]
    given, _ = advantages(
        tools,
        rewards,
        lengths=[[2, 4]],
        advantage="centered",
        kl_in="reward",
        kl_coef=0.5,
    )
    # log(pi/ref) is -0.1 per token: rewards 1 + 0.5 (0.2), 1 + 0.5 (0.4), mean 1.15.
    np.testing.assert_allclose(given, [[-0.05, 0.05]], atol=1e-6)
