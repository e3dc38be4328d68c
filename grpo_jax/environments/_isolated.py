"""Seats in worker processes: what dies or hangs there costs its own episode only.

Other episodes of the process are played again in a new one: the same reset, the same
turns. If an environment then answers otherwise, it is not deterministic, and its
episode fails.
"""

import asyncio
import hashlib
import itertools
import os
from collections.abc import Sequence
from typing import Any

from grpo_jax.environments._channel import Channel, LostProcessError
from grpo_jax.environments._seat import OPEN_SECONDS, Act, Answer, Kit, Name, Patience
from grpo_jax.environments.outcome import Failure
from grpo_jax.workers.process import packed, pickle_for_process

# A process that dies so often in a row, while no code of a seat runs, is given up.
_MOST_DEATHS = 3
_SETTING = "environments.isolate"
_UNREPEATABLE = Failure(
    kind="crash",
    cause="lost",
    message="The process was lost, after a call that was too late.",
    details="The process was lost by another episode. This one cannot be played again, "
    "because one of its calls was too late.",
)


class RemoteSeat:
    """A seat in a worker process, and what was done there since the last reset.

    Attributes:
      failure: why the seat cannot be played any more; None as long as it can.
    """

    def __init__(self, number: int, name: Name, has_environment: bool) -> None:
        self.number = number
        self.name = name
        self.has_environment = has_environment
        self.is_open = False
        self.log: list[tuple[Act, float | None, str]] = []
        self.failure: Failure | None = None
        # Where code that was too late may still run, which cannot be done again.
        self.only_in: Channel | None = None

    def note(self, act: Act, limit: float | None, answer: Answer) -> None:
        """Remembers an act, so that it can be done again elsewhere."""
        match act.kind:
            case "open":
                self.is_open = answer.failure is None
            case "close":
                self.is_open = False
            case "reset":
                self.log = [(act, limit, _digest(answer))]
            case "tool" | "step" if self.has_environment:
                self.log.append((act, limit, _digest(answer)))


class IsolatedPlace:
    """Runs acts in worker processes, one for each CPU core or as many as `workers`."""

    def __init__(self, kit: Kit, workers: int) -> None:
        for tool in kit.tools:
            pickle_for_process(tool, what=f"tool {tool!r:.80}", setting=_SETTING)
        for name, factory in kit.factories.items():
            what = "environment_factory" if name is None else f"environment {name!r}"
            pickle_for_process(factory, what=what, setting=_SETTING)
        self._has_environments = bool(kit.factories)
        count = min(workers, os.cpu_count() or 1)
        self._workers = [_Worker(packed(kit)) for _ in range(count)]
        self._numbers = itertools.count()

    def seat(self, name: Name) -> RemoteSeat:
        """A new seat for the environments of a factory, which is not yet open."""
        seat = RemoteSeat(next(self._numbers), name, self._has_environments)
        self._worker(seat).seats[seat.number] = seat
        return seat

    def environment(self, seat: RemoteSeat) -> Any:
        """None: it is in another process."""
        return None

    async def act(self, seat: RemoteSeat, act: Act, limit: float | None) -> Answer:
        """The answer of an act, within `limit` seconds from its beginning."""
        return await self._worker(seat).act(seat, act, limit)

    async def resets(
        self, groups: Sequence[Sequence[tuple[RemoteSeat, Act, float | None]]]
    ) -> list[list[Answer]]:
        """The answers of the resets of each group, up to the first that failed.

        A process seeds its own global generators, so groups begin side by side.
        """
        for worker in self._workers:
            worker.patience = Patience()
        return list(await asyncio.gather(*map(self._group, groups)))

    def rest(self, seat: RemoteSeat) -> None:
        """The seat's episode is over, and need not be played again."""
        seat.log.clear()

    def is_sound(self, seat: RemoteSeat) -> bool:
        """Whether its environment could be made anew whenever its process was lost."""
        return seat.failure is None

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.close()

    async def _group(
        self, group: Sequence[tuple[RemoteSeat, Act, float | None]]
    ) -> list[Answer]:
        answers = []
        for seat, act, limit in group:
            answers.append(await self.act(seat, act, limit))
            if answers[-1].failure is not None:
                break
        return answers

    def _worker(self, seat: RemoteSeat) -> "_Worker":
        return self._workers[seat.number % len(self._workers)]


