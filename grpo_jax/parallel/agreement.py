"""Agreement of all processes of a run: whether one failed, or is to stop.

Between two collective computations each process works alone: it calls reward functions
and writes files. If one left the run there, the others would wait forever.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from grpo_jax.parallel import mesh

# Seconds after which a waiting process asks whether another has failed.
_POLL_SECONDS = 0.5


def end_of_work(result: Callable[[float], object]) -> Exception | None:
    """The error of background work that all processes share; None if none failed.

    All return within a second of a failure, although a process that waits for the part
    of the failed one still goes on. All must call this at the same point.

    Args:
      result: called with a number of seconds; waits that long for the end of this
        process's work and raises its error, or TimeoutError if it still runs.
    """
    while True:
        start, error, ended = time.monotonic(), None, True
        try:
            result(_POLL_SECONDS)
        # A TimeoutError before the time is up is an error of the work itself.
        except Exception as raised:
            waited = time.monotonic() - start >= _POLL_SECONDS
            ended = not (isinstance(raised, TimeoutError) and waited)
            error = raised if ended else None
        known = mesh.gather_rows(np.array([[ended, error is not None]]))
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

        At its end one small all-gather shows every process whether another failed in
        it, and whether one was asked to stop. All must run the same phases in the same
        order. When a process fails outside of a phase, JAX ends the others once it has
        left, at the latest after JAX's time limit for a shutdown, 5 minutes.

        Raises:
          RuntimeError: where another process failed; the error itself is raised there.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            known = mesh.gather_rows(np.array([[self.asked, failed]]))
            self.stop = bool(known[:, 0].any())
            others = np.flatnonzero(known[:, 1])
            if not failed and others.size:
                raise RuntimeError(
                    f"process {others[0]} of {jax.process_count()} failed in "
                    f"{name!r}; its own output says why."
                )
