"""Kernels for TPUs: attention of rows of tokens that share prompts, and its gradients.

A row names the prompt that it sees, of which there is one copy, however many rows it
has. A kernel goes over blocks of queries and of keys, and keeps sums beside the cores
meanwhile; scores are never in main memory (Dao 2023, https://arxiv.org/abs/2307.08691).
Blocks that nothing sees are neither read nor computed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from grpo_jax.models import _tpu_blocks as bodies
from grpo_jax.models._tpu_blocks import How, Tables


class Row(NamedTuple):
    """Arrays of the rows: queries, own keys and values, and each token's number.

    A token sees as many own tokens before itself as its number says. Tokens are filled
    up to whole blocks.
    """

    queries: Float[Array, "B K r h S"]
    keys: Float[Array, "B K h S"]
    values: Float[Array, "B K h S"]
    number: Int[Array, "B 1 S"]


def tables(
    row: Row,
    owner: Int[Array, " B"],
    length: Int[Array, " B"],
    window: Int[Array, ""] | int,
    how: How,
) -> Tables:
    """Returns the blocks that each block of queries sees; arguments as fields."""
    number = row.number[:, 0]
    own = jnp.arange(number.shape[1])[None] - jnp.minimum(number, window - 1)
    shared = jnp.maximum(length[:, None] + number - window + 1, 0)
    size = max(how.shared, 1)

    def lowest(x: Int[Array, "B S"]) -> Int[Array, " Bi"]:
        return x.reshape(len(x), -1, how.own).min(axis=2).reshape(-1)

    return Tables(
        owner=owner,
        order=jnp.argsort(owner),
        length=length,
        window=jnp.reshape(jnp.asarray(window, jnp.int32), (1,)),
        first_own=lowest(own) // how.own,
        first_shared=lowest(shared) // size,
        end_shared=(length + size - 1) // size,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    how: How, table: Tables, row: Row, prompts: tuple[Array, ...]
) -> Float[Array, "B K r h S"]:
    """Returns the attention of rows; differentiable in arrays of numbers.

    Args:
      prompts: keys and values [N, K, h, P], filled up to whole blocks, or nothing.
    """
    return _forward(how, table, row, prompts)[0]


def _attend_forward(
    how: How, table: Tables, row: Row, prompts: tuple[Array, ...]
) -> tuple[Float[Array, "B K r h S"], Any]:
    out, total = _forward(how, table, row, prompts)
    return out, (table, row, prompts, out, total)


def _attend_backward(
    how: How, kept: Any, change: Float[Array, "B K r h S"]
) -> tuple[None, Row, tuple[Array, ...]]:
    table, row, prompts, out, total = kept
    # What the weights of a query have in common, over both kinds of keys.
    shift = jnp.sum(change.astype(jnp.float32) * out.astype(jnp.float32), axis=3)
    given = change, total, shift
    queries = _over_keys(bodies.queries_gradient, how, table, row, prompts, given)
    own = row.keys, row.values
    keys, values = _over_queries(how, table, row, own, given, of_prompt=False)
    if prompts:
        found = _over_queries(how, table, row, prompts, given, of_prompt=True)
        # Nothing was written for a prompt without rows.
        read = jnp.zeros(len(prompts[0]), bool).at[table.owner].set(True)
        prompts = tuple(jnp.where(read[:, None, None, None], x, 0) for x in found)
    none: Any = None
    return none, Row(queries[0], keys, values, number=none), prompts


attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    how: How, table: Tables, row: Row, prompts: tuple[Array, ...]
) -> tuple[Float[Array, "B K r h S"], Float[Array, "B K r S"]]:
    """Returns attention, and the logarithm to base 2 of each query's total."""
    return _over_keys(bodies.forward, how, table, row, prompts, ())


