"""Warns when a policy has stopped to call its tools, or has not begun to."""

from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.reporting.metrics import CALLS

# Steps without a call before it is told that there was none.
_STEPS = 10


class ToolCalls:
    """Watches the steps of a run for the first without calls after some with calls.

    Also for the first ten, if none of them had any.
    """

    def __init__(self, *, report: Callable[[str], None]) -> None:
        self._report = report
        self._last = 0.0  # calls per completion in the last step that had any
        self._silent = 0  # steps before the first call
        self._told = False

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Look at the metrics of one more step; those without tools are fine."""
        calls = metrics.get(CALLS)
        if calls is None or self._told:
            return
        if calls > 0.0:
            self._last = calls
            return
        self._silent += self._last == 0.0
        if self._last == 0.0 and self._silent == _STEPS:
            self._told = True
            self._report(
                f"step {step}: no completion of {_STEPS} steps called a tool. Read the "
                "completions: some models write calls in another form than their chat "
                "template asks for, and what is never sampled is never learned; see "
                "docs/environments.md."
            )
        elif self._last > 0.0:
            self._told = True
            self._report(
                f"step {step}: no completion called a tool, after {self._last:.3g} "
                "calls per completion before. If the task needs the tools, read the "
                "completions: a policy stops to call them if their results or the "
                "reward do not tell that they help. Reward what only a call makes "
                "right, or give a small reward for a call that succeeds."
            )
