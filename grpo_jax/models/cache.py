"""Keys and values that outlive a call: of prompts, and of tokens generated so far.

All layers share one array with a leading axis of layers, or a tuple has one array per
layer. A loop over tokens reads and writes separate arrays in place. From a stack it
would copy a layer at every token.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, PyTree


@struct.dataclass
class Prefix:
    """Keys and values of right-padded prompts, and how many tokens of each are real.

    Of a whole model the arrays are [L, N, K, P, h], or L of [N, K, P, h]; of one layer,
    [N, K, P, h]. Heads come before positions, as attention reads them.
    """

    # Without a group axis: the G completions of a prompt share one copy.
    keys: PyTree
    values: PyTree
    # A completion's position is its prompt's length plus its step, and attention masks
    # the padding behind that length. Padding need only be finite.
    lengths: Int[Array, " N"]


@struct.dataclass
class Cache:
    """Keys and values of own tokens, all layers; entries not yet written are 0.

    One array [L, N, K, G, T, h], or L of [N, K, G, T, h]. Heads come before the group,
    so that attention reads a layer without rearranging it.
    """

    keys: PyTree
    values: PyTree


def write_token(
    cache: Cache,
    keys: Float[Array, "N K G 1 h"],
    values: Float[Array, "N K G 1 h"],
    *,
    layer: Int[Array, ""] | int,
    step: Int[Array, ""] | int,
) -> Cache:
    """Returns the cache with the keys and values of one token at a layer and step.

    Within a loop that carries the cache, XLA writes in place. For a tuple of layers,
    `layer` is a Python int.
    """
    # One scalar step serves all sequences: shorter prompts differ in their positions,
    # not in the entry that they write. A step per sequence would be a scatter.

    def put(old: PyTree, new: Array) -> PyTree:
        if isinstance(old, tuple):
            start = (0, 0, 0, step, 0)
            put = lax.dynamic_update_slice(old[layer], new, start)
            return (*old[:layer], put, *old[layer + 1 :])
        start = (layer, 0, 0, 0, step, 0)
        return lax.dynamic_update_slice(old, new[None], start)

    return Cache(keys=put(cache.keys, keys), values=put(cache.values, values))


def read_layer(
    cache: Cache, layer: Int[Array, ""] | int
) -> tuple[Float[Array, "N K G T h"], Float[Array, "N K G T h"]]:
    """Returns the keys and the values of one layer."""

    # A layer of a stack is a slice, which XLA copies; that of a tuple is an array.
    def take(stored: PyTree) -> Array:
        if isinstance(stored, tuple):
            return stored[layer]
        return lax.dynamic_index_in_dim(stored, layer, axis=0, keepdims=False)

    return take(cache.keys), take(cache.values)


def per_layer(stacked: PyTree, count: int) -> tuple[PyTree, ...]:
    """Returns one tree for each of `count` layers, from a tree of stacked arrays."""
    return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count))


def regroup(
    prefix: Prefix,
    cache: Cache,
    prompts: Int[Array, "S M"],
    slots: Int[Array, "S M W"],
) -> tuple[Prefix, Cache]:
    """Returns prefix and cache of other groups, made of some of the present sequences.

    The prompts, and the sequences of the cache, are taken as S equal parts in order.
    New group m of a part belongs to its prompt `prompts[s, m]`, and its sequence w is
    its old sequence `slots[s, m, w]`, both counted within the part. Parts that lie on
    different devices stay there. Arrays are those of single layers.
    """
    parts = prompts.shape[0]

    # The gather is batched over the parts. A gather over the whole axis could read from
    # any device, and the mesh would have to exchange the caches.
    take = jax.vmap(lambda rows, at: rows[at])

    # Two groups may come from one: both then have a copy of the prompt.
    def of_prompts(x: Array) -> Array:
        taken = take(x.reshape(parts, -1, *x.shape[1:]), prompts)
        return taken.reshape(-1, *x.shape[1:])

    def of_sequences(x: Array) -> Array:
        _, k, _, t, h = x.shape
        # Heads stand before the group, but a sequence is moved with all its heads.
        rows = jnp.swapaxes(x, 1, 2).reshape(parts, -1, k, t, h)
        taken = take(rows, slots).reshape(-1, slots.shape[2], k, t, h)
        return jnp.swapaxes(taken, 1, 2)

    return jax.tree.map(of_prompts, prefix), jax.tree.map(of_sequences, cache)