class _Worker:
    """A process and its seats. A process that was lost is replaced."""

    def __init__(self, pickled_kit: bytes) -> None:
        self._kit = pickled_kit
        self._channel: Channel | None = None
        self._replacing = asyncio.Lock()
        self._is_closed = False
        self.seats: dict[int, RemoteSeat] = {}
        self.patience = Patience()

    async def act(self, seat: RemoteSeat, act: Act, limit: float | None) -> Answer:
        answer = await self._act(seat, act, limit)
        if act.kind == "reset":
            self.patience.note(seat.name, answer.failure)
        return answer

    async def _act(self, seat: RemoteSeat, act: Act, limit: float | None) -> Answer:
        deaths = 0
        while True:
            channel, given = await self._alive(), limit
            if act.kind == "reset":
                # After each process that another reset has ended.
                given = self.patience.limit(seat.name, limit)
            if seat.failure is not None:
                return self._lost(seat, seat.failure)
            if seat.only_in not in (None, channel):
                return self._lost(seat, _UNREPEATABLE)
            try:
                answer = await channel.call(seat.number, seat.name, act, given)
            except LostProcessError as lost:
                deaths += lost.seat is None
                mine = lost.seat == seat.number or deaths >= _MOST_DEATHS
                if mine or self._is_closed:
                    return self._lost(seat, lost.failure)
                continue  # once more, in the next process
            seat.note(act, limit, answer)
            if answer.lost and seat.has_environment:
                seat.only_in = channel
            if act.kind == "close" or seat.only_in is not None:
                self.seats.pop(seat.number, None)
            return answer

    def close(self) -> None:
        self._is_closed = True
        if self._channel is not None:
            self._channel.kill()
            self._channel = None

    def _lost(self, seat: RemoteSeat, failure: Failure) -> Answer:
        """The answer of a call that the process was lost with."""
        gone = seat.has_environment
        return Answer(failure=failure, lost=gone, gone=gone)

    async def _alive(self) -> Channel:
        """A process in which all seats stand as in the last one."""
        async with self._replacing:
            deaths = 0
            while self._channel is None or self._channel.lost is not None:
                if self._channel is not None and (lost := self._channel.lost):
                    deaths += lost.seat is None
                    for seat in self._blamed(lost.seat, deaths >= _MOST_DEATHS):
                        self._give_up(seat, lost.failure)
                self._channel = await Channel.opened(self._kit)
                try:
                    for seat in [*self.seats.values()]:
                        await self._replay(self._channel, seat)
                except LostProcessError:
                    continue
            return self._channel

    def _blamed(self, number: int | None, all_of_them: bool) -> list[RemoteSeat]:
        if all_of_them:
            return list(self.seats.values())
        seat = self.seats.get(number) if number is not None else None
        return [seat] if seat is not None and seat.has_environment else []

    async def _replay(self, channel: Channel, seat: RemoteSeat) -> None:
        if not seat.is_open:
            return
        opened = await channel.call(seat.number, seat.name, Act("open"), OPEN_SECONDS)
        if opened.failure is not None:
            self._give_up(seat, opened.failure)
            return
        for act, limit, digest in seat.log:
            answer = await channel.call(seat.number, seat.name, act, limit)
            if _digest(answer) != digest:
                details = (
                    f"{act.name or act.kind} answered otherwise when the episode was "
                    "played again, after another one had ended their process. Let the "
                    "environment draw all that is random from the seed of its reset."
                )
                failure = Failure(
                    kind="invalid",
                    cause="not deterministic",
                    message=details,
                    details=details,
                )
                self._give_up(seat, failure)
                return

    def _give_up(self, seat: RemoteSeat, failure: Failure) -> None:
        seat.failure = failure
        self.seats.pop(seat.number, None)


def _digest(answer: Answer) -> str:
    """Equal for answers that say the same."""
    message = None if answer.failure is None else answer.failure.message
    return hashlib.sha256(repr((answer.value, message)).encode()).hexdigest()
