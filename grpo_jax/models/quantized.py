"""Frozen kernels in 8 or 4 bits: how they are stored. `_frozen` has products with them.

In the place of a `kernel` [..., in, out] there are two leaves, `codes` and `scale`:

- int8: codes [..., in, out], scale [..., 1, out], W = scale codes. The scale of an
  output is its largest |W| / 127, so a rounded weight is off by half a scale at most
  (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 2.1).
- nf4: codes [..., in/2, out] hold two numbers of 4 bits each, the first one in the
  upper bits, scale [..., in/64, out], W = scale NF4[codes]. The scale of 64 inputs is
  their largest |W|. The 16 values are quantiles of a normal distribution (Dettmers et
  al. 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E).

Only projections of layers are quantized, as in bitsandbytes: the embedding, the head,
norms and biases are used for single rows or are small. A product dequantizes one kernel
to the dtype of its other factor. Neither the values of a whole stack nor those of a
backward pass are ever there at once.
"""

import math
import re
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

Kind = Literal["int8", "nf4"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# The parameters that are quantized.
QUANTIZED = re.compile(r"layers/.+/kernel")

# Inputs of a projection that share a scale in nf4, or fewer where 64 do not divide.
_BLOCK = 64
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    np.float32,
)


def quantize(kernel: np.ndarray, kind: Kind) -> dict[str, np.ndarray]:
    """The codes and the scale of kernels [..., in, out], computed in float32.

    Each number becomes the nearest that its code can be. A column or a block of zeros
    has scale 0, and stays 0.

    Raises:
      ValueError: nf4 of an odd number of inputs.
    """
    wide = np.asarray(kernel, np.float32)
    blocks = quantized_shapes(wide.shape, kind)["scale"].shape[-2]
    parts = wide.reshape(*wide.shape[:-2], blocks, -1, wide.shape[-1])
    peak = np.abs(parts).max(axis=-2, keepdims=True)
    if kind == "int8":
        scale = peak / np.float32(127)
        codes = np.rint(np.divide(parts, scale, where=peak > 0, out=0 * parts))
        codes = codes.astype(np.int8).reshape(wide.shape)
        return {"codes": codes, "scale": scale[..., 0, :]}
    # As bitsandbytes: a product with the inverse, and the nearest value.
    inverse = np.divide(np.float32(1), peak, where=peak > 0, out=0 * peak)
    middles = (NF4[1:] + NF4[:-1]) / 2
    codes = np.searchsorted(middles, parts * inverse).astype(np.uint8)
    pairs = codes.reshape(*wide.shape[:-2], -1, 2, wide.shape[-1])
    packed = pairs[..., 0, :] << 4 | pairs[..., 1, :]
    return {"codes": packed, "scale": peak[..., 0, :]}


def quantized_shapes(
    shape: tuple[int, ...], kind: Kind
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `quantize` makes of kernels of a shape; raises as it does."""
    *stack, inputs, outputs = shape
    blocks, rows, dtype = 1, inputs, jnp.int8
    if kind == "nf4":
        blocks, rows, dtype = inputs // math.gcd(inputs, _BLOCK), inputs // 2, jnp.uint8
        if inputs % 2:
            raise ValueError(
                f"lora.base_dtype 'nf4' stores pairs of inputs, but a projection has "
                f"{inputs}; use 'int8'"
            )
    return {
        "codes": jax.ShapeDtypeStruct((*stack, rows, outputs), dtype),
        "scale": jax.ShapeDtypeStruct((*stack, blocks, outputs), jnp.float32),
    }


def abstract_quantized(shapes: PyTree, places: PyTree, kind: Kind | None) -> PyTree:
    """Shapes with shardings of the parameters, their kernels quantized; None: as given.

    Raises:
      ValueError: for a model with experts, whose kernels would stay as they are, and as
        `quantized_shapes`.
    """
    placed = jax.tree.map(
        lambda leaf, place: _placed(leaf.shape, leaf.dtype, place), shapes, places
    )
    if kind is None:
        return placed
    flat: dict[Any, Any] = traverse_util.flatten_dict(placed, sep="/")
    if "layers/mlp/router" in flat:
        raise ValueError(
            f"lora.base_dtype {kind!r} does not serve models with experts, which are "
            "most of their weights; use 'auto'"
        )
    for path in filter(QUANTIZED.fullmatch, [*flat]):
        kernel, module = flat.pop(path), path.removesuffix("/kernel")
        for name, leaf in quantized_shapes(kernel.shape, kind).items():
            place = _like(kernel.sharding, leaf.shape)
            flat[f"{module}/{name}"] = _placed(leaf.shape, leaf.dtype, place)
    return traverse_util.unflatten_dict(flat, sep="/")


def _placed(shape: Any, dtype: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _like(kernel: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a kernel, without splits that do not divide this shape."""
    whole = (*kernel.spec, *(None,) * (len(shape) - len(kernel.spec)))

    def kept(axes: Any, size: int) -> Any:
        named = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(kernel.mesh.shape[axis] for axis in named)
        return None if size % parts else axes

    return NamedSharding(kernel.mesh, P(*map(kept, whole, shape)))
