"""From rewards to advantages: the one place where the order of the steps is decided.

rewards [N, G], NaN where a completion has none
  │  groups that are left out lose their rewards          (dynamic sampling)
  │  - β log(π / π_ref) of each sequence                  (`kl_in: reward`, RLOO)
  │  + a penalty near the length limit                    (`overlong_share`, DAPO)
  ▼
valid rewards ── the estimator of `objective.advantage` ──► advantages [N, G]

mask [N, G, T] ── truncated completions removed (`mask_truncated`) ──► mask
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import objective
from grpo_jax.config import ObjectiveConfig
from grpo_jax.training.state import Batch


def advantages_and_mask(
    rewards: Float[Array, "N G"],
    batch: Batch,
    *,
    lengths: Int[Array, "N G"],
    finished: Bool[Array, "N G"],
    config: ObjectiveConfig,
    max_new_tokens: int,
) -> tuple[Float[Array, "N G"], Bool[Array, "N G T"]]:
    """Advantages of the rewards, and the mask of the tokens that the loss uses.

    Args:
      rewards: NaN for a completion without a reward, and in a group that is left out.
        Such a completion gets advantage 0 and stays in the mask, as in TRL.
      batch: the mask, and the log-probs for a KL in the reward.
      lengths: tokens of each completion, its stop token included.
      finished: False for completions that were cut at `max_new_tokens`.
    """
    if config.kl_in == "reward" and batch.ref_logp is not None:
        rewards = _subtract_kl(
            rewards,
            batch.sampler_logp,
            batch.ref_logp,
            batch.mask,
            kl_coef=config.kl_coef,
        )
    valid = ~jnp.isnan(rewards)
    rewards = jnp.where(valid, rewards, 0.0)
    if config.overlong_share is not None:
        tail = max(1, round(config.overlong_share * max_new_tokens))
        rewards += objective.overlong_penalty(
            lengths, max_length=max_new_tokens, cache=tail
        )
    mask = batch.mask
    if config.mask_truncated:
        mask = mask & finished[..., None]
    return advantages_from_rewards(rewards, valid, config), mask


def _subtract_kl(
    rewards: Float[Array, "N G"],
    logp: Float[Array, "N G T"],
    ref_logp: Float[Array, "N G T"],
    mask: Bool[Array, "N G T"],
    *,
    kl_coef: float,
) -> Float[Array, "N G"]:
    """Rewards minus β log(π(y|x) / π_ref(y|x)), a one-sample KL of each sequence.

    Ahmadian et al. 2024, eq. 2, https://arxiv.org/abs/2402.14740. `logp` is that of the
    policy that sampled, in nats. Masked tokens do not count.
    """
    ratios = jnp.where(mask, logp - ref_logp, 0.0)
    return rewards - kl_coef * jnp.sum(ratios, axis=-1)


def advantages_from_rewards(
    rewards: Float[Array, "N G"], valid: Bool[Array, "N G"], config: ObjectiveConfig
) -> Float[Array, "N G"]:
    """The advantages that `config` names; 0 where a completion has no reward.

    With the plain likelihood the softmax weights w themselves are taken, times G: the
    mean over the G completions of -(G w) log π is -Σ w log π.
    """
    match config.advantage:
        case "softmax":
            options = {"temperature": config.softmax_temperature, "valid": valid}
            if config.surrogate == "likelihood":
                weights = objective.group_softmax_weights(rewards, **options)
                return rewards.shape[-1] * weights
            return objective.softmax_advantages(rewards, **options)
        case "standardized":
            return objective.standardized_advantages(
                rewards, valid=valid, std_over=config.std_over
            )
        case "centered":
            return objective.centered_advantages(rewards, valid=valid)
        case "leave_one_out":
            return objective.leave_one_out_advantages(rewards, valid=valid)
