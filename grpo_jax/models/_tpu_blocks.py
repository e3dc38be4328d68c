"""What the kernels of `_tpu_kernels` compute for a block of queries and one of keys.

Everything is laid out with tokens in the lanes, which a head of width 64 would fill by
half. So scores stand as [keys, queries], and what belongs to a query is one row. They
are counted in units of ln 2, since the unit that computes powers computes those of 2.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30


class How(NamedTuple):
    """What is known when a kernel is compiled.

    Attributes:
      own: tokens of a block of rows.
      shared: tokens of a block of prompts, 0 if rows see none.
      interpret: computes without a TPU, to be tested.
    """

    scale: float
    softcap: float | None
    own: int
    shared: int
    interpret: bool


class Tables(NamedTuple):
    """What decides which blocks are computed, in scalar memory.

    Attributes:
      owner: the prompt of each row.
      order: the rows, those of a prompt behind each other.
      length: real tokens of the prompt of each row.
      window: the positions that a token sees, itself among them.
      first_own: the first block of its row that each block of queries sees.
      first_shared, end_shared: the same of the prompt, and its number of blocks.
    """

    owner: Int[Array, " B"]
    order: Int[Array, " B"]
    length: Int[Array, " B"]
    window: Int[Array, " 1"]
    first_own: Int[Array, " Bi"]
    first_shared: Int[Array, " Bi"]
    end_shared: Int[Array, " B"]


def forward(*refs: Any, how: How, blocks: int, before: int) -> None:
    """Writes attention, and the logarithm to base 2 of each query's total.

    Refs are the tables, numbers and queries of a block, keys and values of a block of
    the row and of the prompt; then what is written; then sums, one turn after another.
    """
    table, (number, queries, *keys), rest = _split(refs, 2 + (4 if before else 2))
    out, total, mixed, peak, weight = rest

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        mixed[...] = jnp.zeros_like(mixed)
        weight[...] = jnp.zeros_like(weight)
        peak[...] = jnp.full_like(peak, _MASKED)

    def add(keys: Any, values: Any, mask: Array) -> None:
        across, values = keys[...].T, values[...]
        for j in range(queries.shape[0]):
            at = slice(j, j + 1)
            scores, _ = _scores(across, queries[j], mask, how)
            # A query that has seen nothing yet counts what it does not see. This is
            # forgotten with its first score: it sees itself at last.
            new = jnp.maximum(peak[at], scores.max(axis=0, keepdims=True))
            shrink, weights = jnp.exp2(peak[at] - new), jnp.exp2(scores - new)
            peak[at] = new
            weight[at] = shrink * weight[at] + weights.sum(axis=0, keepdims=True)
            mixed[j] = shrink * mixed[j] + _product(values, weights)

    _each_block(add, table, number, keys, how=how, blocks=blocks, before=before)

    @pl.when(pl.program_id(3) == before + blocks - 1)
    def _() -> None:
        total[...] = peak[...] + jnp.log2(weight[...])
        for j in range(queries.shape[0]):
            out[j] = (mixed[j] / weight[j : j + 1]).astype(out.dtype)


def queries_gradient(*refs: Any, how: How, blocks: int, before: int) -> None:
    """Writes the gradient of the queries; refs as above, `given` behind the queries."""
    table, arrays, (out, gradient) = _split(refs, 5 + (4 if before else 2))
    number, queries, change, total, shift, *keys = arrays

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        gradient[...] = jnp.zeros_like(gradient)

    def add(keys: Any, values: Any, mask: Array) -> None:
        keys, pair = keys[...], (keys[...].T, values[...].T)
        for j in range(queries.shape[0]):
            given = change[j], total[j : j + 1], shift[j : j + 1]
            _, of_scores = _weights(pair, queries[j], mask, given, how)
            gradient[j] += _product(keys, of_scores)

    _each_block(add, table, number, keys, how=how, blocks=blocks, before=before)

    @pl.when(pl.program_id(3) == before + blocks - 1)
    def _() -> None:
        out[...] = (how.scale * gradient[...]).astype(out.dtype)


def keys_gradient(*refs: Any, how: How, blocks: int, of_prompt: bool) -> None:
    """Writes the gradients of keys and values, of the row or of the prompt.

    Rows of a prompt follow each other, and add to a block that stays where it is.
    """
    table, arrays, (of_keys, of_values, keys_sum, values_sum) = _split(refs, 7)
    number, queries, change, total, shift, keys, values = arrays
    key, turn, query = (pl.program_id(axis) for axis in (1, 2, 3))
    row, at = table.order[turn], table.order[turn] * blocks + query
    first, last = query == 0, query == blocks - 1
    if of_prompt:
        end, owner = pl.num_programs(2) - 1, lambda turn: table.owner[table.order[turn]]
        before, after = jnp.maximum(turn - 1, 0), jnp.minimum(turn + 1, end)
        first &= (turn == 0) | (owner(before) != owner(turn))
        last &= (turn == end) | (owner(turn) != owner(after))
        needed = (table.first_shared[at] <= key) & (key < table.end_shared[row])
    else:
        needed = (table.first_own[at] <= key) & (key <= query)

    @pl.when(first)
    def _() -> None:
        keys_sum[...] = jnp.zeros_like(keys_sum)
        values_sum[...] = jnp.zeros_like(values_sum)

    @pl.when(needed)
    def _() -> None:
        if of_prompt:
            mask = _sees_shared(table, row, key, number[...], how)
        else:
            mask = _sees_own(table, query, key, number[...], how)
        pair = keys[...].T, values[...].T
        for j in range(queries.shape[0]):
            given = change[j], total[j : j + 1], shift[j : j + 1]
            weights, of_scores = _weights(pair, queries[j], mask, given, how)
            values_sum[...] += _product(change[j], weights, across=True)
            keys_sum[...] += _product(queries[j], of_scores, across=True)

    @pl.when(last)
    def _() -> None:
        of_keys[...] = (how.scale * keys_sum[...]).astype(of_keys.dtype)
        of_values[...] = values_sum[...].astype(of_values.dtype)


def _split(
    refs: tuple[Any, ...], arrays: int
) -> tuple[Tables, tuple[Any, ...], tuple[Any, ...]]:
    """The tables, what is read, and what is written."""
    scalars = len(Tables._fields)
    arrays += scalars
    return Tables(*refs[:scalars]), refs[scalars:arrays], refs[arrays:]


def _each_block(
    add: Callable[[Any, Any, Array], None],
    table: Tables,
    number: Any,
    keys: list[Any],
    *,
    how: How,
    blocks: int,
    before: int,
) -> None:
    """Adds the block of this turn, of the prompt or of the row, if a query sees it."""
    row, query, turn = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    own, at = turn - before, row * blocks + query

    @pl.when((own >= table.first_own[at]) & (own >= 0) & (own <= query))
    def _() -> None:
        add(keys[0], keys[1], _sees_own(table, query, own, number[...], how))

    if not before:
        return
    ends = jnp.minimum(table.end_shared[row], before)

    @pl.when((turn >= table.first_shared[at]) & (turn < ends))
    def _() -> None:
        add(keys[2], keys[3], _sees_shared(table, row, turn, number[...], how))


def _sees_own(
    table: Tables, query: Any, key: Any, number: Int[Array, "1 q"], how: How
) -> Bool[Array, "s q"]:
    """Which own keys of a block each query of another sees."""
    shape = (how.own, how.own)
    queries = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + query * how.own
    keys = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + key * how.own
    distance = queries - keys
    return (distance >= 0) & (distance <= jnp.minimum(number, table.window[0] - 1))


def _sees_shared(
    table: Tables, row: Any, key: Any, number: Int[Array, "1 q"], how: How
) -> Bool[Array, "s q"]:
    """Which keys of a block of the prompt each query sees."""
    shape = (how.shared, how.own)
    keys = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + key * how.shared
    length = table.length[row]
    return (keys < length) & (keys > length - table.window[0] + number)


def _scores(
    keys: Float[Array, "s h"], queries: Float[Array, "h q"], mask: Array, how: How
) -> tuple[Float[Array, "s q"], Float[Array, "s q"] | None]:
    """Scores in units of ln 2, and what the softcap makes of a change of them."""
    raw, unit = _product(keys, queries), 1 / math.log(2)
    if how.softcap is None:
        return jnp.where(mask, how.scale * unit * raw, _MASKED), None
    bent = jnp.tanh(how.scale / how.softcap * raw)
    return jnp.where(mask, how.softcap * unit * bent, _MASKED), 1 - bent * bent


def _weights(
    pair: tuple[Float[Array, "s h"], Float[Array, "s h"]],
    queries: Float[Array, "h q"],
    mask: Bool[Array, "s q"],
    given: tuple[Float[Array, "h q"], Float[Array, "1 q"], Float[Array, "1 q"]],
    how: How,
) -> tuple[Float[Array, "s q"], Float[Array, "s q"]]:
    """Weights of keys, and the gradient of the scores, without the scale."""
    (keys, values), (change, total, shift) = pair, given
    scores, slope = _scores(keys, queries, mask, how)
    weights = jnp.exp2(scores - total)
    gradient = weights * (_product(values, change) - shift)
    return weights, gradient if slope is None else gradient * slope


def _product(left: Array, right: Array, *, across: bool = False) -> Array:
    """The matrix product, of right transposed with `across`, summed in float32."""
    dims = (((1,), (1 if across else 0,)), ((), ()))
    right = right.astype(left.dtype)
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
