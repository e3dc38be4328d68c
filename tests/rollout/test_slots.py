"""Every completion is drawn once, by a slot that reads its prompt and its own tokens.

The loop on the device is simulated in plain NumPy, with names of tokens in place of
keys and values. The device's own way to fill slots is compared with it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rollout import _loop as loops
from grpo_jax.rollout._slots import NONE, SlotPlan


def refill(held, queue, taken):
    """Completions of a part's queue into its free slots, in order; how many it has."""
    fresh = []
    for slot in np.flatnonzero(held == NONE):
        if taken == len(queue):
            break
        held[slot], taken = queue[taken], taken + 1
        fresh.append(slot)
    return taken, fresh


class Device:
    """What the loop does: the ring, the block of prompts, and the tokens drawn."""

    def __init__(self, lengths, *, group, columns):
        self.lengths, self.group = lengths, group
        self.columns, self.column = columns, 0
        self.ring = self.block = None
        self.drawn, self.turns = [], 0

    def make(self, plan):
        self.ring = np.full((*plan.held.shape, self.columns), None)
        self.block = np.full(plan.prompts.shape, NONE)

    def widen(self, columns):
        self.ring = np.roll(self.ring, -self.column, axis=2)
        wider = ((0, 0), (0, 0), (0, columns - self.columns))
        self.ring = np.pad(self.ring, wider, constant_values=None)
        self.columns, self.column = columns, self.columns

    def check(self, plan, held, index):
        """Each slot reads its prompt, and all tokens before the one that is fed."""
        for part, slot in np.argwhere((held != NONE) & (index > 0)):
            name, count = held[part, slot], index[part, slot]
            row = plan.rows_of(part, held[part])[slot]
            assert self.block[part, row] == name // self.group
            columns = (self.column - np.arange(count, 0, -1) + 1) % self.columns
            seen = self.ring[part, slot, columns]
            assert seen.tolist() == [(name, t) for t in range(count)]

    def draw(self, held, index):
        for part, slot in np.argwhere(held != NONE):
            self.drawn.append((held[part, slot], index[part, slot]))
            index[part, slot] += 1
            if index[part, slot] == self.lengths[held[part, slot]]:
                held[part, slot] = NONE

    def advance(self, plan, *, most, floors, fewer):
        held, index = plan.held.copy(), plan.index.copy()
        taken = np.zeros(len(held), int)
        fresh = (held != NONE) & (index == 0)
        first = np.where(fresh, held, NONE)
        self.draw(first, index)
        held[fresh], turn = first[fresh], 1
        while turn < most:
            living = (held != NONE).sum(axis=1)
            if np.any(living <= floors) or living.max() <= fewer:
                break
            if np.max(np.where(held != NONE, index, 0)) > self.columns:
                break
            for part, slot in np.argwhere((held != NONE) & (index > 0)):
                token = held[part, slot], index[part, slot] - 1
                self.ring[part, slot, self.column] = token
            self.check(plan, held, index)
            self.column = (self.column + 1) % self.columns
            self.draw(held, index)
            for part, queue in enumerate(plan.queues):
                taken[part], new = refill(held[part], queue, taken[part])
                index[part, new] = 0
            turn, self.turns = turn + 1, self.turns + 1
        plan.record(held, index, taken)


