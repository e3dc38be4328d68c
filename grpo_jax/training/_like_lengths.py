"""Microbatches of completions of like length, each computed up to its longest.

They serve where completions cannot share rows to advantage (`models/packing.py`): small
microbatches, groups that differ among each other, models that have no `score_rows`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from grpo_jax.parallel import mesh as meshes

T = TypeVar("T")

# Narrower forms of up to so many tokens are not worth their compilation.
_SHORTEST = 32


class LikeLengths(struct.PyTreeNode):
    """An order of completions, and the widths of which a microbatch takes its own.

    Attributes:
      order: which completion comes at each place, among those of the device's prompts
        in a minibatch. Groups stay together.
      widths: numbers of tokens, rising; the last is T.
      shards: devices that split the prompts.
    """

    order: Int[Array, "N G"]
    widths: tuple[int, ...] = struct.field(pytree_node=False)
    shards: int = struct.field(pytree_node=False)

    def sort(self, per_prompt: PyTree, per_completion: PyTree) -> tuple[PyTree, PyTree]:
        """Arrays ``[N, ...]`` and ``[N, G, ...]`` in this order."""
        order = self._of_shards()
        group = self.order.shape[1]
        prompts = jax.tree.map(_taken(order[:, ::group] // group), per_prompt)
        return prompts, self._completions(order, per_completion)

    def unsort(self, per_completion: Float[Array, "N G T"]) -> Float[Array, "N G T"]:
        """An array of this order as it was before."""
        return self._completions(jnp.argsort(self._of_shards()), per_completion)

    def _of_shards(self) -> Int[Array, "D C"]:
        return self.order.reshape(self.shards, -1)

    def _completions(self, order: Int[Array, "D C"], tree: T) -> T:
        def moved(leaf: Array) -> Array:
            flat = leaf.reshape(-1, *leaf.shape[2:])
            return _taken(order)(flat).reshape(leaf.shape)

        return jax.tree.map(moved, tree)


def _taken(order: Int[Array, "D C"]) -> Callable[[Array], Array]:
    """Rows in an order within each shard, so that none moves to another device."""

    def take(leaf: Array) -> Array:
        parts = leaf.reshape(len(order), -1, *leaf.shape[1:])
        return jax.vmap(lambda rows, at: rows[at])(parts, order).reshape(leaf.shape)

    return take


def at_own_width(
    function: Callable[[int], T], mask: Bool[Array, "n G T"], widths: tuple[int, ...]
) -> T:
    """`function` of the least width that has all tokens under the mask.

    All results must have the same shapes. Only the one that is chosen is computed.
    """
    if len(widths) < 2:
        return function(mask.shape[2])
    longest = jnp.max(jnp.where(mask, jnp.arange(mask.shape[2]) + 1, 0))
    chosen = jnp.searchsorted(jnp.asarray(widths[:-1]), longest)
    return lax.switch(chosen, [lambda w=width: function(w) for width in widths])


def like_lengths(
    mask: Bool[np.ndarray, "N G T"],
    prompt_tokens: int,
    *,
    minibatches: int,
    microbatch_size: int | None,
    shards: int,
) -> tuple[LikeLengths | None, float]:
    """An order for microbatches of like length, and their share of the time.

    All processes call this together, each with its own prompts.

    Args:
      prompt_tokens: P, to which prompts are padded.
      minibatches: updates among which the prompts are dealt.
      microbatch_size: completions that an update holds at once; None for all.
      shards: devices that split the prompts, over all processes.

    Returns:
      The order on the host, and the tokens that are then computed over those of whole
      widths; None and 1 where no microbatch could be narrower.
    """
    count, group, width = mask.shape
    widths = tuple(w for w in (width // 4, width // 2) if w >= _SHORTEST) + (width,)
    own_shards = max(shards // jax.process_count(), 1)
    update = count * jax.process_count() * group // minibatches
    size = min(microbatch_size or update, update)
    if len(widths) < 2 or size == update:
        return None, 1.0
    longest = np.where(mask, np.arange(width) + 1, 0).max(axis=2)
    if size < group:
        within = np.argsort(longest, axis=1, kind="stable")
        sorted_lengths = np.take_along_axis(longest, within, axis=1)
        parts = meshes.gather_rows(sorted_lengths.reshape(-1, size)[:, -1])
        order = within + group * _local(count, own_shards, minibatches)[:, None]
    else:
        each = size // group // shards
        ranked, order = _by_longest(longest, each, own_shards, minibatches)
        # A microbatch has the same turn on all devices.
        parts = meshes.gather_rows(ranked).max(axis=0)
    tokens = max(size // group, 1) * prompt_tokens
    taken = np.asarray(widths)[np.searchsorted(widths[:-1], parts)]
    share = np.mean(tokens + size * taken) / (tokens + size * width)
    order: Any = order.astype(np.int32)
    return LikeLengths(order, widths, shards), float(share)


def _local(count: int, shards: int, minibatches: int) -> Int[np.ndarray, " N"]:
    """The number of each prompt among those of its shard and minibatch."""
    return np.arange(count) % (count // shards) // minibatches


def _by_longest(
    longest: Int[np.ndarray, "N G"], each: int, shards: int, minibatches: int
) -> tuple[Int[np.ndarray, "D m"], Int[np.ndarray, "N G"]]:
    """The longest of each turn on each shard, and the order that makes them alike.

    Prompt i of a shard is in minibatch i mod M, and there in microbatch j mod C for its
    j-th: so those of like length are put C apart.
    """
    count, group = longest.shape
    # By shard, minibatch, and prompt of both.
    of_group = longest.max(axis=1).reshape(shards, -1, minibatches).swapaxes(1, 2)
    ranks = np.argsort(of_group, axis=2, kind="stable")
    turns = ranks.reshape(*ranks.shape[:2], -1, each)
    most = np.take_along_axis(of_group, ranks, axis=2).reshape(turns.shape).max(axis=3)
    dealt = turns.swapaxes(2, 3).reshape(ranks.shape).swapaxes(1, 2).reshape(count)
    return most.reshape(shards, -1), dealt[:, None] * group + np.arange(group)
