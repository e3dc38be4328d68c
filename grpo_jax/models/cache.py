"""Keys and values that outlive a call: of prompts, and of tokens generated so far."""

from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int


@struct.dataclass
class Prefix:
    """Keys and values of right-padded prompts, and how many tokens of each are real.

    Of a whole model the arrays are [L, N, P, K, h]; of one layer, [N, P, K, h].
    """

    keys: Float[Array, "*L N P K h"]
    values: Float[Array, "*L N P K h"]
    lengths: Int[Array, " N"]


@struct.dataclass
class Cache:
    """Keys and values of own tokens, all layers; entries not yet written are 0.

    Heads come before the group, so that attention reads a layer without rearranging it.
    """

    keys: Float[Array, "L N K G T h"]
    values: Float[Array, "L N K G T h"]


def write(
    cache: Cache,
    keys: Float[Array, "N K G 1 h"],
    values: Float[Array, "N K G 1 h"],
    *,
    layer: Int[Array, ""],
    step: Int[Array, ""] | int,
) -> Cache:
    """Returns the cache with one token's keys and values put at a layer and step.

    Within a loop that carries the cache, XLA makes this a write in place.
    """
    start = (layer, 0, 0, 0, step, 0)
    return Cache(
        keys=lax.dynamic_update_slice(cache.keys, keys[None], start),
        values=lax.dynamic_update_slice(cache.values, values[None], start),
    )


def of_layer(
    cache: Cache, layer: Int[Array, ""]
) -> tuple[Float[Array, "N K G T h"], Float[Array, "N K G T h"]]:
    """Returns the keys and the values of one layer."""
    return (
        lax.dynamic_index_in_dim(cache.keys, layer, axis=0, keepdims=False),
        lax.dynamic_index_in_dim(cache.values, layer, axis=0, keepdims=False),
    )
