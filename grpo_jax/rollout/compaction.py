"""Slots of the group sampler: fewer of them as completions end.

A layout is M groups of W slots; the completions of a prompt fill whole groups, so that
they go on to share its keys and values. Prompts are split into parts, one per device
that holds some, and completions stay in theirs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

# Layouts of a rollout. Each is compiled, which on a GPU takes 8 s: it must have many
# tokens to save. Halving beyond an eighth gains little.
_TOKENS_PER_LAYOUT = 16
_MOST_LAYOUTS = 4
# Slots below which a token takes the same time however few there are.
_FEWEST_SLOTS = 16


class Layout(NamedTuple):
    """`groups` times `width` slots, in `parts` equal parts of groups."""

    groups: int
    width: int
    parts: int = 1


class Places(struct.PyTreeNode):
    """Whose completion each slot holds, part by part.

    Attributes:
      prompts: ``[S, m]`` the number of each group's prompt among those of its part.
      samples: ``[S, m, W]`` the number of the slot's completion among its prompt's; in
        a slot that holds none, the size of a group, which is one too many.
      num_prompts: of all parts, N.
      group_size: G.
    """

    prompts: Int[Array, "S m"]
    samples: Int[Array, "S m W"]
    num_prompts: int = struct.field(pytree_node=False)
    group_size: int = struct.field(pytree_node=False)

    @property
    def index(self) -> Int[Array, "M W"]:
        """Which of all N x G completions each slot holds; N x G where it holds none."""
        parts, groups, width = self.samples.shape
        first = jnp.arange(parts)[:, None] * (self.num_prompts // parts)
        index = (first + self.prompts)[..., None] * self.group_size + self.samples
        none = self.num_prompts * self.group_size
        index = jnp.where(self.samples < self.group_size, index, none)
        return index.reshape(parts * groups, width)


def layouts(
    num_prompts: int, group_size: int, *, max_new_tokens: int, parts: int
) -> list[Layout]:
    """The layouts that a rollout goes through, each with half the slots of the last.

    First the width is halved, then the number of groups. Short rollouts have fewer.
    """
    chosen = [Layout(num_prompts, group_size, parts)]
    while len(chosen) < min(_MOST_LAYOUTS, 1 + max_new_tokens // _TOKENS_PER_LAYOUT):
        groups, width, _ = chosen[-1]
        if width > 1:
            width = -(-width // 2)
        else:
            groups = -(-groups // (2 * parts)) * parts
        smaller = Layout(groups, width, parts)
        if groups * width < _FEWEST_SLOTS * parts or smaller == chosen[-1]:
            break
        chosen.append(smaller)
    return chosen


def first_places(layout: Layout) -> Places:
    """Every completion in the slot of its own prompt and number."""
    groups, width, parts = layout
    each = (parts, groups // parts)
    return Places(
        prompts=jnp.broadcast_to(jnp.arange(each[1])[None, :], each),
        samples=jnp.broadcast_to(jnp.arange(width)[None, None, :], (*each, width)),
        num_prompts=groups,
        group_size=width,
    )


def fit(
    places: Places, finished: Bool[Array, "M W"], layout: Layout
) -> Bool[Array, ""]:
    """Whether the completions that have not finished fit into a layout."""

    def groups(prompts: Array, alive: Array) -> Array:
        counts = _counts(jnp.where(alive, prompts[:, None], -1), places)
        return jnp.sum(-(-counts // layout.width))

    alive = ~finished.reshape(places.samples.shape)
    needed = jax.vmap(groups)(places.prompts, alive)
    return jnp.all(needed <= layout.groups // layout.parts)


def move_together(
    places: Places, finished: Bool[Array, "M W"], layout: Layout
) -> tuple[Places, tuple[Int[Array, "S m"], Int[Array, "S m W"]]]:
    """The completions that have not finished, in the slots of a layout they `fit`.

    Returns:
      The new places, and where they come from: the old group that has the prompt of
      each new group, and the old slot of each new slot, counted within their part.
      Where there is no completion they are any.
    """
    each, width = layout.groups // layout.parts, layout.width

    def move(prompts: Array, samples: Array, alive: Array) -> tuple[Array, ...]:
        count = places.num_prompts // layout.parts
        # Slots ordered by prompt, those without a completion behind all prompts.
        prompt = jnp.where(alive, prompts[:, None], count).reshape(-1)
        slots = jnp.argsort(prompt, stable=True)
        prompt = prompt[slots]
        counts = _counts(prompt, places)
        groups = -(-counts // width)
        padded = lambda x: jnp.append(jnp.cumsum(x) - x, 0)  # noqa: E731
        rank = jnp.arange(slots.size) - padded(counts)[prompt]
        to = (padded(groups)[prompt] + rank // width) * width + rank % width
        to = jnp.where(prompt < count, to, each * width)
        old_slots = jnp.zeros(each * width, slots.dtype).at[to].set(slots, mode="drop")
        held = jnp.zeros(each * width, bool).at[to].set(True, mode="drop")
        own = jnp.where(held, samples.reshape(-1)[old_slots], places.group_size)
        new = jnp.searchsorted(jnp.cumsum(groups), jnp.arange(each), side="right")
        new = jnp.minimum(new, count - 1).astype(prompts.dtype)
        last = prompts.shape[0] - 1
        holders = jnp.full(count, last).at[prompts].min(jnp.arange(last + 1))
        shape = (each, width)
        return new, own.reshape(shape), holders[new], old_slots.reshape(shape)

    alive = ~finished.reshape(places.samples.shape)
    moved = jax.vmap(move)(places.prompts, places.samples, alive)
    prompts, samples, holders, old_slots = moved
    return places.replace(prompts=prompts, samples=samples), (holders, old_slots)


def _counts(prompts: Int[Array, "..."], places: Places) -> Int[Array, " n"]:
    """How often each prompt of a part is named; other numbers do not count."""
    numbers = jnp.arange(places.num_prompts // places.samples.shape[0])
    return jnp.sum(prompts.reshape(-1)[:, None] == numbers[None, :], axis=0)
