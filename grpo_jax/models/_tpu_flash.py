"""Attention of rows and the prompts that they share by kernels, on TPUs.

Scores are never in main memory. A prompt's keys and values are there once, for all of
its rows, in the backward pass as well.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.models import _tpu_kernels as kernels
from grpo_jax.models.cache import Prefix
from grpo_jax.parallel.mesh import AXES, batch_shards

# Wider than any sequence: "no window".
_UNBOUNDED = 2**30
# A block of queries has all heads that read the same keys, one after the other in the
# program. Three blocks of their size, each twice, and a sum have to fit beside the
# cores together with scores; of 16 MiB they may take half.
_MOST_HEADS, _MOST_BYTES = 16, 2**23
# Padding that pays: so many pairs of a query and a key for each one that there is. With
# gradients the plain form moves 40 bytes for a pair. As compiled for a v5e with heads
# of width 64, this takes three times as long as all instructions of the kernels for it.
_MOST_PADDING = 2.0


@struct.dataclass
class Seen:
    """What `attention` is told of what queries see; fields as its arguments."""

    prefix: Prefix | None
    owner: Int[Array, "A R"] | None
    index: Int[Array, "N T"] | None
    window: Int[Array, ""] | int | None


class Blocks(NamedTuple):
    """How a kernel is run; the tests have narrow lanes, and no TPU."""

    lanes: int = 128
    interpret: bool = False


def serves_rows(
    queries: Float[Array, "N G T H h"],
    keys: Float[Array, "N K G S h"],
    prefix: Prefix | None,
    owner: Int[Array, "A R"] | None,
) -> bool:
    """Whether `row_attention` serves these shapes where they are computed, and wins."""
    n, _, tokens, heads, width = queries.shape
    kv_heads = keys.shape[1]
    batches, prompt = [n], 0
    if prefix is not None:
        batches += [len(prefix.lengths), n if owner is None else len(owner)]
        prompt = prefix.keys.shape[2]
    lanes, each = Blocks().lanes, heads // kv_heads
    (block, own), (_, shared) = _block(tokens, lanes), _block(prompt, lanes)
    held = each * width * block * (6 * queries.dtype.itemsize + 4)
    mesh = jax.sharding.get_abstract_mesh()
    return (
        1 < tokens == keys.shape[3]
        and own * (own + shared) <= _MOST_PADDING * tokens * (tokens + prompt)
        and queries.dtype in (jnp.bfloat16, jnp.float32)
        and width % 16 == 0
        and each <= _MOST_HEADS
        and held <= _MOST_BYTES
        and is_tpu(mesh)
        and _splits(mesh, batches, kv_heads)
    )


def row_attention(
    queries: Float[Array, "N G T H h"],
    keys: Float[Array, "N K G T h"],
    values: Float[Array, "N K G T h"],
    seen: Seen,
    *,
    scale: float,
    softcap: float | None,
    blocks: Blocks = Blocks(),  # noqa: B008
) -> Float[Array, "N G T H h"]:
    """Returns what `attention` does for as many queries as own keys, of these shapes.

    Scores and sums are float32. Tokens are filled up to whole blocks, of 128 at least.
    """
    over = functools.partial(_local, scale=scale, softcap=softcap, blocks=blocks)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        # The compiler does not split a kernel. No device needs what another one has.
        batch: Any = P(AXES[:2])
        by_head: Any = P(AXES[:2], AXES[2])
        rows = P(AXES[:2], None, None, AXES[2])
        whole: Any = P()
        of_prefix = seen.prefix and Prefix(by_head, by_head, batch)
        of_seen = Seen(of_prefix, owner=batch, index=batch, window=whole)
        over = jax.shard_map(
            over,
            in_specs=(rows, by_head, by_head, of_seen),
            out_specs=rows,
            check_vma=False,
        )
    return over(queries, keys, values, seen)


def _local(
    queries: Float[Array, "N G T H h"],
    keys: Float[Array, "N K G T h"],
    values: Float[Array, "N K G T h"],
    seen: Seen,
    *,
    scale: float,
    softcap: float | None,
    blocks: Blocks,
) -> Float[Array, "N G T H h"]:
    """Returns what `row_attention` does, on one device."""
    n, g, t, heads, width = queries.shape
    kv_heads = keys.shape[1]
    own, places = _block(t, blocks.lanes)

    def laid(x: Float[Array, "N K G T h"]) -> Float[Array, "B K h S"]:
        x = x.transpose(0, 2, 1, 4, 3).reshape(n * g, kv_heads, width, t)
        return _fill(x, places)

    folded = queries.reshape(n * g, t, kv_heads, heads // kv_heads, width)
    index = jnp.arange(t)[None] if seen.index is None else seen.index
    row = kernels.Row(
        queries=_fill(folded.transpose(0, 2, 3, 4, 1), places),
        keys=laid(keys),
        values=laid(values),
        number=_fill(jnp.broadcast_to(index, (n * g, t))[:, None], places),
    )
    prefix, prompts, size = seen.prefix, (), 0
    if prefix is not None:
        size, places = _block(prefix.keys.shape[2], blocks.lanes)
        of_prompts = prefix.keys, prefix.values
        prompts = tuple(_fill(jnp.swapaxes(x, 2, 3), places) for x in of_prompts)
    how = kernels.How(scale, softcap, own, size, blocks.interpret)
    owner, length = _owners(prefix, seen.owner, n, g)
    window = _UNBOUNDED if seen.window is None else seen.window
    table = kernels.tables(row, owner, length, window, how)
    out: Array = kernels.attend(how, table, row, prompts)
    return out[..., :t].transpose(0, 4, 1, 2, 3).reshape(queries.shape)


def _owners(
    prefix: Prefix | None, owner: Int[Array, "A R"] | None, count: int, group: int
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """The prompt of each row, counted over all parts, and its length; or zeros."""
    rows = jnp.arange(count * group)
    if prefix is None:
        return 0 * rows, 0 * rows
    if owner is not None:
        each = len(prefix.lengths) // len(owner)
        part = each * jnp.arange(len(owner))[:, None]
        rows = (part + jnp.minimum(owner, each - 1)).reshape(-1)
    else:
        rows //= group
    return rows, prefix.lengths[rows]


def _block(tokens: int, lanes: int) -> tuple[int, int]:
    """The tokens of a block, and of as many whole blocks as are needed."""
    whole = -(-tokens // lanes) * lanes
    # What a block does not need is left out, but a turn of its own takes time.
    if whole <= 3 * lanes:
        return whole, whole
    return 2 * lanes, -(-tokens // (2 * lanes)) * 2 * lanes


def _fill(x: Array, tokens: int) -> Array:
    """Returns x with so many entries along its last axis, zeros behind its own."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, tokens - x.shape[-1])])


def is_tpu(mesh: AbstractMesh) -> bool:
    """Whether what is traced here is known to run on one TPU, or on a mesh of them."""
    device = mesh.abstract_device
    if device is None:
        # Without a mesh nothing says how several devices would split the arrays.
        return jax.default_backend() == "tpu" and jax.device_count() == 1
    return device.device_kind.startswith("TPU")


def _splits(mesh: AbstractMesh, batches: list[int], kv_heads: int) -> bool:
    """Whether the mesh splits these batches, and heads, into equal parts."""
    if set(mesh.axis_types) - {AxisType.Auto}:
        return False  # within a map over devices
    if mesh.size <= 1:
        return True
    if mesh.axis_names != AXES or kv_heads % mesh.shape[AXES[2]]:
        return False
    return all(size % batch_shards(mesh) == 0 for size in batches)
