"""Attention of many own tokens of a slot at once, and what they leave in its ring.

A slot stands afterwards as if its tokens had been fed one by one.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models._attention import softmax_part
from grpo_jax.models.cache import Slots
from grpo_jax.models.config import ModelConfig

Pair = tuple[Float[Array, "B K h c"], Float[Array, "B K c h"]]


def extend_attention(
    layer: tuple[Array, Array, Array, Array],
    queries: Float[Array, "A Q H h"],
    keys: Float[Array, "A Q K h"],
    values: Float[Array, "A Q K h"],
    *,
    slots: Slots,
    counts: Int[Array, "A S"],
    window: Int[Array, ""] | int | None,
    config: ModelConfig,
) -> tuple[Float[Array, "A Q H h"], Pair]:
    """Returns attention of Q = S x t new tokens, and the ring with the real ones.

    Each sees its prompt, the ring and the new tokens of its slot up to itself.

    Args:
      layer: keys and values of the prompts of all slots, and those of their rings.
      counts: how many of the t tokens of each slot are real.
    """
    of_slots = lambda x: x.reshape(counts.size, -1, *x.shape[2:])  # noqa: E731
    b, t, heads, width = of_slots(queries).shape
    prompts, ring = layer[:2], layer[2:]
    new = of_slots(keys).transpose(0, 2, 3, 1), of_slots(values).transpose(0, 2, 1, 3)
    # Joining copies the keys of the prompt, which t x H / K queries of a slot read.
    every = [prompts, ring, new]
    all_keys = jnp.concatenate([one[0] for one in every], axis=-1)
    all_values = jnp.concatenate([one[1] for one in every], axis=-2)
    mask = _seen(slots, t, prompts[0].shape[-1], ring[0].shape[-1], window=window)
    kv_heads, each = keys.shape[2], heads // keys.shape[2]
    folded = queries.reshape(b, t, kv_heads, each, width).transpose(0, 2, 1, 3, 4)
    part = softmax_part(
        folded.reshape(b, kv_heads, t * each, width),
        all_keys,
        all_values,
        jnp.repeat(mask, each, axis=1)[:, None],
        scale=config.attention_scale,
        softcap=config.attention_softcap,
    )
    out = (part[..., 2:] / part[..., 1:2]).astype(queries.dtype)
    out = out.reshape(b, kv_heads, t, each, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(queries.shape), _append(ring, new, counts, slots.column)


def _append(
    ring: Pair, new: Pair, counts: Int[Array, "A S"], column: Int[Array, ""] | int
) -> Pair:
    """Returns the ring with the first `counts` new tokens as each slot's newest.

    All slots write `column` next, and the newest token is in the one before it. So what
    a slot has already moves back by as many columns as it has new tokens.
    """

    def put(ring: Array, new: Array, axis: int) -> Array:
        columns = ring.shape[axis]
        # In the order of age, the oldest first.
        ordered = jnp.concatenate([jnp.roll(ring, -column, axis), new], axis=axis)
        cut = jax.vmap(
            lambda x, start: lax.dynamic_slice_in_dim(x, start, columns, axis=axis)
        )
        return jnp.roll(cut(ordered, counts.reshape(-1)), column, axis)

    return put(ring[0], new[0], -1), put(ring[1], new[1], -2)


def _seen(
    slots: Slots,
    new: int,
    prompt: int,
    columns: int,
    *,
    window: Int[Array, ""] | int | None,
) -> Bool[Array, "B t c"]:
    """Returns what each new token sees of its prompt, of its ring, and of the new."""
    lengths, index = slots.prompt_lengths.reshape(-1, 1), slots.index.reshape(-1, 1)
    # The column that is written next has the oldest token; the newest has age 1.
    age = (slots.column - 1 - jnp.arange(columns)) % columns + 1
    of_ring = index - age[None, :]
    at = jnp.broadcast_to(jnp.arange(prompt)[None, :], (len(lengths), prompt))
    own = lengths + index + jnp.arange(new)[None, :]
    # The position of each key's token; -1 where there is none.
    positions = jnp.concatenate(
        [
            jnp.where(at < lengths, at, -1),
            jnp.where(of_ring >= 0, lengths + of_ring, -1),
            own,
        ],
        axis=1,
    )[:, None, :]
    mask = (positions >= 0) & (positions <= own[..., None])
    return mask if window is None else mask & (positions > own[..., None] - window)
