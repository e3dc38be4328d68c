"""Importance ratios and the per-token surrogates built on them, as losses to minimize.

Log-ratios are natural logarithms, float32; advantages are one number per sequence.
Before an exponential a log-ratio is bounded to +-20 (a ratio of 2e-9 to 4.9e8): exact
inside, constant with zero gradient outside, where float32 would overflow and 0 * inf
in a gradient would be NaN.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from grpo_jax.objective import _checks

RatioLevel = Literal["token", "sequence"]
RATIO_LEVELS = ("token", "sequence")

MAX_LOG_RATIO = 20.0


def importance_ratio(log_ratio: Float[Array, "*B T"]) -> Float[Array, "*B T"]:
    """Ratio exp(log_ratio), with the log-ratio bounded to +-20."""
    _checks.require_array("log_ratio", log_ratio)
    log_ratio = jnp.asarray(log_ratio, jnp.float32)
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def log_importance_ratio(
    logp: Float[Array, "*B T"],
    old_logp: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    level: RatioLevel = "token",
) -> Float[Array, "*B T"]:
    """Log of the importance ratio policy / old policy, at each token; 0 where masked.

    "token": logp - old_logp.
    "sequence": the mean over the sequence's tokens of logp - old_logp, the same value
    at each of them, with gradient through logp - stop_gradient(logp) of each token
    (GSPO-token: Zheng et al. 2025, eqs. 7 and 14, https://arxiv.org/abs/2507.18071).

    No gradient flows to `old_logp`. Masked entries may hold anything.
    """
    _checks.require_rank("logp", logp, axes="T")
    _checks.require_shape("old_logp", old_logp, logp.shape, like="logp's")
    _checks.require_mask("mask", mask, logp.shape, like="logp's")
    _checks.require_choice("level", level, RATIO_LEVELS)
    logp = jnp.where(mask, jnp.asarray(logp, jnp.float32), 0.0)
    old_logp = jnp.where(mask, jnp.asarray(old_logp, jnp.float32), 0.0)
    log_ratio = logp - lax.stop_gradient(old_logp)
    if level == "token":
        return log_ratio
    length = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    mean = lax.stop_gradient(jnp.sum(log_ratio, axis=-1, keepdims=True) / length)
    return jnp.where(mask, mean + (logp - lax.stop_gradient(logp)), 0.0)


def clipped_surrogate(
    log_ratio: Float[Array, "*B T"],
    advantages: Float[Array, "*B"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Array, "*B T"]:
    """Clipped policy loss: -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A).

    PPO, Schulman et al. 2017, eq. 7, https://arxiv.org/abs/1707.06347; separate bounds:
    DAPO, Yu et al. 2025, eq. 10, https://arxiv.org/abs/2503.14476. The minimum holds
    for both signs of A: a ratio is held back only on the side that A favors.
    `dual_clip` (c > 1) bounds the loss by -c * A where A < 0, against large ratios:
    Ye et al. 2020, https://arxiv.org/abs/1912.09729.
    """
    _check_advantages("log_ratio", log_ratio, advantages)
    _checks.check_clips(clip_low, clip_high, dual_clip)
    advantages = jnp.asarray(advantages, jnp.float32)[..., None]
    ratio = importance_ratio(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return loss
    bound = -dual_clip * advantages
    return jnp.where(advantages < 0.0, jnp.minimum(loss, bound), loss)


def cispo_surrogate(
    logp: Float[Array, "*B T"],
    log_ratio: Float[Array, "*B T"],
    advantages: Float[Array, "*B"],
    *,
    max_weight: float,
) -> Float[Array, "*B T"]:
    """Weighted policy-gradient loss: -stop_gradient(min(r, max_weight)) * A * logp.

    CISPO: MiniMax-M1, Chen et al. 2025, eqs. 4 and 5, https://arxiv.org/abs/2506.13585,
    with no lower bound, as there. The weight is bounded, yet no token loses its
    gradient. `max_weight` is the largest ratio itself, such as 5.0, not a distance
    from 1.
    """
    _check_advantages("logp", logp, advantages)
    _checks.require_shape("log_ratio", log_ratio, logp.shape, like="logp's")
    _checks.check_cap("max_weight", max_weight)
    advantages = jnp.asarray(advantages, jnp.float32)[..., None]
    weight = lax.stop_gradient(jnp.minimum(importance_ratio(log_ratio), max_weight))
    return -weight * advantages * jnp.asarray(logp, jnp.float32)


def importance_correction(
    old_logp: Float[Array, "*B T"],
    sampler_logp: Float[Array, "*B T"],
    *,
    cap: float = 2.0,
) -> Float[Array, "*B T"]:
    """Truncated importance weight: min(exp(old_logp - sampler_logp), cap).

    Corrects for a sampler whose probabilities differ from the learner's. It carries no
    gradient. Truncated importance sampling: Ionides 2008,
    https://doi.org/10.1198/106186008X320456; for language models, Yao et al. 2025,
    https://fengyao.notion.site/off-policy-rl.
    """
    _checks.require_rank("old_logp", old_logp, axes="T")
    _checks.require_shape(
        "sampler_logp", sampler_logp, old_logp.shape, like="old_logp's"
    )
    _checks.check_cap("cap", cap)
    log_ratio = jnp.asarray(old_logp, jnp.float32) - sampler_logp
    return lax.stop_gradient(jnp.minimum(importance_ratio(log_ratio), cap))


def _check_advantages(
    name: str, array: Float[Array, "..."], advantages: Float[Array, "..."]
) -> None:
    _checks.require_rank(name, array, axes="T")
    _checks.require_shape(
        "advantages",
        advantages,
        array.shape[:-1],
        like=f"{name}' without its last axis, one number per sequence",
    )