def _over_keys(
    body: Callable,
    how: How,
    table: Tables,
    row: Row,
    prompts: tuple[Array, ...],
    given: tuple[Array, ...],
) -> Any:
    """Goes over the keys of each block of queries, those of the prompt first.

    The results are like the queries; without `given`, one number for each follows.
    """
    b, k, r, h, s = row.queries.shape
    blocks = s // how.own
    before = prompts[0].shape[3] // how.shared if prompts else 0

    # What is not needed is not read: the block stays that of the turn before.
    def of_row(b: Any, k: Any, i: Any, j: Any, *refs: Any) -> tuple[Any, ...]:
        low = Tables(*refs).first_own[b * blocks + i]
        return b, k, 0, jnp.clip(j - before, low, i)

    def of_prompt(b: Any, k: Any, i: Any, j: Any, *refs: Any) -> tuple[Any, ...]:
        table = Tables(*refs)
        low, end = table.first_shared[b * blocks + i], table.end_shared[b]
        block = jnp.minimum(jnp.maximum(j, low), end - 1)
        return table.owner[b], k, 0, jnp.maximum(block, 0)

    queries = _Queries(how, row, lambda b, k, i, j, *_: (b, k, i))
    out, scratch = [queries.like()], [(r, h, how.own)]
    if not given:
        out.append(jax.ShapeDtypeStruct((b, k, r, s), jnp.float32))
        scratch += [(r, how.own)] * 2
    keys = [pl.BlockSpec((None, None, h, how.own), of_row)] * 2
    keys += [pl.BlockSpec((None, None, h, how.shared), of_prompt)] * len(prompts)
    return _call(
        functools.partial(body, how=how, blocks=blocks, before=before),
        how,
        table,
        (row.number, row.queries, *given, row.keys, row.values, *prompts),
        grid=(b, k, blocks, before + blocks),
        parallel=3,
        inputs=queries.specs(given) + keys,
        out=out,
        outputs=queries.specs(out)[2:],
        scratch=scratch,
        flops=(6 if given else 4) * row.queries.size * (before * how.shared + s // 2),
    )


def _over_queries(
    how: How,
    table: Tables,
    row: Row,
    keys: tuple[Array, ...],
    given: tuple[Array, ...],
    *,
    of_prompt: bool,
) -> list[Array]:
    """Goes over the queries of each block of keys, of the rows or of the prompts.

    Returns the gradients of keys and values.
    """
    b, k, _, h, s = row.queries.shape
    blocks, size = s // how.own, how.shared if of_prompt else how.own

    def of_queries(k: Any, c: Any, t: Any, i: Any, *refs: Any) -> tuple[Any, ...]:
        # Queries before the keys are not read: those of the first needed block are.
        return Tables(*refs).order[t], k, i if of_prompt else jnp.maximum(i, c)

    def of_keys(k: Any, c: Any, t: Any, i: Any, *refs: Any) -> tuple[Any, ...]:
        table = Tables(*refs)
        row = table.order[t]
        return table.owner[row] if of_prompt else row, k, 0, c

    queries = _Queries(how, row, of_queries)
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in keys]
    specs = [pl.BlockSpec((None, None, h, size), of_keys)] * 2
    seen = keys[0].shape[3] if of_prompt else s // 2
    return _call(
        functools.partial(
            bodies.keys_gradient, how=how, blocks=blocks, of_prompt=of_prompt
        ),
        how,
        table,
        (row.number, row.queries, *given, *keys),
        grid=(k, keys[0].shape[3] // size, b, blocks),
        parallel=1,
        inputs=queries.specs(given) + specs,
        out=out,
        outputs=specs,
        scratch=[(h, size)] * 2,
        flops=8 * row.queries.size * seen,
    )


class _Queries(NamedTuple):
    """The blocks of what belongs to queries; `place` gives row, head and block."""

    how: How
    row: Row
    place: Callable[..., tuple[Any, ...]]

    def like(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.row.queries.shape, self.row.queries.dtype)

    def specs(self, others: Sequence[Any]) -> list[pl.BlockSpec]:
        """Of numbers, queries, and others, which have a width of heads or none."""
        _, _, r, h, _ = self.row.queries.shape

        def numbers(*ids: Any) -> tuple[Any, ...]:
            b, _, i = self.place(*ids)
            return b, 0, i

        def wide(*ids: Any) -> tuple[Any, ...]:
            b, k, i = self.place(*ids)
            return b, k, 0, 0, i

        def narrow(*ids: Any) -> tuple[Any, ...]:
            b, k, i = self.place(*ids)
            return b, k, 0, i

        size = self.how.own
        whole = pl.BlockSpec((None, None, r, h, size), wide)
        line = pl.BlockSpec((None, None, r, size), narrow)
        found = [pl.BlockSpec((None, 1, size), numbers), whole]
        return found + [whole if x.ndim == 5 else line for x in others]


def _call(
    kernel: Callable,
    how: How,
    table: Tables,
    arrays: tuple[Array, ...],
    *,
    grid: tuple[int, ...],
    parallel: int,
    inputs: list[pl.BlockSpec],
    out: list[jax.ShapeDtypeStruct],
    outputs: list[pl.BlockSpec],
    scratch: list[tuple[int, ...]],
    flops: int,
) -> list[Array]:
    """Runs a kernel; its first axes, so many, may be split over cores."""
    kinds = (pltpu.PARALLEL,) * parallel + (pltpu.ARBITRARY,) * (len(grid) - parallel)
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *out))
    width = arrays[1].shape[3]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=grid,
            in_specs=inputs,
            out_specs=outputs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=kinds),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=flops // (4 * width), bytes_accessed=moved
        ),
        interpret=how.interpret,
    )(*table, *arrays)
