"""Reward functions called in this process: plain ones here, async ones on one loop.

A call with a time limit runs in a thread, because Python offers no other way to stop
waiting for it; the thread itself cannot be stopped and may go on in the background.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterable

from grpo_jax.rewards.convention import Batch, Failure, Outcome, RewardCall

# A coroutine is cancelled at its limit; one that blocks the loop gets this much longer.
_GRACE_SECONDS = 1.0


class LocalCalls:
    """Calls reward functions in this process."""

    def __init__(self, calls: tuple[RewardCall, ...]) -> None:
        self._calls = calls
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Does nothing: this process runs already, and the loop starts when needed."""

    def run_all(
        self, batch: Batch, *, timeout: float | None
    ) -> list[Outcome | Failure]:
        """Returns what each function gives for the batch, each in `timeout` seconds.

        Async functions run together, and while the others run one after another. One
        that is late beside other async ones is called again by itself: a function that
        does not give way holds up all of them, and only that one shall lose by it.
        """
        together = [index for index, call in enumerate(self._calls) if call.is_async]
        futures = self._submit(together, batch, timeout)
        plain = {
            index: _run_plain(call, batch, timeout)
            for index, call in enumerate(self._calls)
            if not call.is_async
        }
        answers = plain | self._collect(futures, timeout)
        if len(together) > 1:
            for index in together:
                if _is_late(answers[index]):
                    answers[index] = self.run(index, batch, timeout=timeout)
        return [answers[index] for index in range(len(self._calls))]

    def run(
        self, index: int, batch: Batch, *, timeout: float | None
    ) -> Outcome | Failure:
        """Returns what call number `index` gives for the batch in `timeout` seconds."""
        call = self._calls[index]
        if call.is_async:
            return self._collect(self._submit([index], batch, timeout), timeout)[index]
        return _run_plain(call, batch, timeout)

    def stop(self) -> None:
        """Ends the event loop and its thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _submit(
        self, indices: Iterable[int], batch: Batch, timeout: float | None
    ) -> dict[int, concurrent.futures.Future]:
        return {
            index: asyncio.run_coroutine_threadsafe(
                _within(self._calls[index], batch, timeout), self._running_loop()
            )
            for index in indices
        }

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        # One loop in a thread for all functions and batches: it does not mind a loop
        # that runs in the caller's thread, and clients that functions keep or share
        # stay bound to a live loop.
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(
                target=_serve, args=(self._loop,), name="async-rewards", daemon=True
            ).start()
        return self._loop

    def _collect(
        self, futures: dict[int, concurrent.futures.Future], timeout: float | None
    ) -> dict[int, Outcome | Failure]:
        limit = None if timeout is None else timeout + _GRACE_SECONDS
        ended = concurrent.futures.wait(futures.values(), limit).done
        if len(ended) < len(futures):
            self.stop()  # the loop is blocked: leave it behind, the next is new
        return {
            index: future.result() if future in ended else _timed_out(timeout)
            for index, future in futures.items()
        }


async def _within(
    call: RewardCall, batch: Batch, timeout: float | None
) -> Outcome | Failure:
    """The answer of an async function; a time-out also if it came, but too late."""
    async with asyncio.timeout(timeout) as limit:
        answer = await call.run_async(batch)
    end = limit.when()
    late = end is not None and asyncio.get_running_loop().time() >= end
    return _timed_out(timeout) if late else answer


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.run_until_complete(_cancel_others())
    loop.close()


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _run_plain(
    call: RewardCall, batch: Batch, timeout: float | None
) -> Outcome | Failure:
    if timeout is None:
        return call.run(batch)
    future: concurrent.futures.Future = concurrent.futures.Future()
    # A daemon thread: a function that never returns does not keep the run from ending.
    threading.Thread(
        target=lambda: future.set_result(call.run(batch)), name=call.name, daemon=True
    ).start()
    try:
        return future.result(timeout)
    except TimeoutError:
        return _timed_out(timeout)


def _timed_out(timeout: float | None) -> Failure:
    details = f"No answer within {timeout:.3g} s."
    return Failure(kind="timeout", cause="timeout", details=details)


def _is_late(answer: Outcome | Failure) -> bool:
    return isinstance(answer, Failure) and answer.kind == "timeout"
