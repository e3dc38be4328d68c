"""The layouts of prompts and own tokens in one array, and the ways between them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def prompt_positions(tokens: Int[Array, "N P"]) -> Int[Array, "N P"]:
    """Returns the position of each token of prompts."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)


def at_last(x: Float[Array, "N P D"], lengths: Int[Array, " N"]) -> Float[Array, "N D"]:
    """Returns the rows of x at each prompt's last real token."""
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]


def join(prompt: Array, own: Array) -> Array:
    """Returns [A, P, ...] and [A, R, S, ...] as one row [A, P + R * S, ...]."""
    a, r, s, *rest = own.shape
    return jnp.concatenate([prompt, own.reshape(a, r * s, *rest)], axis=1)


def part(row: Array, own_shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns the two arrays that `join` made one of."""
    a, r, s = own_shape
    cut = row.shape[1] - r * s
    return row[:, :cut], row[:, cut:].reshape(a, r, s, *row.shape[2:])


def of_prompts(x: Float[Array, "N P K h"]) -> Float[Array, "N K P h"]:
    """Returns keys or values of prompts in the layout of `Prefix`."""
    return x.transpose(0, 2, 1, 3)


def of_owners(x: Shaped[Array, "N ..."], owner: Int[Array, "A R"]) -> Array:
    """Returns for each row what belongs to its prompt, [A * R, ...].

    The N prompts lie in A parts; a row's is counted within its part.
    """
    parts = x.reshape(len(owner), -1, *x.shape[1:])
    # Batched over the parts: no row reads from another device.
    rows = jax.vmap(lambda x, at: x.at[at].get(mode="clip"))(parts, owner)
    return rows.reshape(-1, *x.shape[1:])
