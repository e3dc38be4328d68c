"""Frozen kernels in 8 or 4 bits: how they are stored, and products with them.

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
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

Kind = Literal["int8", "nf4"]
KINDS: tuple[Kind, ...] = get_args(Kind)

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


def is_quantized(path: str) -> bool:
    """Whether a parameter, as in "layers/attn/q/kernel", is among those quantized."""
    return path.startswith("layers/") and path.endswith("/kernel")


def has_quantized(params: PyTree) -> bool:
    """Whether some kernels of parameters, or of collections of them, are quantized."""
    flat: dict[Any, Any] = traverse_util.flatten_dict(params)
    return any(path[-1] == "codes" for path in flat)


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
    for path in [path for path in flat if is_quantized(path)]:
        kernel, module = flat.pop(path), path.removesuffix("/kernel")
        for name, leaf in quantized_shapes(kernel.shape, kind).items():
            place = _like(kernel.sharding, leaf.shape)
            flat[f"{module}/{name}"] = _placed(leaf.shape, leaf.dtype, place)
    return traverse_util.unflatten_dict(flat, sep="/")


def dequantized_params(params: PyTree, dtype: str) -> PyTree:
    """Parameters with plain kernels in the place of quantized ones."""
    return _with_plain(params, lambda codes, scale: dequantized(codes, scale, dtype))


def plain_shardings(places: PyTree) -> PyTree:
    """The shardings of what `dequantized_params` returns, from those of its input."""
    return _with_plain(places, lambda codes, scale: codes)


def dequantized(
    codes: Int[Array, "..."], scale: Float[Array, "..."], dtype: Any
) -> Float[Array, "..."]:
    """The kernels [..., in, out] that codes and scale stand for, made in float32."""
    *stack, blocks, outputs = scale.shape
    if codes.dtype == jnp.uint8:
        # Shifts of a broadcast array, for a concatenation would be written to memory.
        pairs = codes[..., None, :]
        shifts = jnp.array([4, 0], jnp.uint8).reshape(*(1,) * len(stack), 1, 2, 1)
        values = _nf4_values(pairs >> shifts & 15)
    else:
        values = codes.astype(jnp.float32)
    parts = values.reshape(*stack, blocks, -1, outputs)
    whole = parts * scale[..., :, None, :]
    return whole.reshape(*stack, -1, outputs).astype(dtype)


@jax.custom_vjp
def frozen_product(
    x: Float[Array, "R I"], codes: Int[Array, "i O"], scale: Float[Array, "b O"]
) -> Float[Array, "R O"]:
    """x W with a quantized W, whose gradient is that of x alone.

    The backward pass dequantizes again. A plain product would keep W for it, of all
    layers at once.
    """
    return x @ dequantized(codes, scale, x.dtype)


def _forward(x: Array, codes: Array, scale: Array) -> tuple[Array, tuple]:
    return frozen_product(x, codes, scale), (codes, scale)


def _backward(kept: tuple, gradient: Array) -> tuple[Array, None, None]:
    codes, scale = kept
    return gradient @ dequantized(codes, scale, gradient.dtype).T, None, None


frozen_product.defvjp(_forward, _backward)


def _nf4_values(codes: Array) -> Array:
    """The values of codes below 16, chosen by one bit after the other.

    A vector unit does that for many codes at once. It would read a table one by one.
    """
    values: list[Any] = [*NF4]
    for bit in range(4):
        odd = (codes >> bit & 1) == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(odd, second, first) for first, second in pairs]
    return values[0]


def _with_plain(tree: PyTree, kernel: Callable[[Any, Any], Any]) -> PyTree:
    flat: dict[Any, Any] = traverse_util.flatten_dict(tree)
    for *module, name in [*flat]:
        if name == "codes":
            stored = (flat.pop((*module, leaf)) for leaf in ("codes", "scale"))
            flat[*module, "kernel"] = kernel(*stored)
    return traverse_util.unflatten_dict(flat)


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
