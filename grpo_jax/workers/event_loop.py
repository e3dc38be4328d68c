"""An event loop in a thread of its own, for callers that are not async."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any

# How long coroutines may take to end when they are cancelled.
_END_SECONDS = 1.0


class EventLoop:
    """Runs coroutines in a daemon thread, which keeps no process from ending."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future:
        """Runs a coroutine beside the others, and gives its future answer."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Ends the loop, and cancels what runs, as soon as nothing blocks it."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(_cancel_others())
        self._loop.close()


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_END_SECONDS)
