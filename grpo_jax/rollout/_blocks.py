"""Logits in blocks of the vocabulary: where to find a token in two steps, cheaply.

An array as large as the logits is worth avoiding: with many rows it is as large as a
good part of the model.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from grpo_jax.models.products import product_by_rows

# Entries summed together before the search, as many as a TPU has lanes. Two levels keep
# the sums short and exact.
BLOCK = 128


def logits(
    hidden: Float[Array, "R D"], head: Float[Array, "V D"]
) -> Float[Array, "R b n"]:
    """The product with the head, in blocks; the last one is filled up with zeros."""
    # A CPU would first rearrange a head in blocks. A TPU would rearrange the logits of
    # many rows, which is more than it reads of the head.
    return lax.platform_dependent(
        hidden,
        head,
        tpu=_of_blocks if _splits_evenly(head) else _of_rows,
        default=_of_rows,
    )


def _of_blocks(
    hidden: Float[Array, "R D"], head: Float[Array, "V D"]
) -> Float[Array, "R b n"]:
    blocks = head.reshape(-1, BLOCK, head.shape[1])
    return jnp.einsum("rd,bnd->rbn", hidden, blocks, preferred_element_type=jnp.float32)


def _of_rows(
    hidden: Float[Array, "R D"], head: Float[Array, "V D"]
) -> Float[Array, "R b n"]:
    return in_blocks(product_by_rows(hidden, head, dtype=jnp.float32))


def _splits_evenly(head: Float[Array, "V D"]) -> bool:
    """Whether each device of a vocabulary that is split has whole blocks of it."""
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    return len(head) % (BLOCK * tensor) == 0


def in_blocks(logits: Float[Array, "R V"]) -> Float[Array, "R b n"]:
    """Logits in blocks, of which the last one is filled up with zeros."""
    missing = -logits.shape[-1] % BLOCK
    return jnp.pad(logits, ((0, 0), (0, missing))).reshape(len(logits), -1, BLOCK)


def filled(logits: Float[Array, "R b n"], size: int) -> Float[Array, "R b n"]:
    """Logits of which those from `size` on are -inf: they are no tokens."""
    filled_up = logits.shape[1] * BLOCK
    if size == filled_up:
        return logits
    place = jnp.arange(filled_up).reshape(1, -1, BLOCK)
    return jnp.where(place < size, logits, -jnp.inf)


def cut(
    weights: Float[Array, "R b n"],
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> Float[Array, "R b n"] | None:
    """The weights with those outside the chosen sets at 0, where the largest is 1.

    None if nothing is cut.
    """
    flat, bounds = weights.reshape(len(weights), -1), []
    if top_k is not None and top_k < flat.shape[-1]:
        bounds.append(lax.top_k(flat, top_k)[0][:, -1:])
        flat = jnp.where(flat >= bounds[0], flat, 0.0)
    if top_p is not None and top_p < 1.0:
        ordered = -jnp.sort(-flat, axis=-1)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        kept = before < top_p * jnp.sum(ordered, axis=-1, keepdims=True)
        ordered = jnp.where(kept, ordered, jnp.inf)
        bounds.append(jnp.min(ordered, axis=-1, keepdims=True))
    if min_p is not None:
        bounds.append(jnp.full((len(flat), 1), min_p, flat.dtype))
    if not bounds:
        return None
    least = functools.reduce(jnp.maximum, bounds)
    return jnp.where(weights >= least[..., None], weights, 0.0)


def take_block(
    scores: Float[Array, "R b n"], block: Int[Array, " R"]
) -> Float[Array, "R n"]:
    """One block of each row."""

    def gathered(scores: Array, block: Array) -> Array:
        return jnp.take_along_axis(scores, block[:, None, None], axis=1)[:, 0]

    return lax.platform_dependent(scores, block, tpu=_by_mask, default=gathered)


def _by_mask(
    scores: Float[Array, "R b n"], block: Int[Array, " R"]
) -> Float[Array, "R n"]:
    """`take_block` without a gather, for which a TPU would rearrange all scores."""
    chosen = jnp.arange(scores.shape[1])[None, :] == block[:, None]
    return jnp.max(jnp.where(chosen[..., None], scores, -jnp.inf), axis=1)


def search(
    weights: Float[Array, "R M"], target: Float[Array, " R"]
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """Where the running sum of the weights passes the target, and what is left of it.

    Only entries with weight are found. Sums made in parallel, as on a GPU, may rise by
    rounding at an entry of weight 0, and a target may be rounded up to the total, which
    is passed nowhere: the last entry with weight is the answer then.
    """
    running = jnp.cumsum(weights, axis=-1)
    held = weights > 0.0
    passed = held & (running > target[:, None])
    positions = jnp.arange(weights.shape[-1], dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(held, positions, 0), axis=-1)
    first = jnp.argmax(passed, axis=-1).astype(jnp.int32)
    index = jnp.where(jnp.any(passed, axis=-1), first, last)
    before = jnp.take_along_axis(running, jnp.maximum(index - 1, 0)[:, None], axis=-1)
    return index, target - jnp.where(index > 0, before[:, 0], 0.0)
