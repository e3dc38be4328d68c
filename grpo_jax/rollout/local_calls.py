"""Reward functions called in this process: plain ones here, async ones on one loop.

A call with a time limit runs in a thread, because Python offers no other way to stop
waiting for it; the thread itself cannot be stopped and may go on in the background.
"""

import asyncio
import concurrent.futures
import threading

from grpo_jax.rollout.reward_call import Batch, Failure, Outcome, RewardCall

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

        Async functions run together, and while the others run one after another.
        """
        futures = {
            index: self._submit(call, batch, timeout)
            for index, call in enumerate(self._calls)
            if call.is_async
        }
        plain = {
            index: _run_plain(call, batch, timeout)
            for index, call in enumerate(self._calls)
            if not call.is_async
        }
        return [
            plain[index] if index in plain else self._wait(futures[index], timeout)
            for index in range(len(self._calls))
        ]

    def run(
        self, index: int, batch: Batch, *, timeout: float | None
    ) -> Outcome | Failure:
        """Returns what call number `index` gives for the batch in `timeout` seconds."""
        call = self._calls[index]
        if call.is_async:
            return self._wait(self._submit(call, batch, timeout), timeout)
        return _run_plain(call, batch, timeout)

    def stop(self) -> None:
        """Ends the event loop and its thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _submit(
        self, call: RewardCall, batch: Batch, timeout: float | None
    ) -> concurrent.futures.Future:
        # One loop in a thread for all batches: it does not mind a loop that runs in the
        # caller's thread, and clients that a function keeps stay bound to a live loop.
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(
                target=_serve, args=(self._loop,), name="async-rewards", daemon=True
            ).start()
        limited = asyncio.wait_for(call.run_async(batch), timeout)
        return asyncio.run_coroutine_threadsafe(limited, self._loop)

    def _wait(
        self, future: concurrent.futures.Future, timeout: float | None
    ) -> Outcome | Failure:
        try:
            return future.result(None if timeout is None else timeout + _GRACE_SECONDS)
        except TimeoutError as error:
            if not future.done():
                self.stop()  # the loop is blocked: leave it behind, the next is new
            return _timed_out(error, timeout)


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
    except TimeoutError as error:
        return _timed_out(error, timeout)


def _timed_out(error: TimeoutError, timeout: float | None) -> Failure:
    return Failure(
        kind="timeout",
        cause="timeout",
        details=f"No answer within {timeout:.3g} s.",
        exception=error,
    )
