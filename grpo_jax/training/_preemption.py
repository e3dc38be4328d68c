"""Requests to stop: SIGTERM and Ctrl-C let a run save before it ends.

The handlers are Python's. JAX's preemption notice knows SIGTERM only and polls it once
a second. A request to one process reaches all of them at the end of each phase of a
step (`Agreement.phase`). The current step is abandoned there, unless its update has
begun, and the last finished step is saved.

Nothing can be saved within a phase. If the machine is taken away before its end, the
run resumes from its last checkpoint, in the same bits.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping

from grpo_jax.parallel.agreement import Agreement

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PHASES = ("time/rollout", "time/reward", "time/score", "time/update", "time/eval")


@contextlib.contextmanager
def stop_requests(agreement: Agreement) -> Iterator[None]:
    """Turns the first SIGTERM or SIGINT into a request; the second ends the process.

    The second ends it at once, with status 128 + its number, even while the main thread
    waits for a device or a compiler. Outside the main thread Python cannot handle
    signals, and they are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: object) -> None:
        agreement.asked = True

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reading, agreement), daemon=True)
    watch.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: set by other means than Python, which cannot be set again.
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(woken)
        os.close(writing)
        watch.join()
        os.close(reading)


class GraceCheck:
    """Warns, once, if a phase of a step takes longer than the grace period.

    Steps in which something was compiled do not count.
    """

    def __init__(self, grace_seconds: float, *, report: Callable[[str], None]) -> None:
        self._grace = grace_seconds
        self._report = report
        self._compiled = -1.0
        self._told = False

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Look at the times of one more step."""
        del step  # as `EqualGroups.check`, which names it
        before, self._compiled = self._compiled, metrics.get("compile/count", 0.0)
        seconds, name = max((metrics.get(name, 0.0), name) for name in _PHASES)
        if self._told or seconds <= self._grace or self._compiled > before:
            return
        self._told = True
        self._report(
            f"{name.removeprefix('time/')} took {seconds:.0f} s, longer than "
            f"checkpoint.grace_seconds {self._grace:g}: a run that is stopped in it "
            "may lose the steps after its last checkpoint; lower checkpoint.every"
        )


def _watch(reading: int, agreement: Agreement) -> None:
    """Sees signals when they arrive: Python's handlers wait for the main thread."""
    requests = 0
    while arrived := os.read(reading, 1):
        if arrived[0] not in _SIGNALS:
            continue
        requests += 1
        if requests > 1:
            os._exit(128 + arrived[0])
        agreement.asked = True
        _LOG.info(
            "%s: the run will be saved at the end of this phase; a second signal ends "
            "it at once",
            signal.Signals(arrived[0]).name,
        )
