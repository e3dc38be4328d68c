"""The compiled programs of the engine around its loop: weights, prompts, slots moved.

Each is compiled for the few sizes that occur. Keys and values are donated where a
program changes them, so that they are written in place.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from grpo_jax.models.cache import per_layer, prompt_block
from grpo_jax.models.protocol import SlotDecoder, in_compute_dtype
from grpo_jax.parallel.collectives import split_over_fsdp
from grpo_jax.parallel.mesh import named_leaves

# Logical axes of the rows of all parts, of one layer.
_AXES = ("batch", "kv_heads", None, None)


def axes_of(ndim: int) -> tuple[str | None, ...]:
    """Logical axes of what is kept on the devices: a cache, of one layer or all, or
    hidden states behind prompts."""
    return {3: ("batch", None, None), 4: _AXES, 5: (None, *_AXES)}[ndim]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Given:
    """In place of an array: leaf `number` of what was given."""

    number: int


def prepare(model: SlotDecoder, variables: PyTree, *, unrolled: bool) -> PyTree:
    """Weights in the form in which a loop reads them.

    What has this form already is the same array. As results of a compiled program they
    would be copies, the largest of them of the embedding.
    """
    return with_given(changed(model, variables, unrolled=unrolled), variables)


# Plans count what is given to it, also what it only passes on.
@functools.partial(jax.jit, static_argnames=("model", "unrolled"), keep_unused=True)
def changed(model: SlotDecoder, variables: PyTree, *, unrolled: bool) -> PyTree:
    """The weights that `prepare` makes; in place of the others which were given."""
    # Cast here, once per rollout: in the loop it would be repeated at every token.
    made = in_compute_dtype(variables, model.config.dtype)
    made = model.unroll(made) if unrolled else made
    given = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(variables))}
    return jax.tree.map(
        lambda leaf: _Given(given[id(leaf)]) if id(leaf) in given else leaf, made
    )


def with_given(made: PyTree, variables: PyTree) -> PyTree:
    """What `changed` returns, complete."""
    given = jax.tree.leaves(variables)
    return jax.tree.map(
        lambda leaf: given[leaf.number] if isinstance(leaf, _Given) else leaf,
        made,
        is_leaf=lambda leaf: isinstance(leaf, _Given),
    )


def layers_apart(variables: PyTree) -> bool:
    """Whether decoding gets the arrays of each layer by themselves.

    Not those that fsdp splits, which are gathered layer by layer. Nor quantized ones:
    in one block of code for all layers XLA dequantizes all before the first product.
    """
    quantized = any(path.endswith("/codes") for path in named_leaves(variables))
    return not (split_over_fsdp(variables) or quantized)


def ring_apart(unrolled: bool, platform: str) -> bool:
    """Whether the ring has an array for each layer; see `models.cache`."""
    return unrolled and platform != "tpu"


@functools.partial(
    jax.jit, static_argnames=("model", "parts", "rows", "columns", "unrolled")
)
def empty(
    model: SlotDecoder, *, parts: int, rows: int, columns: int, unrolled: bool
) -> tuple[PyTree, PyTree, PyTree]:
    """Keys, values and states of `rows` sequences of each part, all 0."""
    cache = model.init_cache(parts, rows, columns)

    def lay(x: Array) -> PyTree:
        if unrolled:
            return tuple(_constrain(one, *_AXES) for one in per_layer(x, len(x)))
        return _constrain(x, None, *_AXES)

    return jax.tree.map(lay, cache.arrays)


def by_part(change: Callable, x: Array, *others: Array) -> Array:
    """`change(rows, *others)` of each part, for rows of a layer or of all layers."""

    def of_layer(x: Array, *layers: Array) -> Array:
        split = lambda x: x.reshape(parts, -1, *x.shape[1:])  # noqa: E731
        changed = jax.vmap(change)(split(x), *map(split, layers), *of_parts)
        return _constrain(changed.reshape(-1, *changed.shape[2:]), *_AXES)

    # Other caches have the axes of `x`; what is left has one axis of parts in front.
    layers = [other for other in others if other.ndim == x.ndim]
    of_parts = others[len(layers) :]
    parts = of_parts[0].shape[0]
    return (jax.vmap(of_layer) if x.ndim == 5 else of_layer)(x, *layers)


@functools.partial(
    jax.jit, static_argnames=("model", "unrolled"), donate_argnames=("shared", "last")
)
def prefill(
    model: SlotDecoder,
    variables: PyTree,
    prompts: Int[Array, "A m w"],
    lengths: Int[Array, "A m"],
    rows: Int[Array, "A m"],
    shared: tuple[PyTree, PyTree, PyTree],
    *,
    last: Float[Array, "A M D"],
    unrolled: bool,
) -> tuple[tuple[PyTree, PyTree, PyTree], Float[Array, "A M D"]]:
    """The block of prompts with new ones in `rows`; one beyond the last is dropped.

    They may be narrower than the block: what is behind them is never read.
    """
    parts, count, width = prompts.shape
    hidden, prefix = model.apply(
        variables,
        prompts.reshape(-1, width),
        lengths.reshape(-1),
        method=model.prefill,
    )

    def put(old: Array, new: Array, at: Array) -> Array:
        behind = [(0, o - n) for o, n in zip(old.shape[1:], new.shape[1:], strict=True)]
        return old.at[at].set(jnp.pad(new, [(0, 0), *behind]), mode="drop")

    def put_all(new: Array, old: PyTree) -> PyTree:
        if unrolled:
            pairs = zip(old, new, strict=True)
            return tuple(by_part(put, *pair, rows) for pair in pairs)
        return by_part(put, old, new, rows)

    new = prompt_block(prefix)
    shared = jax.tree.map(put_all, (new.keys, new.values, new.state), shared)
    hidden = hidden.reshape(parts, count, -1).astype(last.dtype)
    last = jax.vmap(put)(last, hidden, rows)
    return shared, by_batch(last)


@jax.jit
def take_rows(arrays: PyTree, rows: Int[Array, "A R"]) -> PyTree:
    """Some rows of a cache, in order; of hidden states [A, M, D] too."""
    gather = lambda one, at: one[at]  # noqa: E731

    def take(x: Array) -> Array:
        if x.ndim == 3:
            return by_batch(jax.vmap(gather)(x, rows))
        return by_part(gather, x, rows)

    return jax.tree.map(take, arrays)


@functools.partial(jax.jit, static_argnames=("columns",))
def widen(
    cache: tuple[PyTree, PyTree, PyTree], column: Int[Array, " A"], *, columns: int
) -> tuple[PyTree, PyTree, PyTree]:
    """The cache as a ring of more columns, of which the first is the oldest.

    The column to be written next is the first new one.
    """

    def grow(x: Array, column: Array, axis: int) -> Array:
        before = x.shape[axis]
        around = jnp.concatenate([x, x], axis=axis)
        x = lax.dynamic_slice_in_dim(around, column, before, axis=axis)
        wider = [(0, 0)] * x.ndim
        wider[axis] = (0, columns - before)
        return jnp.pad(x, wider)

    def of_all(arrays: PyTree, axis: int) -> PyTree:
        one = functools.partial(grow, axis=axis)
        return jax.tree.map(lambda x: by_part(one, x, column), arrays)

    keys, values, state = cache
    return of_all(keys, -1), of_all(values, -2), state


def by_batch(x: Shaped[Array, "A ..."]) -> Shaped[Array, "A ..."]:
    """An array of which each part is on its own device."""
    return _constrain(x, "batch", *(None,) * (x.ndim - 1))


def _constrain(x: Array, *axes: str | None) -> Array:
    return with_logical_constraint(x, axes)
