"""Rewards of groups that are complete, while others are still sampled.

Only functions that are marked `per_completion` can be called so: others may compare
completions of different groups. They are called in one thread, group by group, in the
order in which groups end. It makes no collective computation, and what goes wrong in it
is raised where the rewards are asked for.
"""

import queue
import threading
from collections.abc import Callable, Sequence

from grpo_jax.rewards.runner import Part, RewardRunner, Scores
from grpo_jax.tasks.base import Row

# Seconds that the end of a run waits for a call that nobody asks for any more.
_CLOSE_SECONDS = 5.0

Ids = Sequence[Sequence[int]]  # the token ids of a group's completions


class EarlyRewards:
    """Rewards the groups of one rollout after the other."""

    def __init__(
        self, runner: RewardRunner, decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._runner, self._decode = runner, decode
        self._rows: Sequence[Row] = ()
        self._calls: _Calls | None = None

    def begin(
        self, rows: Sequence[Row], *, step: int
    ) -> Callable[[int, list[list[int]]], None] | None:
        """What a sampler calls when the group of a row is complete; see `Sampler`.

        None where all groups must be rewarded together.
        """
        self._abandon(None)  # one before, of which nobody asked the rewards
        if not self._runner.is_per_completion:
            return None

        def score(number: int, ids: Ids) -> Part:
            texts = [self._decode(one) for one in ids]
            return self._score(number, rows, texts, ids, step=step)

        self._rows, self._calls = rows, _Calls(score)
        return self._calls.add

    def scores(
        self,
        rows: Sequence[Row],
        completions: Sequence[Sequence[str]],
        ids: Sequence[Ids],
        *,
        step: int,
    ) -> Scores | None:
        """The rewards of all groups; None if none of them was scored early.

        Waits for those that are on their way, and scores groups that were not given.

        Raises:
          ValueError: as `RewardRunner.score`, also for what happened before.
          RuntimeError: the same.
        """
        calls, self._calls = self._calls, None
        known = {} if calls is None else calls.finish()
        if not known:
            return None
        parts = []
        for number, row in enumerate(rows):
            given, part = known.get(number, (None, None))
            if part is None or given != ids[number] or self._rows[number] is not row:
                group = rows, completions[number], ids[number]
                part = self._score(number, *group, step=step)
            parts.append(part)
        return self._runner.join(parts, step=step)

    def close(self) -> None:
        """Score no further group."""
        self._abandon(_CLOSE_SECONDS)

    def _abandon(self, seconds: float | None) -> None:
        calls, self._calls = self._calls, None
        if calls is not None:
            calls.abandon(seconds)

    def _score(
        self,
        number: int,
        rows: Sequence[Row],
        texts: Sequence[str],
        ids: Ids,
        *,
        step: int,
    ) -> Part:
        row, size = rows[number], len(texts)
        return self._runner.score_part(
            [row["prompt"]] * size,
            texts,
            # The columns are those of the first row, as for a whole batch.
            {name: [row[name]] * size for name in rows[0] if name != "prompt"},
            completion_ids=ids,
            step=step,
            first=number * size,
        )


class _Calls:
    """A thread that scores groups in the order in which they are added."""

    def __init__(self, score: Callable[[int, Ids], Part]) -> None:
        self._score = score
        self._added: queue.SimpleQueue[tuple[int, Ids] | None] = queue.SimpleQueue()
        self._parts: dict[int, tuple[Ids, Part]] = {}
        self._error: BaseException | None = None
        self._abandoned = False
        # A daemon: a function that never returns does not keep the run from ending.
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()

    def add(self, number: int, ids: Ids) -> None:
        """Score a group as soon as those before it are done."""
        self._added.put((number, ids))

    def finish(self) -> dict[int, tuple[Ids, Part]]:
        """The token ids and the part of each group that was added, by its number.

        Waits for all of them; raises the first error.
        """
        self._added.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._parts

    def abandon(self, seconds: float | None) -> None:
        """Score no further group; waits so long for the present one, None for ever."""
        self._abandoned = True
        self._added.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (added := self._added.get()) is not None and not self._abandoned:
            try:
                self._parts[added[0]] = added[1], self._score(*added)
            except BaseException as error:  # also Ctrl-C, raised by a function
                self._error = error
                return
