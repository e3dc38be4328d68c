"""Coroutines of users on one event loop: time limits, and whose code runs."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from grpo_jax.environments._generators import Stepped
from grpo_jax.environments._seat import Answer, timed_out


class Steps:
    """Runs calls of one event loop.

    A call that never pauses holds up all others, so it must be known whose code runs.
    The time in which others held the loop does not count for a call.
    """

    def __init__(self, report: Callable[[int | None], None]) -> None:
        """Reports the number of a call at each of its steps, and None after each."""
        self._report = report
        self._held = 0.0  # seconds in which some call held the loop

    async def run(
        self, number: int, coroutine: Coroutine[Any, Any, Answer], limit: float | None
    ) -> Answer:
        """The answer of a call, within `limit` seconds of its own."""
        own = 0.0

        @contextlib.contextmanager
        def step() -> Iterator[None]:
            nonlocal own
            self._report(number)
            start = time.monotonic()
            try:
                yield
            finally:
                spent = time.monotonic() - start
                own += spent
                self._held += spent
                self._report(None)

        task = asyncio.ensure_future(Stepped(coroutine, step))
        start, before = time.monotonic(), self._held
        while True:
            others = self._held - before - own
            used = time.monotonic() - start - others
            left = None if limit is None else limit - used
            if left is not None and left <= 0.0:
                break
            if (await asyncio.wait({task}, timeout=left))[0]:
                return task.result()
        assert limit is not None
        task.cancel()  # which it may ignore: it is not waited for
        return Answer(failure=timed_out(limit), seconds=limit, lost=True)
