"""The main of a worker process: seats, and acts done there as the parent asks.

Plain acts run one after another on the main thread, where signals work and no event
loop runs, so that a tool may start one. Async acts run at once on an event loop, which
rests while a plain act runs.
"""

import asyncio
import time
from typing import Any

from grpo_jax.environments._generators import seeded
from grpo_jax.environments._seat import Act, Answer, Kit, Name, Seat
from grpo_jax.environments._steps import Steps
from grpo_jax.environments.outcome import Failure
from grpo_jax.workers.process import packed, settle_in, unpacked

# The parent's: number of the call, of the seat, its factory, what to do, seconds.
Order = tuple[int, int, Name, Act, float | None]
# The worker's: a problem of its start or None; then, call by call, its number at each
# step, None after a step, and (number, answer).
Report = str | None | int | tuple[int, Answer]


def serve(connection: Any, pickled: bytes) -> None:
    """Does orders until the pipe ends."""
    settle_in()
    try:
        kit: Kit = unpacked(pickled)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(None)
    desk = _Desk(kit, connection)
    with asyncio.Runner() as runner:
        while (order := runner.run(desk.next_plain())) is not None:
            desk.run(order)


class _Desk:
    """Takes orders in, and sends answers out."""

    def __init__(self, kit: Kit, connection: Any) -> None:
        self._kit = kit
        self._connection = connection
        self._seats: dict[int, Seat] = {}
        self._steps = Steps(connection.send)
        self._plain: list[Order] = []
        self._arrived = asyncio.Event()
        self._ended = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def next_plain(self) -> Order | None:
        """The next order that is not async; None at the end. Async ones begin."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._connection.fileno(), self._read)
        try:
            while not (self._plain or self._ended):
                self._arrived.clear()
                await self._arrived.wait()
        finally:
            loop.remove_reader(self._connection.fileno())
        return self._plain.pop(0) if self._plain else None

    def run(self, order: Order) -> None:
        """Does an order that is not async."""
        number, _, _, act, _ = order
        self._connection.send(number)
        start, seat = time.monotonic(), self._seat(order)
        if act.kind == "reset":
            with seeded(act.seed):
                answer = seat.run(act)
        else:
            answer = seat.run(act)
        # The event loop rested, off the clocks of its calls.
        self._steps.held += time.monotonic() - start
        self._send(number, answer)
        if act.kind == "close":
            del self._seats[order[1]]

    def _read(self) -> None:
        try:
            while self._connection.poll():
                order: Order = self._connection.recv()
                if self._seat(order).is_async(order[3]):
                    task = asyncio.create_task(self._await(order))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                else:
                    self._plain.append(order)
        except (EOFError, OSError):
            self._ended = True
        self._arrived.set()

    async def _await(self, order: Order) -> None:
        number, _, _, act, limit = order
        coroutine = self._seat(order).run_async(act)
        self._send(number, await self._steps.run(number, coroutine, limit))

    def _send(self, number: int, answer: Answer) -> None:
        try:
            report = packed((number, answer))
        except Exception as error:  # of an object in a list that a tool returned
            details = f"The answer cannot be sent from its process: {error}"
            failure = Failure(
                kind="invalid", cause="pickle", message=details, details=details
            )
            report = packed((number, Answer(failure=failure)))
        self._connection.send_bytes(report)

    def _seat(self, order: Order) -> Seat:
        _, number, name, _, _ = order
        if number not in self._seats:
            self._seats[number] = Seat(self._kit, name)
        return self._seats[number]
