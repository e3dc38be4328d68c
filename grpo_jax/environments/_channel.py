"""The parent's end of one worker process: orders out, reports in."""

import asyncio
import contextlib
import pickle
import queue
import threading
from collections.abc import Callable
from typing import Any

from grpo_jax.environments import _worker
from grpo_jax.environments._seat import Act, Answer, Name, timed_out
from grpo_jax.environments.outcome import Failure
from grpo_jax.workers.process import Process, spawn

# Time in which a new process must import what it is to run.
_START_SECONDS = 120.0


class LostProcessError(Exception):
    """The process died or was killed, with the calls that it had not answered.

    Attributes:
      seat: whose code ran; None if no code of a seat did.
      failure: of that seat.
    """

    def __init__(self, seat: int | None, failure: Failure) -> None:
        super().__init__(failure.message)
        self.seat = seat
        self.failure = failure


class Channel:
    """A process, and the calls that it has not answered; made by `opened`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._calls: dict[int, _Call] = {}
        self._running: int | None = None  # the call whose code runs
        self._alarm: asyncio.TimerHandle | None = None
        self._numbers = 0
        self.lost: LostProcessError | None = None
        for serve in (self._send, self._receive):
            threading.Thread(target=serve, name="environments", daemon=True).start()

    @classmethod
    async def opened(cls, pickled: bytes) -> "Channel":
        """A new process that is ready for orders.

        Raises:
          ValueError: it could not import the tools or environments.
        """
        process, problem = await asyncio.to_thread(_start, pickled)
        if problem is not None:
            raise ValueError(
                "the process for environments could not start. Tools and environments "
                "to isolate must be importable by name, and a script that defines them "
                f"must start its run under `if __name__ == '__main__':`. {problem}"
            )
        return cls(process)

    async def call(
        self, seat: int, name: Name, act: Act, limit: float | None
    ) -> Answer:
        """The answer of an act at a seat.

        Raises:
          LostProcessError: it was lost with the process.
        """
        if self.lost is not None:
            raise self.lost
        self._numbers += 1
        number, call = self._numbers, _Call(seat, limit, self._loop.create_future())
        try:
            order = pickle.dumps((number, seat, name, act, limit))
        except Exception as error:  # of an object in the row
            details = f"{act.kind} cannot be sent to another process: {error}"
            failure = Failure(
                kind="invalid", cause="pickle", message=details, details=details
            )
            return Answer(failure=failure)
        self._calls[number] = call
        self._orders.put(order)
        return await call.answer

    def kill(self) -> None:
        """Ends the process, and so all calls."""
        details = "The process was ended."
        self._lose(Failure(kind="crash", cause="end", message=details, details=details))

    def _send(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # it died, or was killed
            while (order := self._orders.get()) is not None:
                self._process.connection.send_bytes(order)

    def _receive(self) -> None:
        try:
            while True:
                self._post(self._take, self._process.connection.recv())
        except (EOFError, OSError, TypeError, pickle.UnpicklingError):
            self._post(self._died)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the run is over, and its loop closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _take(self, report: _worker.Report) -> None:
        """In the loop: what the process reports."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._running = None
        match report:
            case int(number):
                self._running = number
                # Async calls keep their limits themselves, as long as each of their
                # steps ends. A plain call is one step.
                limit = self._calls[number].limit if number in self._calls else None
                if limit is not None:
                    self._alarm = self._loop.call_later(limit, self._hangs, limit)
            case (int(number), Answer() as answer):
                call = self._calls.pop(number, None)
                if call is not None and not call.answer.done():
                    call.answer.set_result(answer)

    def _hangs(self, limit: float) -> None:
        self._lose(timed_out(limit))

    def _died(self) -> None:
        if self.lost is None:
            details = f"The process died, exit code {self._process.exit_code()}."
            failure = Failure(
                kind="crash", cause="crash", message=details, details=details
            )
            self._lose(failure)

    def _lose(self, failure: Failure) -> None:
        if self.lost is not None:
            return
        running = self._calls.get(self._running) if self._running is not None else None
        self.lost = LostProcessError(running.seat if running else None, failure)
        if self._alarm is not None:
            self._alarm.cancel()
        self._orders.put(None)
        self._process.kill()
        for call in self._calls.values():
            if not call.answer.done():
                call.answer.set_exception(self.lost)


class _Call:
    """A call that waits for its answer."""

    def __init__(
        self, seat: int, limit: float | None, answer: "asyncio.Future[Answer]"
    ) -> None:
        self.seat = seat
        self.limit = limit
        self.answer = answer


def _start(pickled: bytes) -> tuple[Process, str | None]:
    process = spawn(_worker.serve, pickled)
    try:
        if process.connection.poll(_START_SECONDS):
            problem: str | None = process.connection.recv()
        else:
            problem = f"No sign of it within {_START_SECONDS:.3g} s."
    except (EOFError, OSError):
        problem = f"It died, exit code {process.exit_code()}."
    if problem is not None:
        process.kill()
    return process, problem