def simulate(lengths, *, group, parts, slots, most, shrinks=False):
    """Run a plan as the engine does. Returns the tokens that were drawn, and turns."""
    plan = SlotPlan(parts, group_size=group, slots=slots)
    device = Device(lengths, group=group, columns=2)
    plan.add(range(len(lengths) // group))
    for _ in range(10_000):
        ahead = plan.slots // 2 if plan.waiting or any(plan.queues) else 0
        new = plan.admit(ahead)
        known = np.zeros(max(len(lengths), 1), int)  # no tokens are given
        demand = plan.demand(new, wanted=1, known=known)
        if not demand.total:
            assert not demand.waiting
            return device.drawn, device.turns
        if device.ring is None:
            device.make(plan)
        missing = demand.rows - device.block.shape[1]
        wider = ((0, 0), (0, max(missing, 0)))
        device.block = np.pad(device.block, wider, constant_values=NONE)
        alone = not demand.waiting and not demand.queue
        if shrinks and alone and demand.alive < plan.slots:
            fewest = max(len(set(x[x != NONE] // group)) for x in plan.held)
            order, rows = plan.shrink(demand.alive, fewest)
            device.ring = np.take_along_axis(device.ring, order[..., None], axis=1)
            device.block = np.take_along_axis(device.block, rows, axis=1)
            assert plan.slots == demand.alive and plan.prompts.shape[1] == fewest
        for part, pairs in enumerate(new):
            for row, number in pairs:
                at = np.flatnonzero(plan.prompts[part] == number)
                assert len(at) == 1 and (alone or at[0] == row)
                device.block[part, at[0]] = number
        if demand.columns > device.columns:
            device.widen(max(demand.columns, device.columns + 1))
        device.advance(
            plan,
            most=most,
            floors=np.full(parts, plan.slots - 1 if plan.waiting else -1),
            fewer=plan.slots // 2 if shrinks and alone else 0,
        )
    raise AssertionError("the plan comes to no end")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_completion_is_drawn_once_with_what_is_its_own(data):
    draw = data.draw
    group = draw(st.integers(1, 4))
    count = draw(st.integers(0, 5)) * group
    lengths = draw(st.tuples(*[st.integers(1, 12)] * count))
    drawn, _ = simulate(
        lengths,
        group=group,
        parts=draw(st.integers(1, 3)),
        slots=draw(st.integers(1, 6)),  # also one, and fewer than a group
        most=draw(st.integers(2, 9)),
        shrinks=draw(st.booleans()),
    )
    wanted = [(name, t) for name, size in enumerate(lengths) for t in range(size)]
    assert sorted(drawn) == wanted


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_free_slot_is_filled_at_once(slots):
    # Three prompts of four completions. A slot whose completion ends begins the next
    # one at the next turn, as long as any waits.
    lengths = (9, 1, 1, 1, 2, 2, 9, 1, 30, 2, 1, 9)
    _, turns = simulate(lengths, group=4, parts=1, slots=slots, most=128)
    ends = np.zeros(slots, int)
    for size in lengths:
        ends[ends.argmin()] += size
    # The first tokens of a visit of the host cost no turn.
    visits = 1 + len(lengths) // 4
    assert ends.max() - visits <= turns <= ends.max()


def test_a_prompt_is_held_once_while_a_completion_needs_it():
    plan = SlotPlan(1, group_size=4, slots=2)
    plan.add(range(3))
    assert plan.admit(2) == [[(0, 0)]]
    assert plan.held.tolist() == [[0, 1]] and plan.queues == [[2, 3]]
    # Two took the places of those that ended: the group goes on with its prompt, and
    # the next group waits with a prompt of its own.
    plan.record(np.array([[2, 3]]), np.array([[1, 0]]), np.array([2]))
    assert plan.admit(2) == [[(1, 1)]]
    assert plan.held.tolist() == [[2, 3]] and plan.queues == [[4, 5, 6, 7]]
    # The first prompt is done with, so the third gets its row.
    plan.record(np.array([[6, 7]]), np.array([[1, 1]]), np.array([4]))
    assert plan.admit(2) == [[(0, 2)]]
    assert plan.prompts.tolist() == [[2, 1]]


def test_the_number_of_a_forgotten_group_means_the_new_one():
    plan = SlotPlan(1, group_size=1, slots=2)
    plan.add([0, 1])
    plan.admit(0)
    plan.record(np.array([[NONE, NONE]]), np.array([[5, 5]]), np.array([0]))
    plan.add([1])
    assert plan.admit(0) == [[(0, 1)]]
    assert plan.prompts.tolist() == [[1, NONE]]


def test_groups_go_to_the_part_with_the_least_to_do():
    plan = SlotPlan(2, group_size=2, slots=4)
    plan.add(range(3))
    assert plan.admit(0) == [[(0, 0), (1, 2)], [(0, 1)]]
    assert plan.held.tolist() == [[0, 1, 4, 5], [2, 3, NONE, NONE]]


def loop_state(held, rows):
    """The state of a loop in which only what slots hold matters."""
    zeros = jnp.zeros(held.shape, jnp.int32)
    of_turns = zeros[..., None]
    return loops.Loop(
        turn=jnp.int32(1),
        column=jnp.int32(0),
        held=loops.Held(
            ticket=jnp.asarray(held, jnp.int32),
            row=jnp.asarray(rows, jnp.int32),
            prompt_lengths=jnp.asarray(rows + 1, jnp.int32),
            keys=jnp.asarray(np.stack([held, rows], axis=-1), jnp.uint32),
        ),
        fed=zeros,
        index=zeros + 7,
        taken=zeros[:, 0],
        tokens=of_turns,
        logp=of_turns.astype(jnp.float32),
        tickets=of_turns,
        indices=of_turns,
    )


PARTS, SLOTS, ROWS, QUEUE = 2, 5, 3, 4
refill_on_device = jax.jit(loops._refill)
readers_on_device = jax.jit(functools.partial(loops._readers, rows=ROWS, most=SLOTS))


@given(st.data())
def test_the_device_fills_free_slots_as_the_simulation_does(data):
    some = st.integers(0, 20)
    draw = lambda kind, *shape: np.reshape(  # noqa: E731
        data.draw(st.tuples(*[kind] * int(np.prod(shape)))), shape
    )
    held, rows = draw(some | st.just(NONE), PARTS, SLOTS), draw(some, PARTS, SLOTS)
    queue, queue_rows = draw(some, PARTS, QUEUE), draw(some, PARTS, QUEUE)
    queued, taken = draw(st.integers(0, QUEUE), PARTS), draw(st.integers(0, 2), PARTS)
    taken = np.minimum(taken, queued)
    state = loop_state(held, rows).replace(taken=jnp.asarray(taken, jnp.int32))
    waiting = loop_state(queue, queue_rows).held
    after, any_new = refill_on_device(state, waiting, jnp.asarray(queued, jnp.int32))
    index, every = np.full(held.shape, 7), []
    for part in range(PARTS):
        before = taken[part]
        taken[part], fresh = refill(held[part], queue[part, : queued[part]], before)
        rows[part, fresh] = queue_rows[part, before : taken[part]]
        index[part, fresh] = 0
        every += fresh
    expected = loop_state(held, rows).held
    alive = np.asarray(expected.ticket) != NONE
    for ours, wanted in zip(
        jax.tree.leaves(after.held), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(ours[alive], wanted[alive])
    np.testing.assert_array_equal(after.alive, alive)
    np.testing.assert_array_equal(after.index, index)
    np.testing.assert_array_equal(after.taken, taken)
    assert bool(any_new) == bool(every)


@given(
    st.tuples(*[st.integers(NONE, 9)] * PARTS * SLOTS),
    st.tuples(*[st.integers(0, ROWS - 1)] * PARTS * SLOTS),
)
def test_the_device_lists_for_each_prompt_the_slots_that_read_it(held, rows):
    held, rows = (np.reshape(x, (PARTS, SLOTS)) for x in (held, rows))
    members, place = readers_on_device(loop_state(held, rows))
    for part, slot in np.ndindex(held.shape):
        if held[part, slot] == NONE:
            assert place[part, slot] == ROWS * SLOTS
        else:
            row, at = divmod(int(place[part, slot]), SLOTS)
            assert row == rows[part, slot] and members[part, row, at] == slot
    # One place each: no two slots read what one of them asked for.
    taken = np.asarray(place)[held != NONE]
    parts = np.nonzero(held != NONE)[0]
    assert len(set(zip(parts.tolist(), taken.tolist(), strict=True))) == len(taken)
