"""What an update reads and writes: the state and the batch."""

from collections.abc import Mapping

import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from grpo_jax.models.packing import Packing
from grpo_jax.training._like_lengths import LikeLengths


class TrainState(struct.PyTreeNode):
    """Parameters with their optimizer state.

    Attributes:
      step: optimizer updates made; a skipped update does not count.
      params: what is trained: the model's parameters, or its adapters.
      opt_state: the Optax state for `params`.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: optax.OptState


def state_items(state: TrainState) -> dict[str, PyTree]:
    """What a checkpoint holds of a state, by the name of its folder."""
    return {
        "params": state.params,
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }


def state_of(items: Mapping[str, PyTree]) -> TrainState:
    """The state that `state_items` took apart."""
    return TrainState(params=items["params"], **items["optimizer"])


def policy_variables(params: PyTree, base: PyTree | None) -> dict[str, PyTree]:
    """Linen variables: parameters alone, or a frozen base with adapters on it."""
    if base is None:
        return {"params": params}
    return {"params": base, "lora": params}


def make_train_state(params: PyTree, tx: optax.GradientTransformation) -> TrainState:
    """A state at step 0; optimizer moments have the shardings of their parameters."""
    # Not jitted: under jit the moments would lose the sharding of their parameters.
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params)
    )


class Batch(struct.PyTreeNode):
    """What one update learns from.

    Attributes:
      prompts: ``[N, P]`` right-padded token ids.
      prompt_lengths: ``[N]``.
      completions: ``[N, G, T]`` token ids.
      mask: ``[N, G, T]`` True for the tokens that count.
      advantages: ``[N, G]``.
      sampler_logp: ``[N, G, T]`` what the sampler returned, nats.
      fresh: ``[N, G, T]`` tokens that this version of the policy drew, from keys and
        values of its own; None if all.
      old_logp: log-probs before the first update of this rollout; None when this is
        that update, whose ratio is 1.
      ref_logp: log-probs under the frozen reference; None without a KL penalty.
      packing: shared rows for completions, made by `pack` for the same microbatches;
        None for a row each.
      like_lengths: an order for microbatches of like length, instead of `packing`.
    """

    prompts: Int[Array, "N P"]
    prompt_lengths: Int[Array, " N"]
    completions: Int[Array, "N G T"]
    mask: Bool[Array, "N G T"]
    advantages: Float[Array, "N G"]
    sampler_logp: Float[Array, "N G T"]
    fresh: Bool[Array, "N G T"] | None = None
    old_logp: Float[Array, "N G T"] | None = None
    ref_logp: Float[Array, "N G T"] | None = None
    packing: Packing | None = None
    like_lengths: LikeLengths | None = None
