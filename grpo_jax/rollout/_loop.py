"""The loop over tokens: all slots advance together, and free ones are refilled.

It is compiled for the few sizes that occur. The cache is donated and written in place.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from grpo_jax.models.cache import Cache, PromptBlock, Slots
from grpo_jax.models.protocol import SlotDecoder
from grpo_jax.rollout._forced import Forced
from grpo_jax.rollout._programs import by_batch
from grpo_jax.rollout._settings import GroupSettings
from grpo_jax.rollout.draw import draw


class Held(struct.PyTreeNode):
    """What each slot, or each place of the queue, holds.

    Attributes:
      ticket: what identifies its completion to the host; -1 for none.
      row: the row of the block of prompts with its prompt.
      prompt_lengths: tokens of its prompt.
      keys: the data of its key, from which those of its tokens are folded.
      forced: what it gets without a draw; None for nothing anywhere.
    """

    ticket: Int[Array, "A S"]
    row: Int[Array, "A S"]
    prompt_lengths: Int[Array, "A S"]
    keys: UInt32[Array, "A S *k"]
    forced: Forced | None = None


class Start(struct.PyTreeNode):
    """Where a loop over tokens begins, and when it returns.

    Attributes:
      held: what each slot holds.
      fed: its last token.
      index: how many tokens its completion has.
      column: the column of the ring that is written next.
      queue: completions that wait for a slot, in order; None for none anywhere.
      queued: how many of them there are in each part.
      floors: it returns when as few completions live in a part.
      fewer: it also returns when no part has more.
    """

    held: Held
    fed: Int[Array, "A S"]
    index: Int[Array, "A S"]
    column: Int[Array, ""]
    queue: Held | None
    queued: Int[Array, " A"]
    floors: Int[Array, " A"]
    fewer: Int[Array, ""]


class Loop(struct.PyTreeNode):
    """State of the loop over tokens, and what it returns.

    Attributes:
      turn: counts the tokens that a slot has drawn in this loop; entry 0 of the arrays
        of drawn tokens is for first tokens, which follow from the prompts.
      column: the column of the ring that is written next.
      held: what each slot holds; no ticket where its completion has ended.
      fed: the last token of each slot.
      index: how many tokens its completion has.
      taken: how many completions each part has taken from the queue.
      tokens, logp: ``[A, S, turns]`` what was drawn, in nats.
      tickets: whose token it is; -1 for none.
      indices: which of its tokens it is.
    """

    turn: Int[Array, "*A"]
    column: Int[Array, "*A"]
    held: Held
    fed: Int[Array, "A S"]
    index: Int[Array, "A S"]
    taken: Int[Array, " A"]
    tokens: Int[Array, "A S U"]
    logp: Float[Array, "A S U"]
    tickets: Int[Array, "A S U"]
    indices: Int[Array, "A S U"]

    @property
    def alive(self) -> Bool[Array, "A S"]:
        """Which slots hold a completion that has not ended."""
        return self.held.ticket >= 0


@functools.partial(
    jax.jit,
    static_argnames=("model", "settings", "turns", "impl", "aligned"),
    donate_argnames=("cache",),
)
def advance(
    model: SlotDecoder,
    variables: PyTree,
    last: Float[Array, "A M D"],
    prompts: tuple[PyTree, PyTree, PyTree],
    cache: tuple[PyTree, PyTree, PyTree],
    start: Start,
    *,
    settings: GroupSettings,
    turns: int,
    impl: str,
    aligned: bool,
) -> tuple[Loop, tuple[PyTree, PyTree, PyTree]]:
    """Draw tokens in all slots, and put completions of the queue into free slots.

    Returns after `turns` tokens, when a sequence needs more columns than there are,
    or when few completions are left.

    Args:
      last: hidden states behind the prompts.
      impl: of the random keys.
      aligned: whether the prompt of the G slots from m x G on is in row m.
    """
    columns = jax.tree.leaves(cache)[0].shape[-1]
    # As [V, D]: a tied embedding is stored like that, and a product with few hidden
    # rows reads it row by row.
    head: Any = model.apply(variables, method=model.head)
    softcap = model.config.logit_softcap
    drawn = functools.partial(
        draw, head=head.T, sampling=settings.sampling, softcap=softcap
    )
    drew = functools.partial(_drew, drawn=drawn, impl=impl, settings=settings)

    def behind_prompts(state: Loop) -> Float[Array, "A S D"]:
        return jax.vmap(lambda x, at: x[at])(last, state.held.row)

    def one_token(carry: tuple[Loop, Any, Cache]) -> tuple[Loop, Any, Cache]:
        state, readers, cache = carry
        at = Slots(state.held.prompt_lengths, state.index - 1, state.column)
        hidden, cache = model.apply(
            variables,
            state.fed,
            at,
            PromptBlock(*prompts, *readers),
            cache,
            method=model.decode_slots,
        )
        state = state.replace(column=(state.column + 1) % columns)
        if start.queue is None:
            return drew(state, hidden), readers, cache
        # What came from the queue at the last turn has fed nothing yet.
        fresh = (state.index == 0)[..., None]
        state = drew(state, jnp.where(fresh, behind_prompts(state), hidden))
        state, any_new = _refill(state, start.queue, start.queued)
        readers = lax.cond(any_new, readers_of, lambda _: readers, state)
        return state, readers, cache

    rows = last.shape[1]
    readers_of = functools.partial(_readers, rows=rows, most=settings.group_size)
    state = _beginning(start, turns)
    # First tokens cost a product with the head, and no pass through the layers.
    fresh = jnp.any(state.alive & (state.index == 0))
    state = lax.cond(
        fresh,
        lambda state: _where_new(state, drew(state, behind_prompts(state))),
        lambda state: state.replace(turn=state.turn + 1),
        state,
    )
    readers = (None, None) if aligned else readers_of(state)
    carry = state, readers, Cache(*cache)
    goes_on = lambda carry: _goes_on(carry[0], start, columns)  # noqa: E731
    state, _, written = lax.while_loop(goes_on, one_token, carry)
    # Each process fetches what belongs to its own parts.
    parts = len(state.fed)
    state = state.replace(
        turn=jnp.broadcast_to(state.turn, parts),
        column=jnp.broadcast_to(state.column, parts),
    )
    return jax.tree.map(by_batch, state), written.arrays


def _goes_on(state: Loop, start: Start, columns: int) -> Bool[Array, ""]:
    living = jnp.sum(state.alive, axis=1)
    room = jnp.max(jnp.where(state.alive, state.index, 0)) <= columns
    enough = jnp.all(living > start.floors) & (jnp.max(living) > start.fewer)
    return (state.turn < state.tokens.shape[2]) & room & enough


def _drew(
    state: Loop,
    hidden: Float[Array, "A S D"],
    *,
    drawn: Callable[..., tuple[Array, Array]],
    impl: str,
    settings: GroupSettings,
) -> Loop:
    """The state with one more token for each completion, drawn or forced."""
    held = state.held
    keys = jax.random.wrap_key_data(held.keys, impl=impl)
    keys = jax.vmap(jax.vmap(jax.random.fold_in))(keys, state.index)
    forced = None if held.forced is None else held.forced.at(state.index)
    token, logp = drawn(hidden, keys=keys, forced=forced)
    put = functools.partial(lax.dynamic_update_index_in_dim, index=state.turn, axis=2)
    index = state.index + state.alive
    ended = jnp.isin(token, jnp.array(settings.stop_ids, jnp.int32))
    if forced is not None:
        ended &= forced < 0
    ended |= index >= settings.max_new_tokens
    return state.replace(
        turn=state.turn + 1,
        held=held.replace(ticket=jnp.where(ended, -1, held.ticket)),
        fed=token,
        index=index,
        tokens=put(state.tokens, token),
        logp=put(state.logp, logp),
        tickets=put(state.tickets, held.ticket),
        indices=put(state.indices, state.index),
    )


def _beginning(start: Start, turns: int) -> Loop:
    blank = jnp.zeros((*start.fed.shape, turns), jnp.int32)
    return Loop(
        turn=jnp.int32(0),
        column=start.column,
        held=start.held,
        fed=start.fed,
        index=start.index,
        taken=jnp.zeros(len(start.fed), jnp.int32),
        tokens=blank,
        logp=blank.astype(jnp.float32),
        tickets=blank - 1,
        indices=blank,
    )


def _where_new(old: Loop, new: Loop) -> Loop:
    """The new state of slots that had no token, and the old one of the others."""
    fresh = old.index == 0
    pick = lambda new, old: jnp.where(fresh, new, old)  # noqa: E731
    held = new.held.replace(ticket=pick(new.held.ticket, old.held.ticket))
    return new.replace(
        held=held,
        fed=pick(new.fed, old.fed),
        index=pick(new.index, old.index),
        tickets=new.tickets.at[..., 0].set(pick(new.tickets[..., 0], -1)),
    )


def _refill(
    state: Loop, queue: Held, queued: Int[Array, " A"]
) -> tuple[Loop, Bool[Array, ""]]:
    """The state with completions of the queue in free slots, and whether there are."""
    free = ~state.alive
    at = state.taken[:, None] + jnp.cumsum(free, axis=1) - 1
    new = free & (at < queued[:, None])
    take = jax.vmap(lambda x, at: x.at[at].get(mode="clip"))

    def put(old: Array, waiting: Array) -> Array:
        return jnp.where(
            new.reshape(*new.shape, *(1,) * (old.ndim - 2)), take(waiting, at), old
        )

    state = state.replace(
        held=jax.tree.map(put, state.held, queue),
        index=jnp.where(new, 0, state.index),
        taken=state.taken + jnp.sum(new, axis=1),
    )
    return state, jnp.any(new)


def _readers(
    state: Loop, *, rows: int, most: int
) -> tuple[Int[Array, "A M W"], Int[Array, "A S"]]:
    """Members and place of the block of prompts; see `models.cache.PromptBlock`."""

    def of_part(row: Array, alive: Array) -> tuple[Array, Array]:
        own = (row[:, None] == jnp.arange(rows)[None]) & alive[:, None]
        rank = jnp.sum(jnp.where(own, jnp.cumsum(own, axis=0) - 1, 0), axis=1)
        place = jnp.where(alive, row * most + rank, rows * most)
        members = jnp.zeros(rows * most, jnp.int32)
        members = members.at[place].set(jnp.arange(len(row)), mode="drop")
        return members.reshape(rows, most), place

    return jax.vmap(of_part)(state.held.row, state.alive)
