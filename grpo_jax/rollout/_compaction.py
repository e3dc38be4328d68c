"""Compaction of the group sampler's batch: fewer slots as completions end.

A layout is M groups of W slots. The completions of a prompt fill whole groups, so that
they still share its keys and values. Prompts are split into parts, one per device of
the batch, and completions stay in their part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int, Shaped

# Each layout is a loop that is compiled, which takes 8 s on a GPU. It pays only in a
# rollout of many tokens, and below an eighth of the slots further halving gains little.
_TOKENS_PER_LAYOUT = 16
_MOST_LAYOUTS = 4
# With fewer slots a token takes no less time: the weights must be read all the same.
_FEWEST_SLOTS = 16


class Layout(NamedTuple):
    """`groups` times `width` slots, in `parts` equal parts of groups."""

    groups: int
    width: int
    parts: int = 1


class SlotAssignment(struct.PyTreeNode):
    """Whose completion each slot holds, part by part.

    Attributes:
      prompts: ``[S, m]`` the prompt of each group, numbered within its part.
      samples: ``[S, m, W]`` the number of the slot's completion among its prompt's; an
        empty slot has the group size, one more than the last number.
      num_prompts: of all parts, N.
      group_size: G.
    """

    prompts: Int[Array, "S m"]
    samples: Int[Array, "S m W"]
    num_prompts: int = struct.field(pytree_node=False)
    group_size: int = struct.field(pytree_node=False)

    @property
    def index(self) -> Int[Array, "M W"]:
        """Which of all N x G completions each slot holds; N x G where it is empty."""
        parts, groups, width = self.samples.shape
        first = jnp.arange(parts)[:, None] * (self.num_prompts // parts)
        index = (first + self.prompts)[..., None] * self.group_size + self.samples
        empty = self.num_prompts * self.group_size
        index = jnp.where(self.samples < self.group_size, index, empty)
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


def first_assignment(layout: Layout) -> SlotAssignment:
    """Every completion in the slot of its own prompt and number."""
    groups, width, parts = layout
    each = (parts, groups // parts)
    return SlotAssignment(
        prompts=jnp.broadcast_to(jnp.arange(each[1])[None, :], each),
        samples=jnp.broadcast_to(jnp.arange(width)[None, None, :], (*each, width)),
        num_prompts=groups,
        group_size=width,
    )


def fit(
    assignment: SlotAssignment, finished: Bool[Array, "M W"], layout: Layout
) -> Bool[Array, ""]:
    """Whether the completions that have not finished fit into a layout."""

    def needed(prompts: Array, alive: Array) -> Array:
        # Groups are not shared: each prompt needs whole ones for its completions.
        own = _counts(jnp.where(alive, prompts[:, None], -1), assignment)
        return jnp.sum(-(-own // layout.width))

    alive = ~finished.reshape(assignment.samples.shape)
    groups = jax.vmap(needed)(assignment.prompts, alive)
    # Every part must fit on its own, for no completion leaves its device.
    return jnp.all(groups <= layout.groups // layout.parts)


def compact(
    assignment: SlotAssignment, finished: Bool[Array, "M W"], layout: Layout
) -> tuple[SlotAssignment, tuple[Int[Array, "S m"], Int[Array, "S m W"]]]:
    """Move the completions that have not finished into a layout that they `fit`.

    Three prompts A, B and C in 3 groups of 4 slots go to 3 groups of 2 (a dot has
    finished or is empty)::

        old slot     0  1  2  3    4  5  6  7    8  9 10 11
        holds       A0  . A2 A3 |  .  .  .  . |  . C1  .  .

        by prompt   A0 A2 A3 C1    from old slots 0 2 3 9
        rank         0  1  2  0    among the completions of the prompt
        new slot     0  1  2  4    = (first group of the prompt) * 2 + rank

        new slot     0  1    2  3    4  5
        holds       A0 A2 | A3  . | C1  .

    A has three completions and takes groups 0 and 1, B none, so C begins at group 2.

    Returns:
      The new assignment and, counted within their part, the old group that has the
      prompt of each new group (0, 0, 2 above) and the old slot of each new slot
      (0, 2, 3, any, 9, any). Groups and slots without a completion may name any.
    """
    each, width = layout.groups // layout.parts, layout.width
    count = assignment.num_prompts // layout.parts

    def move(prompts: Array, samples: Array, alive: Array) -> tuple[Array, ...]:
        # Number `count` stands for no prompt: a stable sort puts these slots last.
        prompt = jnp.where(alive, prompts[:, None], count).reshape(-1)
        old_slots = jnp.argsort(prompt, stable=True)
        prompt = prompt[old_slots]
        own = _counts(prompt, assignment)
        groups = -(-own // width)
        # Exclusive sums; the appended entry is for the number that is no prompt.
        before = lambda x: jnp.append(jnp.cumsum(x) - x, 0)  # noqa: E731
        rank = jnp.arange(prompt.size) - before(own)[prompt]
        new_slots = before(groups)[prompt] * width + rank
        # A slot beyond the last one is dropped by the scatters below.
        new_slots = jnp.where(prompt < count, new_slots, each * width)
        source = jnp.zeros(each * width, old_slots.dtype)
        source = source.at[new_slots].set(old_slots, mode="drop")
        held = jnp.zeros(each * width, bool).at[new_slots].set(True, mode="drop")
        sample = jnp.where(held, samples.reshape(-1)[source], assignment.group_size)
        # Prompt of each new group: the first whose groups reach beyond its number.
        new = jnp.searchsorted(jnp.cumsum(groups), jnp.arange(each), side="right")
        new = jnp.minimum(new, count - 1).astype(prompts.dtype)
        # After an earlier move a prompt may have several groups: any of them will do.
        last = prompts.shape[0] - 1
        holders = jnp.full(count, last).at[prompts].min(jnp.arange(last + 1))
        shape = (each, width)
        return new, sample.reshape(shape), holders[new], source.reshape(shape)

    alive = ~finished.reshape(assignment.samples.shape)
    moved = jax.vmap(move)(assignment.prompts, assignment.samples, alive)
    prompts, samples, groups, slots = moved
    return assignment.replace(prompts=prompts, samples=samples), (groups, slots)


def _counts(prompts: Int[Array, "..."], assignment: SlotAssignment) -> Int[Array, " n"]:
    """How often each prompt of a part is named; other numbers do not count."""
    parts = assignment.samples.shape[0]
    numbers = jnp.arange(assignment.num_prompts // parts)
    return jnp.sum(prompts.reshape(-1)[:, None] == numbers[None, :], axis=0)


def put_back(
    every: Shaped[Array, "N G ..."],
    held: Shaped[Array, "M W ..."],
    index: Int[Array, "M W"],
) -> Shaped[Array, "N G ..."]:
    """The values of all completions, updated by those that the slots hold."""
    flat = every.reshape(-1, *every.shape[2:])
    new = held.reshape(-1, *held.shape[2:])
    # An empty slot has an index beyond the last completion: its values are dropped.
    return flat.at[index.reshape(-1)].set(new, mode="drop").reshape(every.shape)


def take(
    every: Shaped[Array, "N G ..."], index: Int[Array, "M W"]
) -> Shaped[Array, "M W ..."]:
    """The values of the slots out of those of all completions; any in an empty slot."""
    flat = every.reshape(-1, *every.shape[2:])
    return flat[jnp.where(index < len(flat), index, 0)]
