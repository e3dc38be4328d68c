"""Bytes of arrays on one device of a mesh."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from grpo_jax.parallel.collectives import whole_over_fsdp


def share_bytes(shapes: PyTree, places: PyTree, *, dtype: str | None = None) -> int:
    """Bytes of one device's share of the arrays, in a dtype or in their own."""

    def part(leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> int:
        own = leaf.dtype if dtype is None else jnp.dtype(dtype)
        return math.prod(place.shard_shape(leaf.shape)) * own.itemsize

    return sum(jax.tree.leaves(jax.tree.map(part, shapes, places)))


def whole_bytes(shapes: PyTree, places: PyTree, *, dtype: str | None = None) -> int:
    """The same when they are gathered over fsdp."""
    return share_bytes(shapes, jax.tree.map(whole_over_fsdp, places), dtype=dtype)
