"""What all processes of a run learn at the same points: one failed, or is to stop.

Between two collective computations a process works by itself: it calls reward
functions, writes files. If one left the run there, the others would wait for ever.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from grpo_jax.parallel import mesh as meshes

# Seconds between two looks at how the others fare.
_LOOK_EVERY = 0.5


def end_of_work(result: Callable[[float], object]) -> Exception | None:
    """The error of work that all processes do in the background; None if none failed.

    A process that waits for the part of one that failed is not waited for: all learn of
    the failure within a second. All must call this at the same point.

    Args:
      result: waits that many seconds for the end of the work of this process and raises
        its error, or TimeoutError if it goes on.
    """
    while True:
        start, error, ended = time.monotonic(), None, True
        try:
            result(_LOOK_EVERY)
        # Before the time is up it is an error of the work, a TimeoutError too.
        except Exception as raised:
            waited = time.monotonic() - start >= _LOOK_EVERY
            ended = not (isinstance(raised, TimeoutError) and waited)
            error = raised if ended else None
        known = meshes.gather_rows(np.array([[ended, error is not None]]))
        failed = np.flatnonzero(known[:, 1])
        if failed.size:
            return error or RuntimeError(
                f"process {failed[0]} of {jax.process_count()} could not write its part"
            )
        if known[:, 0].all():
            return None


class Agreement:
    """Ends each phase of a run on all processes, or on none.

    Attributes:
      asked: this process was asked to stop; set at any time, also by a signal.
      stop: one of the processes had been asked when the last phase ended.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stop = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the run without collective computations.

        At its end every process learns in one small all-gather whether another failed
        in it, and whether one was asked to stop. All must run the same phases in the
        same order. When a process fails elsewhere, JAX ends the others once it has
        left, at the latest after the time it allows for shutting down, 5 minutes.

        Raises:
          RuntimeError: where another process failed; the error itself is raised there.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            known = meshes.gather_rows(np.array([[self.asked, failed]]))
            self.stop = bool(known[:, 0].any())
            others = np.flatnonzero(known[:, 1])
            if not failed and others.size:
                raise RuntimeError(
                    f"process {others[0]} of {jax.process_count()} failed in "
                    f"{name!r}; its own output says why."
                )
