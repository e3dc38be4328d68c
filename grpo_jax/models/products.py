"""Products with kernels that are stored as [out, in], for few rows at a time."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product_by_rows(
    x: Float[Array, "R I"],
    kernel: Float[Array, "O I"],
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "R O"]:
    """Returns x W for a kernel W that is stored as [out, in], as `dtype`.

    On a CPU W is the left factor. As the right one XLA would rearrange all of it for
    every product, which with few rows takes up to half of the time. Without the barrier
    XLA would exchange the factors again.
    """

    def left(x: Float[Array, "R I"], kernel: Float[Array, "O I"]) -> Array:
        return jax.lax.optimization_barrier(product(kernel, x.T)).T

    def right(x: Float[Array, "R I"], kernel: Float[Array, "O I"]) -> Array:
        return product(x, kernel.T)

    product = functools.partial(jnp.dot, preferred_element_type=dtype)
    return jax.lax.platform_dependent(x, kernel, cpu=left, default=right)
