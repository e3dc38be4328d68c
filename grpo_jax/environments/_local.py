"""Seats in this process: threads for plain functions, one event loop for async ones.

A thread cannot be stopped. One that hangs is given up, and another takes its place.
"""

import asyncio
import concurrent.futures
import functools
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.environments._generators import seeded
from grpo_jax.environments._seat import (
    Act,
    Answer,
    Kit,
    Name,
    Patience,
    Seat,
    timed_out,
)
from grpo_jax.environments._steps import Steps
from grpo_jax.environments.outcome import Failure
from grpo_jax.workers.event_loop import EventLoop

# Something to do: at which seat, what, in how many seconds.
Request = tuple[Any, Act, float | None]


class LocalSeat(Seat):
    """A seat in this process.

    Attributes:
      name: of the factory.
      threads: that run its acts when they are free, at most one.
    """

    def __init__(self, kit: Kit, name: Name) -> None:
        super().__init__(kit, name)
        self.name = name
        self.threads: list[_Thread] = []


class LocalPlace:
    """Runs acts in this process. Its coroutines belong to one event loop, the host's.

    Plain functions run in at most `workers` threads at once; a call waits its turn
    off its clock. Async functions all run at once.
    """

    def __init__(self, kit: Kit, workers: int) -> None:
        self._kit = kit
        self._turns = asyncio.Semaphore(workers)
        self._idle: list[_Thread] = []
        self._coroutines: _Coroutines | None = None
        # The global generators belong to one reset at a time, or to async ones.
        self._resets = asyncio.Lock()

    def seat(self, name: Name) -> LocalSeat:
        """A new seat for the environments of a factory, which is not yet open."""
        return LocalSeat(self._kit, name)

    def environment(self, seat: LocalSeat) -> Any:
        """The environment at a seat."""
        return seat.environment

    async def act(self, seat: LocalSeat, act: Act, limit: float | None) -> Answer:
        """The answer of an act, within `limit` seconds from its beginning."""
        if seat.is_async(act):
            return await self._await(seat, act, limit)
        async with self._turns:
            # All acts of an environment run in one thread, which some objects demand,
            # such as connections to SQLite. Tools alone share threads.
            threads = seat.threads if self._kit.factories else self._idle
            thread = threads.pop() if threads else _Thread()
            running = thread.start(functools.partial(seat.run, act))
            ended, _ = await asyncio.wait({asyncio.wrap_future(running)}, timeout=limit)
            if ended:
                threads.append(thread)
                return ended.pop().result()
        assert limit is not None
        return Answer(failure=timed_out(limit), seconds=limit, lost=True)

    async def resets(self, groups: Sequence[Sequence[Request]]) -> list[list[Answer]]:
        """The answers of the resets of each group, up to the first that failed.

        Plain resets run one after another with the global random generators to
        themselves, seeded for each. Async ones run at once, each with its own states
        of the generators.
        """
        plain = [group for group in groups if not _is_async(group)]
        patience = Patience()
        answers = {id(group): await self._group(group, patience) for group in plain}
        together = [group for group in groups if _is_async(group)]
        async with self._resets:
            for group, found in zip(
                together,
                await asyncio.gather(*map(self._gather, together)),
                strict=True,
            ):
                answers[id(group)] = found
        return [answers[id(group)] for group in groups]

    def rest(self, seat: LocalSeat) -> None:
        """Does nothing: an episode that is over leaves nothing behind."""

    def is_sound(self, seat: LocalSeat) -> bool:
        """True: an environment in this process dies with it only."""
        return True

    def close(self) -> None:
        """Ends the threads and the event loop, as far as they can be ended."""
        self._idle.clear()
        if self._coroutines is not None:
            self._coroutines.close()
            self._coroutines = None

    async def _group(
        self, group: Sequence[Request], patience: Patience
    ) -> list[Answer]:
        answers = []
        for seat, act, most in group:
            limit = patience.limit(seat.name, most)
            async with self._resets:
                # The generators come back here, even if the reset never does.
                with seeded(act.seed):
                    answers.append(await self.act(seat, act, limit))
            patience.note(seat.name, answers[-1].failure)
            if answers[-1].failure is not None:
                break
        return answers

    async def _gather(self, group: Sequence[Request]) -> list[Answer]:
        return list(await asyncio.gather(*(self.act(*request) for request in group)))

    async def _await(self, seat: LocalSeat, act: Act, limit: float | None) -> Answer:
        while True:
            if self._coroutines is None or self._coroutines.given_up:
                self._coroutines = _Coroutines()
            answer = await self._coroutines.run(seat, act, limit)
            if answer is not None:
                return answer


