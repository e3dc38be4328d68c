"""Gathering over the fsdp axis.

Parameters and batch are split over the same fsdp devices, so a product of both gathers
one of them. The layers' parameters are gathered one layer at a time, as they are used.
The functions here are for the two exceptions: the head, and the sampler's parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree


def matmul_over_fsdp(
    score: Callable[..., PyTree],
    hidden: Float[Array, "N ... D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "N ..."],
    **options: Any,
) -> PyTree:
    """`score(hidden, head, tokens, **options)`, whose product gathers hidden states.

    They are gathered over fsdp, and the vocabulary is split over fsdp and tensor. Then
    no device holds the whole head or a whole gradient of it. XLA alone would gather the
    head for each chunk of tokens and sum its gradient over all devices for each, which
    moved more in every program that was compiled. What has one number per token, as all
    that `score` returns, is on each device: otherwise every chunk would gather its own.
    The gradient of the hidden states is split over fsdp again.

    Without a mesh, and if the vocabulary does not divide, all arrays stay as they are.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    if shape.get("fsdp", 1) == 1:
        return score(hidden, head, tokens, **options)
    if moves_head(head.shape[1], fsdp=shape["fsdp"], tensor=shape["tensor"]):
        return score(hidden, head, tokens, **options)
    head = lax.with_sharding_constraint(head, P(None, ("tensor", "fsdp")))
    scores = score(_gathered(hidden), head, _whole(tokens), **options)
    return jax.tree.map(_whole, scores)


def _whole(x: Array) -> Array:
    return lax.with_sharding_constraint(x, P("data"))


@jax.custom_vjp
def _gathered(hidden: Float[Array, "N ... D"]) -> Float[Array, "N ... D"]:
    """The same, gathered over fsdp; its gradient is split over fsdp again.

    That gradient is a sum over the devices, which split the vocabulary. Each needs it
    for its own tokens alone. The gradient of a plain constraint would be the sum for
    all tokens on each, twice the bytes.
    """
    return _whole(hidden)


def _gathered_forward(hidden: Array) -> tuple[Array, None]:
    return _whole(hidden), None


def _gathered_backward(_: None, gradient: Array) -> tuple[Array]:
    return (lax.with_sharding_constraint(gradient, P(("data", "fsdp"))),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def moves_head(vocabulary: int, *, fsdp: int, tensor: int) -> bool:
    """Whether `matmul_over_fsdp` leaves all as it is, so that the head is gathered."""
    return vocabulary % (fsdp * tensor) != 0


def split_over_fsdp(tree: PyTree) -> bool:
    """Whether the fsdp axis splits an array; False if they are traced (unknown)."""

    def split(leaf: Array) -> bool:
        if isinstance(leaf, Tracer):
            return False
        sharding = leaf.sharding
        return isinstance(sharding, NamedSharding) and (
            sharding.shard_shape(leaf.shape)
            != whole_over_fsdp(sharding).shard_shape(leaf.shape)
        )

    return any(map(split, jax.tree.leaves(tree)))


def whole_over_fsdp(sharding: NamedSharding) -> NamedSharding:
    """The sharding without its splits over fsdp; those over other axes stay."""

    def other(entry: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(entry, tuple):
            return tuple(axis for axis in entry if axis != "fsdp") or None
        return None if entry == "fsdp" else entry

    return NamedSharding(sharding.mesh, P(*map(other, sharding.spec)))
