"""What all processes of a run learn at the same points: one failed, or is to stop.

Between two collective computations a process works by itself: it calls reward
functions, writes files. If one left the run there, the others would wait for ever.
"""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np

from grpo_jax.parallel import mesh as meshes


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
