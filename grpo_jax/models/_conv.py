"""Causal convolutions of each channel over a few tokens, and their states."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Accelerators round the factors of a product unless told otherwise.
_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def with_state(
    channels: Float[Array, "R S K w"],
    recent: Float[Array, "R K c-1 w"],
    counts: Int[Array, " R"] | None,
) -> tuple[Float[Array, "R S+c-1 K w"], Float[Array, "R K c-1 w"]]:
    """Returns the tokens behind those of the state, and the state after them.

    Only the first `counts` tokens of a row are real. None: all are.
    """
    rows, length = channels.shape[:2]
    if counts is None:
        counts = jnp.full(rows, length)
    before = recent.swapaxes(1, 2).astype(channels.dtype)
    tokens = jnp.concatenate([before, channels], axis=1)
    # Token s is at c - 1 + s, so what ends with the last real one starts at its count.
    last = jax.vmap(lambda x, at: lax.dynamic_slice_in_dim(x, at, before.shape[1]))
    return tokens, last(tokens, counts).swapaxes(1, 2).astype(recent.dtype)


def convolved_in_rows(
    channels: Float[Array, "R S K w"],
    recent: Float[Array, "R K c-1 w"],
    kernel: Float[Array, "c K w"],
    index: Int[Array, "R S"],
) -> Float[Array, "R S K w"]:
    """Returns the convolution of sequences behind each other, float32.

    Each sequence of a row starts from the row's state, and sees nothing of the one
    before. `index` is a token's number in its sequence.
    """
    before = recent.swapaxes(1, 2).astype(jnp.float32)
    nothing = jnp.zeros_like(before)
    own = jnp.concatenate([nothing, channels], axis=1)
    mixed = convolved(own, kernel, index=index)
    # What the state adds to the first tokens of each sequence.
    added = convolved(jnp.concatenate([before, nothing], axis=1), kernel)
    first = jax.nn.one_hot(index, len(kernel) - 1)  # zeros for all that come later
    return mixed + _product("rsj,rjkw->rskw", first, added)


def convolved(
    tokens: Float[Array, "R S+c-1 K w"],
    kernel: Float[Array, "c K w"],
    *,
    index: Int[Array, "R S"] | None = None,
) -> Float[Array, "R S K w"]:
    """Returns sum_i kernel_i x_(s - c + 1 + i), float32.

    With `index` of the own sequence only, which has `index` tokens before this one.
    """
    length, back = tokens.shape[1] - len(kernel) + 1, len(kernel) - 1
    wide, kernel = tokens.astype(jnp.float32), kernel.astype(jnp.float32)

    def term(i: int, tap: Array) -> Float[Array, "R S K w"]:
        x = wide[:, i : i + length]
        if index is not None:
            x = jnp.where((index >= back - i)[..., None, None], x, 0.0)
        return x * tap

    taps = enumerate(kernel[:, None, None])
    return sum((term(i, tap) for i, tap in taps), start=jnp.zeros(()))
