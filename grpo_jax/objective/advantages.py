"""Advantages of the completions of one prompt, relative to their group.

Rewards are [..., G]; each row along the last axis is one group. `valid` marks the
completions that have a reward: the others leave the group's statistics, get 0, and may
hold anything, NaN included. Everything is float32. All rewards of a group equal, one
valid completion, or none: every advantage of that group is exactly 0.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Real

from grpo_jax.objective import _checks


def group_softmax_weights(
    rewards: Real[Array, "*N G"],
    *,
    temperature: float = 1.0,
    valid: Bool[Array, "*N G"] | None = None,
) -> Float[Array, "*N G"]:
    """Softmax of each group's rewards: w_i = exp(r_i / tau) / sum_j exp(r_j / tau).

    `temperature` (tau) is in units of reward. Positive weights that sum to 1 over a
    group: the group's estimate of the policy that maximizes E[r] - tau * KL to the
    policy that sampled it (Rafailov et al. 2023, eq. 4,
    https://arxiv.org/abs/2305.18290; as weights of a likelihood: Peng et al. 2019,
    https://arxiv.org/abs/1910.00177). A group with nothing valid has weights 0.
    """
    valid = _check_group(rewards, valid)
    _check_temperature(temperature)
    mass = jnp.where(valid, jnp.exp(_below_top(rewards, valid) / temperature), 0.0)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    return mass / jnp.where(total > 0.0, total, 1.0)


def softmax_advantages(
    rewards: Real[Array, "*N G"],
    *,
    temperature: float = 1.0,
    valid: Bool[Array, "*N G"] | None = None,
) -> Float[Array, "*N G"]:
    """Softmax weights as advantages: A_i = n * w_i - 1, with n valid completions.

    Zero mean over a group, bounded by -1 and n - 1, and equal to (r_i - mean) / tau to
    first order for large tau. w is `group_softmax_weights`, with its sources.
    """
    valid = _check_group(rewards, valid)
    _check_temperature(temperature)
    # n * w - 1 = (e - mean(e)) / (1 + mean(e)) with e = exp(.) - 1: no 1 is subtracted
    # from a number near 1, so that a large temperature costs no precision.
    excess = jnp.where(valid, jnp.expm1(_below_top(rewards, valid) / temperature), 0.0)
    mean = jnp.sum(excess, axis=-1, keepdims=True) / _count(valid)
    return jnp.where(valid, (excess - mean) / (1.0 + mean), 0.0)


def standardized_advantages(
    rewards: Real[Array, "*N G"],
    *,
    eps: float = 1e-4,
    valid: Bool[Array, "*N G"] | None = None,
    std_over: Literal["group", "batch"] = "group",
) -> Float[Array, "*N G"]:
    """Standardized rewards: A_i = (r_i - mean) / (std + eps).

    The standard deviation is the unbiased one (n - 1); `eps` is in units of reward.
    DeepSeekMath, Shao et al. 2024, section 4.1.2, https://arxiv.org/abs/2402.03300.
    `std_over="batch"` takes the standard deviation of all valid rewards of the array,
    and the mean still of the group (Liu et al. 2025, "Tricks or Traps",
    https://arxiv.org/abs/2508.08221). Zero spread is decided by max == min, not by
    comparing a rounded standard deviation with 0.
    """
    valid = _check_group(rewards, valid)
    _checks.require_choice("std_over", std_over, ("group", "batch"))
    _checks.require_number("eps", eps, at_least=0, meaning="it is added to the std")
    axis = -1 if std_over == "group" else None
    below_top = _below_top(rewards, valid, axis=axis)
    flat = jnp.min(below_top, axis=axis, keepdims=True) == 0.0
    deviations = _minus_mean(below_top, valid, axis=axis)
    degrees = jnp.maximum(_count(valid, axis=axis) - 1, 1)
    variance = jnp.sum(jnp.square(deviations), axis=axis, keepdims=True) / degrees
    # The square root has an infinite slope at 0; the inner where keeps it out.
    std = jnp.sqrt(jnp.where(flat, 1.0, variance))
    centered = _minus_mean(_below_top(rewards, valid), valid)
    return jnp.where(flat, 0.0, centered / (std + eps))


def centered_advantages(
    rewards: Real[Array, "*N G"], *, valid: Bool[Array, "*N G"] | None = None
) -> Float[Array, "*N G"]:
    """Rewards less their group's mean: A_i = r_i - mean.

    Dr. GRPO, Liu et al. 2025, section 3.2, https://arxiv.org/abs/2503.20783.
    """
    valid = _check_group(rewards, valid)
    return _minus_mean(_below_top(rewards, valid), valid)


def leave_one_out_advantages(
    rewards: Real[Array, "*N G"], *, valid: Bool[Array, "*N G"] | None = None
) -> Float[Array, "*N G"]:
    """Rewards less the mean of the group's others: A_i = r_i - mean_{j != i} r_j.

    Equal to (r_i - mean) * n / (n - 1). RLOO: Kool et al. 2019,
    https://openreview.net/forum?id=r1lgTGL5DE; for language models, Ahmadian et al.
    2024, https://arxiv.org/abs/2402.14740. A lone valid completion has no others and
    gets 0.
    """
    valid = _check_group(rewards, valid)
    count = _count(valid)
    centered = _minus_mean(_below_top(rewards, valid), valid)
    return centered * count / jnp.maximum(count - 1, 1)


def overlong_penalty(
    lengths: Int[Array, "*B"], *, max_length: int, cache: int
) -> Float[Array, "*B"]:
    """Reward, from 0 down to -1, to add to a completion for its length in tokens.

    0 up to max_length - cache, then (max_length - cache - length) / cache, which is -1
    at max_length, and -1 beyond. "Soft overlong punishment": DAPO, Yu et al. 2025,
    eq. 13, https://arxiv.org/abs/2503.14476. Count tokens, not characters.
    """
    _checks.require_array("lengths", lengths)
    _checks.require_whole("max_length", max_length, meaning="tokens")
    _checks.require_whole("cache", cache, meaning="tokens")
    if cache > max_length:
        raise ValueError(
            f"cache is {cache} tokens, expected 0 < cache <= max_length ({max_length})."
        )
    excess = jnp.asarray(lengths, jnp.float32) - (max_length - cache)
    return -jnp.clip(excess / cache, 0.0, 1.0)


def _check_temperature(temperature: float) -> None:
    _checks.require_number("temperature", temperature, above=0, meaning="a reward")


def _check_group(
    rewards: Real[Array, "..."], valid: Bool[Array, "..."] | None
) -> Bool[Array, "..."]:
    _checks.require_rank("rewards", rewards, axes="G")
    if valid is None:
        return jnp.ones(rewards.shape, jnp.bool_)
    _checks.require_mask("valid", valid, rewards.shape, like="rewards'")
    return valid


def _count(valid: Bool[Array, "*N G"], *, axis: int | None = -1) -> Int[Array, "..."]:
    """Number of valid completions, at least 1, along an axis that is kept."""
    return jnp.maximum(jnp.sum(valid, axis=axis, keepdims=True), 1)


def _below_top(
    rewards: Real[Array, "*N G"], valid: Bool[Array, "*N G"], *, axis: int | None = -1
) -> Float[Array, "*N G"]:
    """Rewards less the largest valid one, at most 0; exactly 0 where invalid.

    No advantage depends on this shift, and after it equal rewards are exactly 0, so
    that no rounding of their mean can make an advantage of them.
    """
    rewards = jnp.where(valid, jnp.asarray(rewards, jnp.float32), -jnp.inf)
    top = lax.stop_gradient(jnp.max(rewards, axis=axis, keepdims=True))
    return jnp.where(valid, jnp.where(valid, rewards, 0.0) - top, 0.0)


def _minus_mean(
    values: Float[Array, "*N G"], valid: Bool[Array, "*N G"], *, axis: int | None = -1
) -> Float[Array, "*N G"]:
    """Values less their mean over the valid ones; 0 where invalid, before and after."""
    mean = jnp.sum(values, axis=axis, keepdims=True) / _count(valid, axis=axis)
    return jnp.where(valid, values - mean, 0.0)
