"""Products of blocks of rows with a kernel each, for TPUs.

What XLA makes of `ragged_dot` depends on libtpu. 0.0.42 multiplies all rows with each
kernel in the gradient of the kernels, 0.0.50 nowhere, 0.0.52 in both gradients and in
the product itself (findings/gradient_of_ragged_dot.sh).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.sharding import AxisType
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from grpo_jax.models._tpu_flash import is_tpu

# Rows, inputs and outputs of a tile. Both sides twice, in float32 as well, the sum and
# twice the result take 10 of the 16 MiB that a kernel has by itself, if all is float32.
_ROWS, _SIDE = 256, 512
_FEWEST_ROWS = 128


def serves_blocks(devices: int, dtype: DTypeLike) -> bool:
    """Whether `block_product` can be used where rows are split over so many devices.

    No other axis of the mesh may split the kernels, and nothing may have mapped it
    before: the compiler does not split what `block_product` calls. Its kernels take no
    float16, and have no gradient where integers have 64 bits.
    """
    mesh = jax.sharding.get_abstract_mesh()
    mapped = set(mesh.axis_types) - {AxisType.Auto}
    narrow = jnp.result_type(int) == jnp.int32
    known = narrow and dtype in (jnp.bfloat16, jnp.float32)
    return known and is_tpu(mesh) and not mapped and max(mesh.size, 1) == devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def block_product(
    rows: Float[Array, "R I"],
    kernels: Float[Array, "E I O"],
    sizes: Int[Array, " E"],
    interpret: bool = False,
) -> Float[Array, "R O"]:
    """Returns what `jax.lax.ragged_dot` does: the first sizes[0] rows by kernels[0].

    Rows behind the last block give 0. A row meets one kernel only, and so it is in both
    gradients: by the kernels of MegaBlocks (Gale et al. 2022,
    https://arxiv.org/abs/2211.15841, section 5.1) that come with JAX. With `interpret`
    they need no TPU. It has no derivative in forward mode (`jax.jvp`).
    """
    return _product(rows, kernels, sizes, interpret=interpret)


def _product(
    rows: Array, kernels: Array, sizes: Array, *, interpret: bool, turned: bool = False
) -> Array:
    """The rows by the kernels of their blocks, or by these kernels turned."""
    count, *sides = kernels.shape
    tile = _tile(len(rows), count)
    out = gmm(
        _whole(rows, tile),
        kernels,
        sizes,
        preferred_element_type=rows.dtype,
        tiling=(tile, *(min(side, _SIDE) for side in sides[:: -1 if turned else 1])),
        transpose_rhs=turned,
        interpret=interpret,
    )[: len(rows)]
    # What is in no block was never written.
    return jnp.where(jnp.arange(len(rows))[:, None] < sizes.sum(), out, 0)


def _forward(rows: Array, kernels: Array, sizes: Array, interpret: bool) -> tuple:
    return block_product(rows, kernels, sizes, interpret), (rows, kernels, sizes)


def _backward(
    interpret: bool, kept: tuple[Array, Array, Array], grad: Array
) -> tuple[Array, Array, None]:
    rows, kernels, sizes = kept
    count, width, out = kernels.shape
    tile = _tile(len(rows), count)
    of_rows = _product(grad, kernels, sizes, interpret=interpret, turned=True)
    of_kernels = tgmm(
        _whole(rows, tile).T,
        _whole(grad, tile),
        sizes,
        preferred_element_type=kernels.dtype,
        tiling=(tile, min(width, _SIDE), min(out, _SIDE)),
        interpret=interpret,
    )
    return of_rows, of_kernels, None


block_product.defvjp(_forward, _backward)


def _tile(rows: int, blocks: int) -> int:
    # A tile is computed once for each block that it has a part of.
    return _ROWS if rows >= _ROWS * blocks else _FEWEST_ROWS


def _whole(rows: Array, tile: int) -> Array:
    """Returns rows filled up to whole tiles, with zeros."""
    return jnp.pad(rows, ((0, -len(rows) % tile), (0, 0)))
