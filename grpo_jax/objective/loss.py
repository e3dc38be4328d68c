"""Losses over groups of completions: the simple weighted likelihood, the full form.

Both take log-probabilities in nats and return a `Mean`, a loss to minimize kept as
total and weight. Masked entries of any per-token argument may hold anything, NaN too.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from grpo_jax.objective import _checks
from grpo_jax.objective.aggregate import AGGREGATIONS, Aggregation, aggregate
from grpo_jax.objective.kl import KlEstimator, kl_estimate
from grpo_jax.objective.logprobs import sequence_logprobs
from grpo_jax.objective.structs import LossOutput, Mean
from grpo_jax.objective.surrogate import (
    RATIO_LEVELS,
    RatioLevel,
    cispo_surrogate,
    clipped_surrogate,
    importance_correction,
    importance_ratio,
    log_importance_ratio,
)

Surrogate = Literal["clip", "cispo", "likelihood"]
SURROGATES = ("clip", "cispo", "likelihood")
# Optional array -> the argument that makes it necessary.
NEEDED_BY = {
    "ref_logp": "kl_coef",
    "entropy": "entropy_coef",
    "sampler_logp": "sampler_correction_cap",
}


def weighted_likelihood_loss(
    logp: Float[Array, "*N G T"],
    mask: Bool[Array, "*N G T"],
    weights: Float[Array, "*N G"],
    *,
    reduce: Literal["sum", "mean"] = "sum",
) -> Mean:
    """Weighted negative log-likelihood: -sum_i w_i log pi(y_i | x), mean over prompts.

    With w = `group_softmax_weights` this fits the policy to the group's estimate of the
    KL-regularized optimum (Peng et al. 2019, https://arxiv.org/abs/1910.00177). With
    any advantages as weights its gradient is that of the clipped form at ratio 1.
    `reduce="mean"` divides each log pi by the completion's number of tokens. The weight
    of the mean is N, the number of prompts; a completion of no tokens adds 0.
    """
    _checks.require_rank("logp", logp, axes="G T")
    _checks.require_shape(
        "weights", weights, logp.shape[:-1], like="logp's without its last axis"
    )
    likelihood = sequence_logprobs(logp, mask, reduce=reduce)
    # A completion without tokens has nothing to weight: its weight may hold anything.
    weights = jnp.where(jnp.any(mask, axis=-1), jnp.asarray(weights, jnp.float32), 0.0)
    prompts = likelihood.size // likelihood.shape[-1]
    return Mean(-jnp.sum(weights * likelihood), jnp.asarray(prompts, jnp.float32))


def grpo_loss(
    logp: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    advantages: Float[Array, "*B"],
    *,
    old_logp: Float[Array, "*B T"] | None = None,
    ref_logp: Float[Array, "*B T"] | None = None,
    sampler_logp: Float[Array, "*B T"] | None = None,
    entropy: Float[Array, "*B T"] | None = None,
    surrogate: Surrogate = "clip",
    ratio_level: RatioLevel = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    cispo_max_weight: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    entropy_coef: float = 0.0,
    sampler_correction_cap: float | None = None,
    aggregation: Aggregation = "sequence_mean",
    max_length: int | None = None,
) -> LossOutput:
    """Group policy loss: surrogate + kl_coef * KL(pi || ref) - entropy_coef * entropy.

    The sum is taken at each token and aggregated as `aggregation` says. GRPO: Shao et
    al. 2024, eqs. 3 and 4, https://arxiv.org/abs/2402.03300. kl_coef is beta there.

    Args:
        old_logp: of the policy that the ratio is taken against; None means on-policy,
            ratio = exp(logp - stop_gradient(logp)), which is 1 with a live gradient.
        ref_logp: needed for kl_coef != 0; with kl_coef = 0 only its metric is made.
        sampler_logp: read with sampler_correction_cap, which scales the surrogate
            (not the KL) by `importance_correction`.
        surrogate: "clip" is `clipped_surrogate`; "cispo" is `cispo_surrogate`, capped
            at cispo_max_weight; "likelihood" is -A * logp, with no ratio: with weights
            as advantages and "sequence_sum" its total is `weighted_likelihood_loss`'s,
            its weight the number of completions in place of the number of prompts.

    Returns:
        The loss, and metrics without gradient. These are policy_loss (the surrogate,
        aggregated as the loss is), and means over tokens of kl, entropy (each when
        given), importance_ratio/mean and clip_ratio/{low,high,region}_mean.
    """
    others = {
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "sampler_logp": sampler_logp,
        "entropy": entropy,
    }
    _check_arrays(logp, mask, advantages, others)
    _check_choices(surrogate, ratio_level, kl_estimator, aggregation)
    _checks.check_clips(clip_low, clip_high, dual_clip)
    _check_caps(surrogate, cispo_max_weight, sampler_correction_cap)
    _checks.require_number("kl_coef", kl_coef, meaning="it multiplies the KL")
    _checks.require_number("entropy_coef", entropy_coef, meaning="of the entropy")
    _check_needed(
        others,
        ref_logp=kl_coef != 0,
        entropy=entropy_coef != 0,
        sampler_logp=sampler_correction_cap is not None,
    )
    logp = _unmasked(logp, mask)
    advantages = jnp.asarray(advantages, jnp.float32)
    old_logp = lax.stop_gradient(
        logp if old_logp is None else _unmasked(old_logp, mask)
    )
    log_ratio = log_importance_ratio(logp, old_logp, mask, level=ratio_level)
    lower, upper = 0.0, jnp.inf
    if surrogate == "clip":
        lower, upper = 1.0 - clip_low, 1.0 + clip_high
        policy = clipped_surrogate(
            log_ratio,
            advantages,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
        )
    elif surrogate == "cispo" and cispo_max_weight is not None:
        upper = cispo_max_weight
        policy = cispo_surrogate(logp, log_ratio, advantages, max_weight=upper)
    else:
        policy = -advantages[..., None] * logp
    if sampler_correction_cap is not None and sampler_logp is not None:
        policy *= importance_correction(
            old_logp, _unmasked(sampler_logp, mask), cap=sampler_correction_cap
        )
    values = policy
    means = _ratio_means(log_ratio, advantages, lower, upper)
    if ref_logp is not None:
        ref_logp = lax.stop_gradient(_unmasked(ref_logp, mask))
        means["kl"] = kl_estimate(logp, ref_logp, kind=kl_estimator)
        values += kl_coef * means["kl"]
    if entropy is not None:
        means["entropy"] = _unmasked(entropy, mask)
        values -= entropy_coef * means["entropy"]
    loss, policy_loss = (
        aggregate(x, mask, mode=aggregation, max_length=max_length)
        for x in (values, lax.stop_gradient(policy))
    )
    return LossOutput(loss, {"policy_loss": policy_loss, **_token_means(means, mask)})


def _unmasked(
    array: Float[Array, "..."], mask: Bool[Array, "..."]
) -> Float[Array, "..."]:
    # Whatever padding holds must not reach the formulas: NaN * 0 in a gradient is NaN.
    return jnp.where(mask, jnp.asarray(array, jnp.float32), 0.0)


def _ratio_means(
    log_ratio: Float[Array, "*B T"],
    advantages: Float[Array, "*B"],
    lower: float,
    upper: float,
) -> dict[str, Float[Array, "*B T"]]:
    """The ratio, and where it is past a bound on the side that the advantage favors."""
    ratio = importance_ratio(log_ratio)
    advantages = advantages[..., None]
    low = (ratio < lower) & (advantages < 0.0)
    high = (ratio > upper) & (advantages > 0.0)
    return {
        "importance_ratio/mean": ratio,
        "clip_ratio/low_mean": low.astype(jnp.float32),
        "clip_ratio/high_mean": high.astype(jnp.float32),
        "clip_ratio/region_mean": (low | high).astype(jnp.float32),
    }


def _token_means(
    per_token: dict[str, Float[Array, "*B T"]], mask: Bool[Array, "*B T"]
) -> dict[str, Mean]:
    return {
        name: aggregate(lax.stop_gradient(values), mask, mode="token_mean")
        for name, values in per_token.items()
    }


def _check_arrays(
    logp: Float[Array, "..."],
    mask: Bool[Array, "..."],
    advantages: Float[Array, "..."],
    others: dict[str, Float[Array, "..."] | None],
) -> None:
    _checks.require_rank("logp", logp, axes="T")
    _checks.require_mask("mask", mask, logp.shape, like="logp's")
    _checks.require_shape(
        "advantages",
        advantages,
        logp.shape[:-1],
        like="logp's without its last axis, one number per sequence",
    )
    for name, array in others.items():
        if array is not None:
            _checks.require_shape(name, array, logp.shape, like="logp's")


def _check_choices(
    surrogate: str, ratio_level: str, kl_estimator: str, aggregation: str
) -> None:
    _checks.require_choice("surrogate", surrogate, SURROGATES)
    _checks.require_choice("ratio_level", ratio_level, RATIO_LEVELS)
    _checks.require_choice("aggregation", aggregation, AGGREGATIONS)
    if kl_estimator == "k1":
        raise ValueError(
            'kl_estimator is "k1", expected k2 or k3: as a loss on tokens drawn from '
            "the policy, k1 has a gradient of zero mean and regularizes nothing."
        )
    _checks.require_choice("kl_estimator", kl_estimator, ("k2", "k3"))


def _check_caps(
    surrogate: str,
    cispo_max_weight: float | None,
    sampler_correction_cap: float | None,
) -> None:
    if surrogate == "cispo" and cispo_max_weight is None:
        raise ValueError(
            'surrogate "cispo" needs cispo_max_weight, the largest ratio itself, such '
            "as 5.0; got None. It is not a distance from 1: 0.2 would scale every "
            "on-policy token down to 0.2."
        )
    if cispo_max_weight is not None:
        _checks.check_cap("cispo_max_weight", cispo_max_weight)
    if sampler_correction_cap is not None:
        _checks.check_cap("sampler_correction_cap", sampler_correction_cap)


def _check_needed(
    others: dict[str, Float[Array, "..."] | None], **needed: bool
) -> None:
    for name, is_needed in needed.items():
        if is_needed and others[name] is None:
            raise ValueError(
                f"{NEEDED_BY[name]} is set, so {name} is needed; got None."
            )
