"""Reward functions called in this process; async ones share one event loop.

A call with a time limit runs in a thread, since Python has no other way to stop waiting
for it. The thread itself cannot be stopped and may go on in the background.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Sequence

from grpo_jax.rewards._convention import Failure, Outcome, RewardCall, RewardInputs
from grpo_jax.workers.event_loop import EventLoop

# A coroutine is cancelled at its time limit. If it has not ended this many seconds
# later, it blocks the loop.
_GRACE_SECONDS = 1.0


class LocalCalls:
    """Calls reward functions in this process."""

    def __init__(self, calls: tuple[RewardCall, ...]) -> None:
        self._calls = calls
        self._loop: EventLoop | None = None

    def start(self) -> None:
        """Does nothing: the loop starts when it is needed."""

    def run_all(
        self, inputs: RewardInputs, *, timeout: float | None
    ) -> list[Outcome | Failure]:
        """The answer of each function, each in `timeout` seconds.

        Async functions run together, while the others run one after another. An async
        function that never awaits holds up the other async ones. So one that is late
        beside others is called again alone, and only the culprit is late again.
        """
        together = [index for index, call in enumerate(self._calls) if call.is_async]
        futures = self._submit(together, inputs, timeout) if together else {}
        answers = {
            index: _run_plain(call, inputs, timeout)
            for index, call in enumerate(self._calls)
            if not call.is_async
        }
        answers |= self._collect(futures, timeout)
        if len(together) > 1:
            for index in together:
                answer = answers[index]
                if isinstance(answer, Failure) and answer.kind == "timeout":
                    answers[index] = self.run(index, inputs, timeout=timeout)
        return [answers[index] for index in range(len(self._calls))]

    def run(
        self, index: int, inputs: RewardInputs, *, timeout: float | None
    ) -> Outcome | Failure:
        """The answer of function number `index`, in `timeout` seconds."""
        call = self._calls[index]
        if not call.is_async:
            return _run_plain(call, inputs, timeout)
        return self._collect(self._submit([index], inputs, timeout), timeout)[index]

    def stop(self) -> None:
        """Ends the event loop and its thread."""
        if self._loop is not None:
            self._loop.stop()
            self._loop = None

    def _submit(
        self, indices: Sequence[int], inputs: RewardInputs, timeout: float | None
    ) -> dict[int, concurrent.futures.Future]:
        # One loop in its own thread for all functions and batches. It works where the
        # caller's thread runs a loop already, and clients that functions keep between
        # calls stay bound to a live loop.
        loop = self._loop
        if loop is None:
            loop = self._loop = EventLoop("async-rewards")
        return {
            index: loop.start(_within(self._calls[index], inputs, timeout))
            for index in indices
        }

    def _collect(
        self, futures: dict[int, concurrent.futures.Future], timeout: float | None
    ) -> dict[int, Outcome | Failure]:
        limit = None if timeout is None else timeout + _GRACE_SECONDS
        ended = concurrent.futures.wait(futures.values(), limit).done
        if len(ended) < len(futures):
            self.stop()  # the loop is blocked: abandon it, the next call has a new one
        return {
            index: future.result() if future in ended else _timed_out(timeout)
            for index, future in futures.items()
        }


async def _within(
    call: RewardCall, inputs: RewardInputs, timeout: float | None
) -> Outcome | Failure:
    """The answer of an async function; a time-out also if it came too late."""
    async with asyncio.timeout(timeout) as limit:
        answer = await call.run_async(inputs)
    end = limit.when()
    late = end is not None and asyncio.get_running_loop().time() >= end
    return _timed_out(timeout) if late else answer


def _run_plain(
    call: RewardCall, inputs: RewardInputs, timeout: float | None
) -> Outcome | Failure:
    if timeout is None:
        return call.run(inputs)
    future: concurrent.futures.Future = concurrent.futures.Future()
    # A daemon thread: a function that never returns does not keep the run from ending.
    threading.Thread(
        target=lambda: future.set_result(call.run(inputs)), name=call.name, daemon=True
    ).start()
    try:
        return future.result(timeout)
    except TimeoutError:
        return _timed_out(timeout)


def _timed_out(timeout: float | None) -> Failure:
    details = f"No answer within {timeout:.3g} s."
    return Failure(kind="timeout", cause="timeout", details=details)
