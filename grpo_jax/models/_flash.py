"""cuDNN's flash attention for a shared prefix plus own tokens, on NVIDIA GPUs.

Scores of all queries and keys are never in memory, which on a GPU is what attention
otherwise spends its time on. It knows no prefix: the sequences of a prompt become heads
of one row, which have their own keys and values behind copies of the prompt's, and one
mask. Nothing is projected twice.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.models.cache import Prefix

# Wider heads, and older GPUs than Ampere, are not served on all versions.
_WIDEST_HEAD = 128
_FIRST_GENERATION = 8.0


class Keys(NamedTuple):
    """Keys and values that queries see where the mask is true.

    Those of a prefix, which a group shares, have a group axis of 1.
    """

    keys: Float[Array, "N K G|1 S h"]
    values: Float[Array, "N K G|1 S h"]
    mask: Bool[Array, "N|1 T|1 S"]


def all_keys(
    keys: Float[Array, "N K G S h"],
    values: Float[Array, "N K G S h"],
    prefix: Prefix | None,
    masks: Sequence[Bool[Array, "N|1 T|1 S"]],
) -> list[Keys]:
    """Returns a sequence's own keys and those of the prefix, each with its mask."""
    parts = [Keys(keys, values, masks[0])]
    if prefix is not None:
        shared = prefix.keys[:, :, None], prefix.values[:, :, None]
        parts.append(Keys(*shared, masks[1]))
    return parts


def has_flash(queries: Float[Array, "N G T H h"]) -> bool:
    """Whether attention of these queries can be cuDNN's on the default device."""
    if jax.default_backend() != "gpu" or queries.shape[-1] > _WIDEST_HEAD:
        return False
    device = jax.devices()[0]
    return (
        queries.dtype in (jnp.bfloat16, jnp.float16)
        and queries.shape[-1] % 8 == 0
        and device.device_kind.startswith("NVIDIA")
        and float(device.compute_capability) >= _FIRST_GENERATION
    )


def flash_attention(
    queries: Float[Array, "N G T H h"],
    parts: list[Keys],
    *,
    scale: float,
    causal: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "N G T H h"]:
    """Returns softmax(scale q k^T) v over the keys of all parts.

    With `causal`, query t sees the keys up to t of a single part and its mask is not
    read. `implementation` is that of `jax.nn.dot_product_attention`.
    """
    n, g, t, heads, width = queries.shape
    kv_heads = parts[0].keys.shape[1]
    # The group becomes part of the heads, because cuDNN knows batch and heads alone.
    # Key/value heads stay outermost: a mesh may split them.
    split = queries.reshape(n, g, t, kv_heads, heads // kv_heads, width)
    q = split.transpose(0, 2, 3, 1, 4, 5).reshape(n, t, g * heads, width)
    k = _as_heads([part.keys for part in parts], g)
    v = _as_heads([part.values for part in parts], g)
    # Its gradient needs even lengths.
    q, k, v = (_even(x, axis=1) for x in (q, k, v))
    mask = None
    if not causal:
        masks = [jnp.broadcast_to(p.mask, (n, t, p.mask.shape[2])) for p in parts]
        mask = jnp.concatenate(masks, axis=-1)[:, None]
        mask = _even(_even(mask, axis=2), axis=3)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=causal,
        implementation=implementation,
    )
    out = out[:, :t].reshape(n, t, kv_heads, g, heads // kv_heads, width)
    return out.transpose(0, 3, 1, 2, 4, 5).reshape(queries.shape)


def _as_heads(parts: list[Array], group: int) -> Float[Array, "N S KG h"]:
    """Returns the keys or values of all parts behind each other, as K G heads."""
    n, kv_heads, _, _, width = parts[0].shape
    whole = [
        jnp.broadcast_to(x, (n, kv_heads, group, x.shape[3], width)) for x in parts
    ]
    joined = jnp.concatenate(whole, axis=3).transpose(0, 3, 1, 2, 4)
    return joined.reshape(n, -1, kv_heads * group, width)


def _even(x: Array, *, axis: int) -> Array:
    """Returns x with one more entry of zeros, or False, along an odd axis."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, x.shape[axis] % 2)
    return jnp.pad(x, padding)
