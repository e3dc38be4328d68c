"""Global random generators, seeded for one call and then as they were.

Many games draw from Python's `random` or NumPy's global generator. With the same seed
they begin in the same state.
"""

import contextlib
import functools
import random
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds both generators, and in the end gives them their old states back.

    They belong to the process, so one call at a time may use it.
    """
    with Draws(seed).in_use():
        yield


class Draws:
    """The states of both generators for one call, between its parts as well."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: tuple[Any, Any] | None = None  # None before the first part

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The generators go on where the last part of the call left them."""
        others = _states()
        if self._states is None:
            random.seed(self._seed)
            np.random.seed(self._seed % 2**32)
        else:
            _set_states(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _set_states(others)


class Stepped:
    """A coroutine to await, with something done around each of its steps.

    A step is what runs between two pauses. Nothing else of the event loop runs during
    a step, which is why the generators of the process can be lent to it.
    """

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        around: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._coroutine = coroutine
        self._around = around

    def __await__(self) -> Generator[Any, Any, Any]:
        step = functools.partial(self._coroutine.send, None)
        while True:
            ended, value = False, None
            with self._around():
                try:
                    value = step()
                except StopIteration as stop:
                    ended, value = True, stop.value
            if ended:
                return value
            try:
                sent = yield value
            except BaseException as error:  # a cancellation, which the coroutine sees
                step = functools.partial(self._coroutine.throw, error)
            else:
                step = functools.partial(self._coroutine.send, sent)


def _states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _set_states(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
