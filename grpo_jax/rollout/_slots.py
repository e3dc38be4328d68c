"""Which completion each slot of the sampler holds, and which wait for one.

Bookkeeping on the host, in NumPy. It follows from the lengths of the completions alone
and never from the clock, so a run that is repeated repeats it.

A part is what one device of the batch holds. A process plans for its own parts. Slots
and rows count within their part.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from grpo_jax.rollout._forced import SHORT

# No completion and no group.
NONE = -1


class Demand(NamedTuple):
    """What the parts need next, of each number the most of any part.

    Programs are compiled for the most of all processes, which must run the same ones.
    """

    new: int  # prompts to prefill
    rows: int  # of the block of prompts
    queue: int  # completions behind those in slots
    alive: int  # slots that hold a completion
    columns: int  # own tokens that a sequence has
    scattered: int  # whether the prompts of slots are not in order
    total: int  # completions in slots and in queues, of all parts together
    waiting: int  # groups that no part has yet, of all processes together
    wanted: int  # completions that the callers still wait for
    given: int  # most tokens that a completion is given and has not run
    long: int  # slots with more of them than the loop takes
    longest: int  # most of them in a slot


class SlotPlan:
    """The state of all slots: plain arrays, changed as completions begin and end.

    Completions are numbered group x group_size + sample, groups as they are added.

    Attributes:
      held: ``[A, S]`` the completion in each slot.
      index: ``[A, S]`` tokens that it has.
      prompts: ``[A, M]`` the group of each row of the block of prompts.
      queues: for each part the completions that wait for a slot in it.
      waiting: groups that no part has yet, with those of their completions that wait.
    """

    def __init__(self, parts: int, *, group_size: int, slots: int) -> None:
        self.group_size = group_size
        self.held = np.full((parts, slots), NONE)
        self.index = np.zeros((parts, slots), np.int32)
        self.prompts = np.full((parts, 1), NONE)
        self.queues: list[list[int]] = [[] for _ in range(parts)]
        self.waiting: deque[tuple[int, Sequence[int]]] = deque()

    @property
    def slots(self) -> int:
        """Sequences of a part that decode together, S."""
        return self.held.shape[1]

    @property
    def alive(self) -> np.ndarray:
        """``[A, S]`` whether a slot holds a completion."""
        return self.held != NONE

    def add(self, groups: Iterable[int]) -> None:
        """Groups that shall be drawn, after those that were added before."""
        size = self.group_size
        for group in groups:
            # Their numbers may be those of groups that were forgotten.
            self.prompts[self.prompts == group] = NONE
            self.waiting.append((group, range(group * size, (group + 1) * size)))

    def again(self, completion: int) -> None:
        """Put a completion that had ended in front of all that wait."""
        self.waiting.appendleft((completion // self.group_size, [completion]))

    def admit(self, ahead: int) -> list[list[tuple[int, int]]]:
        """Give waiting groups to parts, and their completions to free slots.

        A part gets groups until it has `ahead` completions behind those in its slots.

        Returns:
          For each part the row and the group of each prompt that is new.
        """
        new: list[list[tuple[int, int]]] = [[] for _ in self.held]
        load = self.alive.sum(axis=1) + [len(queue) for queue in self.queues]
        free = [np.flatnonzero(~needed).tolist() for needed in self.needed_prompts()]
        while self.waiting and load.min() < self.slots + ahead:
            group, numbers = self.waiting.popleft()
            there = np.argwhere(self.prompts == group)
            if len(there):
                part, row = there[0].tolist()
                free[part] = [other for other in free[part] if other != row]
            else:
                part = int(load.argmin())
                if not free[part]:
                    before = self.prompts.shape[1]
                    self.widen_prompts(before + 1)
                    for rows in free:
                        rows.append(before)
                row = free[part].pop(0)
                self.prompts[part, row] = group
                new[part].append((row, group))
            self.queues[part].extend(numbers)
            load[part] += len(numbers)
        for part, queue in enumerate(self.queues):
            free = np.flatnonzero(~self.alive[part])[: len(queue)]
            self.held[part, free], queue[: len(free)] = queue[: len(free)], []
            self.index[part, free] = 0
        return new

    def rows_of(self, part: int, completions: np.ndarray) -> np.ndarray:
        """The rows of the block with the prompts of completions; any for none."""
        order = np.argsort(self.prompts[part])
        groups = np.maximum(completions, 0) // self.group_size
        at = np.searchsorted(self.prompts[part], groups, sorter=order)
        return order[np.minimum(at, len(order) - 1)]

    def demand(
        self, new: list[list[tuple[int, int]]], *, wanted: int, known: np.ndarray
    ) -> Demand:
        """What is needed next, after `new` prompts were admitted.

        Args:
          known: how many tokens each completion has, with those that it is given.
        """
        alive, most = self.alive, max(map(len, self.queues))
        pending = self.pending(known)
        # What one call extends is in the ring at once.
        columns = self.index + np.where(pending > SHORT, pending, 0)
        queued = [known[queue].max(initial=0) for queue in self.queues]
        first = np.arange(self.slots) // self.group_size
        in_order = most == 0 and all(
            np.all((self.rows_of(part, held) == first)[held != NONE])
            for part, held in enumerate(self.held)
        )
        return Demand(
            new=max(map(len, new)),
            rows=self.prompts.shape[1],
            queue=most,
            alive=int(alive.sum(axis=1).max()),
            columns=int(np.max(columns * alive)),
            scattered=not in_order,
            total=int(alive.sum()) + sum(map(len, self.queues)),
            waiting=len(self.waiting),
            wanted=wanted,
            given=int(max(pending.max(), *queued)),
            long=int((pending > SHORT).sum(axis=1).max()),
            longest=int(pending.max()),
        )

    def state(self) -> dict[str, np.ndarray]:
        """The plan as arrays, without the groups that wait."""
        queues = np.full((len(self.queues), max(map(len, self.queues)) + 1), NONE)
        for row, queue in zip(queues, self.queues, strict=True):
            row[: len(queue)] = queue
        arrays = {"held": self.held, "index": self.index, "queues": queues}
        arrays["rows"] = self.prompts
        return {name: x.astype(np.int32) for name, x in arrays.items()}

    def restore(self, state: Mapping[str, np.ndarray], going: Iterable[int]) -> None:
        """Go on where `state` was taken, with the completions that have not ended."""
        self.held, self.index = state["held"].copy(), state["index"].copy()
        self.prompts = state["rows"].copy()
        self.queues = [row[row != NONE].tolist() for row in state["queues"]]
        self.waiting.clear()
        there = {*self.held.ravel().tolist(), *itertools.chain(*self.queues)}
        for completion in going:
            if completion not in there:
                self.again(completion)

    def pending(self, known: np.ndarray) -> np.ndarray:
        """``[A, S]`` how many tokens slots are given that they have not run."""
        left = np.maximum(known[self.held] - self.index, 0)
        return np.where(self.alive, left, 0)

    def widen_prompts(self, rows: int) -> None:
        """Make room for at least `rows` prompts."""
        missing = max(rows - self.prompts.shape[1], 0)
        wider = ((0, 0), (0, missing))
        self.prompts = np.pad(self.prompts, wider, constant_values=NONE)

    def record(self, held: np.ndarray, index: np.ndarray, taken: np.ndarray) -> None:
        """Note what the slots hold after a run of the loop."""
        self.held, self.index = held.copy(), index.copy()
        for queue, count in zip(self.queues, taken, strict=True):
            del queue[:count]

    def enough_slots(self, alive: int) -> int:
        """How many slots are enough for `alive` completions, by halving."""
        slots = self.slots
        while slots > 1 and alive <= -(-slots // 2):
            slots = -(-slots // 2)
        return slots

    def shrink(self, slots: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Move the completions into fewer slots, and their prompts into fewer rows.

        Returns:
          The old slot of each new one, and the old row of each row of prompts.
        """
        order = _first_of(self.alive, slots)
        self.held = np.take_along_axis(self.held, order, axis=1)
        self.index = np.take_along_axis(self.index, order, axis=1)
        needed = self.needed_prompts()
        old = _first_of(needed, rows)
        kept = np.where(needed, self.prompts, NONE)
        self.prompts = np.take_along_axis(kept, old, axis=1)
        return order, old

    def needed_prompts(self) -> np.ndarray:
        """``[A, M]`` which prompts have a completion in a slot or in the queue."""
        return np.stack(
            [
                np.isin(own, np.array([*held[held != NONE], *queue]) // self.group_size)
                for own, held, queue in zip(
                    self.prompts, self.held, self.queues, strict=True
                )
            ]
        )


def _first_of(chosen: np.ndarray, count: int) -> np.ndarray:
    """``[A, count]`` where the chosen entries are, and then others."""
    return np.argsort(~chosen, axis=1, kind="stable")[:, :count]
