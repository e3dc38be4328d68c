"""Products with quantized kernels, and the plain kernels that they stand for."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.quantized import NF4


def dequantized(
    codes: Int[Array, "..."], scale: Float[Array, "..."], dtype: Any
) -> Float[Array, "..."]:
    """Returns the kernels [..., in, out] of codes and scale, computed in float32."""
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
    """Returns x W with a quantized W, whose gradient is that of x alone.

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
    """Returns the values of codes below 16, chosen by one bit after the other.

    A vector unit does that for many codes at once. It would read a table one by one.
    """
    values: list[Any] = [*NF4]
    for bit in range(4):
        odd = (codes >> bit & 1) == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(odd, second, first) for first, second in pairs]
    return values[0]
