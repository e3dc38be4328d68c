"""Warns when a policy that called its tools has stopped to call them."""

from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.reporting.metrics import CALLS


class ToolCalls:
    """Watches the steps of a run for the first without calls after some with calls."""

    def __init__(self, *, report: Callable[[str], None]) -> None:
        self._report = report
        self._last = 0.0  # calls per completion in the last step that had any
        self._told = False

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Look at the metrics of one more step; those without tools are fine."""
        calls = metrics.get(CALLS)
        if calls is None or self._told:
            return
        if calls > 0.0:
            self._last = calls
        elif self._last > 0.0:
            self._told = True
            self._report(
                f"step {step}: no completion called a tool, after {self._last:.3g} "
                "calls per completion before. If the task needs the tools, read the "
                "completions: a policy stops to call them if their results or the "
                "reward do not tell that they help. Reward what only a call makes "
                "right, or give a small reward for a call that succeeds."
            )
