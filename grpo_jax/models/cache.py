"""What outlives a call: keys and values of prompts, and of tokens generated so far.

A decoding loop works on A parts of S slots; a part lies on one device. A slot holds one
sequence. It reads its prompt from a block of prompts, which the loop does not change,
and its own tokens from a ring of C columns, which the loop writes.

All layers share one array with a leading axis of layers, or a tuple has one array per
layer. On a CPU, a loop over tokens reads and writes separate arrays in place, and would
copy each layer of a stack at every token. On a TPU a layer of a stack is read in place.
A ring of its own would be taken into fast memory, and copied back whole when a token is
written there. So the ring may be a stack where the prompts are not.

Layers without attention have a `MixerState` instead, of prompts and of slots.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree


@struct.dataclass
class MixerState:
    """What a layer without attention keeps of the tokens before, for each row.

    Of a model, an array with a leading axis of layers, or a tuple with one for each.
    """

    memory: PyTree  # [R, V, k, v], float32
    recent: PyTree  # [R, K, c - 1, w], the last inputs of the convolution


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
    state: MixerState | None = None  # after the prompts


@struct.dataclass
class Cache:
    """Keys and values of own tokens, a ring of C columns; entries not written are 0.

    Keys are [L, B, K, h, C], or L of [B, K, h, C]; values [L, B, K, C, h] alike. So
    both products of attention read them as they are stored: with keys that have the
    columns last, a CPU is half as fast again.

    The B = A x S slots come part by part. All slots write in the same column at a time,
    so a write is one `dynamic_update_slice`, which XLA does in place. The column after
    the last one is the first. What a slot reads follows from its number of own tokens.
    """

    keys: PyTree
    values: PyTree
    state: MixerState | None = None  # after the tokens of each slot

    @property
    def arrays(self) -> tuple[PyTree, PyTree, PyTree]:
        """All fields, in order."""
        return self.keys, self.values, self.state

    def of_layers(self, *arrays: PyTree) -> "Cache":
        """Returns a cache with these arrays, in a stack if this one has stacks."""

        def lay(old: PyTree, new: PyTree) -> PyTree:
            stacks = isinstance(new, tuple) and not isinstance(old, tuple)
            return jnp.stack(new) if stacks else new

        is_tuple = lambda x: isinstance(x, tuple)  # noqa: E731
        old = [*self.arrays[: len(arrays)]]  # as tuples they would be leaves
        return Cache(*jax.tree.map(lay, old, [*arrays], is_leaf=is_tuple))


@struct.dataclass
class PromptBlock:
    """Prompts that slots share: M rows per part, each read by up to W slots.

    Attributes:
      keys: [L, A x M, K, h, P], or L of [A x M, K, h, P], or those of one layer. An
        axis of parts of size 1 would make XLA write a cache twice.
      values: [L, A x M, K, P, h] alike.
      state: after the prompts.
      members: the slots that read each row, S where there is none. None: row m is read
        by the W slots from m x W on.
      place: the entry of `members` that is this slot, counted over M x W, and M x W for
        none. None with `members`.
    """

    keys: PyTree
    values: PyTree
    state: MixerState | None = None
    members: Int[Array, "A M W"] | None = None
    place: Int[Array, "A S"] | None = None


@struct.dataclass
class Slots:
    """Where the sequence of each slot stands when a token of it is fed.

    Attributes:
      prompt_lengths: tokens of its prompt.
      index: which own token is fed, counted from 0.
      column: the column that is written, the same in all slots.
    """

    prompt_lengths: Int[Array, "A S"]
    index: Int[Array, "A S"]
    column: Int[Array, ""] | int

    @property
    def positions(self) -> Int[Array, "A S"]:
        """The position of the token that is fed."""
        return self.prompt_lengths + self.index

    def seen(
        self, columns: int, window: Int[Array, ""] | int | None
    ) -> Bool[Array, "A S C"]:
        """Which columns of the ring each slot sees, itself among them."""
        # A sequence has written a column at every turn since it began. So the column of
        # age a has its own token `index - a`, or that of the slot's earlier sequence.
        age = ((self.column - jnp.arange(columns)) % columns)[None, None, :]
        most = self.index if window is None else jnp.minimum(self.index, window - 1)
        return age <= most[..., None]


def prompt_block(prefix: Prefix) -> PromptBlock:
    """Returns a prefix as a block of N parts with one row each, read by G slots."""
    keys = jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), prefix.keys)
    return PromptBlock(keys, prefix.values, prefix.state)


def write_token(
    cache: Cache,
    keys: Float[Array, "B K 1 h"],
    values: Float[Array, "B K 1 h"],
    *,
    layer: Int[Array, ""] | int,
    column: Int[Array, ""] | int,
) -> Cache:
    """Returns the cache with the keys and values of one token in a layer's column.

    Within a loop that carries the cache, XLA writes in place. For a tuple of layers,
    `layer` is a Python int.
    """
    # One column serves all slots, wherever their sequences stand. A column per slot
    # would be a scatter.

    def put(old: PyTree, new: Array, axis: int) -> PyTree:
        if isinstance(old, tuple):
            put = lax.dynamic_update_slice_in_dim(old[layer], new, column, axis)
            return (*old[:layer], put, *old[layer + 1 :])
        start = [layer, 0, 0, 0, 0]
        start[axis] = column
        return lax.dynamic_update_slice(old, new[None], start)

    return dataclasses.replace(
        cache,
        keys=put(cache.keys, jnp.swapaxes(keys, -1, -2), -1),
        values=put(cache.values, values, -2),
    )


def read_layer(
    cache: Cache, layer: Int[Array, ""] | int
) -> tuple[Float[Array, "B K h C"], Float[Array, "B K C h"]]:
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