def _is_async(group: Sequence[Request]) -> bool:
    seat, act, _ = group[0]
    return seat.is_async(act)


class _Coroutines:
    """Async acts at once, on an event loop that is given up if one blocks it."""

    def __init__(self) -> None:
        self.given_up = False
        self._loop = EventLoop("async-environments")
        self._steps = Steps(self._report)
        self._running: tuple[int | None, float] = (None, 0.0)  # who, since when
        self._numbers = itertools.count()
        self._calls: dict[int, _Call] = {}

    async def run(self, seat: Seat, act: Act, limit: float | None) -> Answer | None:
        """The answer of an act; None if the loop was given up before it began."""
        number, call = next(self._numbers), _Call(asyncio.get_running_loop())
        self._calls[number] = call
        started = self._loop.start(self._begin(number, call, seat, act, limit))
        started.add_done_callback(call.settle)
        # The loop keeps the limit itself, unless it is blocked.
        while not (await asyncio.wait({call.answer}, timeout=limit))[0]:
            assert limit is not None
            who, since = self._running
            if who == number and time.monotonic() - since >= limit:
                late = Answer(failure=timed_out(limit), seconds=limit, lost=True)
                call.answer.set_result(late)
                self._give_up(blamed=act.name or act.kind)
        del self._calls[number]
        return call.answer.result()

    def close(self) -> None:
        """Ends the loop as soon as nothing blocks it."""
        self._loop.stop()

    def _give_up(self, *, blamed: str) -> None:
        """What began on the loop is lost with it; what did not begin can move."""
        self.given_up = True
        self.close()
        details = f"{blamed} never paused, and so blocked the event loop of all."
        lost = Failure(kind="error", cause="blocked", message=details, details=details)
        for call in self._calls.values():
            if not call.answer.done():
                began = not call.ticket.acquire(blocking=False)
                answer = Answer(failure=lost, lost=True) if began else None
                call.answer.set_result(answer)

    async def _begin(
        self,
        number: int,
        call: "_Call",
        seat: Seat,
        act: Act,
        limit: float | None,
    ) -> Answer | None:
        if not call.ticket.acquire(blocking=False):
            return None  # it runs on another loop
        return await self._steps.run(number, seat.run_async(act), limit)

    def _report(self, number: int | None) -> None:
        self._running = (number, time.monotonic())


class _Call:
    """An answer that is waited for, and the ticket of the one who may begin it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.ticket = threading.Lock()
        self.answer: asyncio.Future[Answer | None] = loop.create_future()
        self._loop = loop

    def settle(self, ended: concurrent.futures.Future) -> None:
        """Called in the thread of the other loop."""
        # The host may be closed by now, and nobody waits any more.
        if not self._loop.is_closed() and not ended.cancelled():
            self._loop.call_soon_threadsafe(self._settle, ended)

    def _settle(self, ended: concurrent.futures.Future) -> None:
        if not self.answer.done():
            self.answer.set_result(ended.result())


class _Thread:
    """A daemon thread, which keeps no process from ending.

    It ends when nobody holds this object any more, after what it runs by then, should
    that ever end.
    """

    def __init__(self) -> None:
        work: queue.SimpleQueue = queue.SimpleQueue()
        self._work = work
        threading.Thread(
            target=_serve, args=(work,), name="environment", daemon=True
        ).start()
        weakref.finalize(self, work.put, None)

    def start(self, function: Callable[[], Answer]) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        self._work.put((function, future))
        return future


def _serve(work: queue.SimpleQueue) -> None:
    while (task := work.get()) is not None:
        function, future = task
        future.set_result(function())
        del task, function, future  # they hold the seat, and so this thread
