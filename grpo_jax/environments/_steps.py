"""Coroutines of users on one event loop: time limits, and whose code runs."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine
from typing import Any

from grpo_jax.environments._generators import Stepped
from grpo_jax.environments._seat import Answer, timed_out


class Steps:
    """Runs calls of one event loop.

    A call that never pauses holds up all others, so it must be known whose code runs.
    The time in which others held the loop does not count for a call: neither for its
    limit nor in the seconds of its answer.
    """

    def __init__(self, report: Callable[[int | None], None]) -> None:
        """Reports the number of a call at each of its steps, and None after each."""
        self.report = report
        self.held = 0.0  # seconds in which some call held the loop, or its thread

    async def run(
        self, number: int, coroutine: Coroutine[Any, Any, Answer], limit: float | None
    ) -> Answer:
        """The answer of a call, within `limit` seconds of its own."""
        meter = _Meter(self, number)
        task = asyncio.ensure_future(Stepped(coroutine, lambda: meter))
        start, before = time.monotonic(), self.held
        while True:
            others = self.held - before - meter.own
            used = time.monotonic() - start - others
            left = None if limit is None else limit - used
            if task.done():
                return dataclasses.replace(task.result(), seconds=used)
            if left is not None and left <= 0.0:
                break
            await asyncio.wait({task}, timeout=left)
        assert limit is not None
        task.cancel()  # which it may ignore: it is not waited for
        return Answer(failure=timed_out(limit), seconds=limit, lost=True)


class _Meter:
    """A context for each step of one call, which tells its time and whose it is."""

    def __init__(self, steps: Steps, number: int) -> None:
        self._steps = steps
        self._number = number
        self._start = 0.0
        self.own = 0.0  # seconds in which the call held the loop

    def __enter__(self) -> None:
        self._steps.report(self._number)
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        spent = time.monotonic() - self._start
        self.own += spent
        self._steps.held += spent
        self._steps.report(None)
