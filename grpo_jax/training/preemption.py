"""Requests to stop: SIGTERM and Ctrl-C let the run save before it ends."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether the run was asked to stop."""

    requested: bool = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or SIGINT into a request; the second ends the process.

    Outside the main thread, where Python cannot handle signals, nothing is turned.
    """
    stop = StopRequest()

    def on_signal(number: int, _: FrameType | None) -> None:
        if stop.requested:
            os._exit(128 + number)
        stop.requested = True

    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # not the main thread
            previous[number] = signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
