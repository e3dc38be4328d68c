"""Warns when rewards give no signal: they are equal within every group."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.reporting._run_files import series
from grpo_jax.reporting.metrics import EQUAL_GROUPS, REWARD

_IN_A_ROW = 10  # steps before the first warning; the next comes after twice as many
_CHECK = (
    "Read the completions, and call the reward on one that you write yourself; "
    "docs/troubleshooting.md, 'The reward stays flat', says what else to try."
)


class EqualGroups:
    """Watches the steps of a run for long stretches without differing rewards."""

    def __init__(self, *, report: Callable[[str], None]) -> None:
        self._report = report
        self._first: int | None = None  # step at which the stretch began
        self._next = _IN_A_ROW

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Look at the metrics of one more step."""
        if metrics.get(EQUAL_GROUPS) != 1.0:
            self._first, self._next = None, _IN_A_ROW
            return
        self._first = self._first or step
        if step - self._first + 1 < self._next:
            return
        self._next *= 2
        self._report(
            f"steps {self._first} to {step}: in no group of completions did rewards "
            f"differ, so they taught nothing. {_CHECK}"
        )


def taught_nothing(history: Sequence[Mapping[str, Any]]) -> str | None:
    """A message for the end of a run in which rewards never differed; else None.

    Args:
      history: the lines of the run's metrics.
    """
    steps = [line for line in history if line["step"] > 0]
    if not steps or any(line.get(EQUAL_GROUPS) != 1.0 for line in steps):
        return None
    _, rewards = series(steps, REWARD)
    low, high = min(rewards, default=None), max(rewards, default=None)
    seen = "no completion had one" if low is None else f"the mean was {low:.4g}"
    if low != high:
        seen += f" to {high:.4g}"
    return (
        f"in none of the {len(steps)} steps did rewards differ within a group of "
        f"completions ({seen}), so this run learned nothing from them. {_CHECK}"
    )
