"""Which checkpoint is the best, by a number that was saved with each."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from grpo_jax.checkpointing.corruption import BROKEN, DamageError
from grpo_jax.config import CheckpointConfig

_BETTER: dict[str, Literal["max", "min"]] = {
    "eval/accuracy": "max",
    "eval/reward": "max",
    "reward": "max",
    "loss": "min",
    "kl": "min",
}


def best_mode(config: CheckpointConfig) -> Literal["max", "min"]:
    """Whether the best step has the largest value or the smallest ("max" without one).

    Raises:
      ValueError: for a metric of which that must be said, and is not.
    """
    name = config.keep_best
    if config.best_mode is not None:
        return config.best_mode
    if name is None or re.fullmatch(r"rewards/.*/mean", name):
        return "max"
    if name not in _BETTER:
        raise ValueError(
            f"checkpoint.best_mode is needed for checkpoint.keep_best {name!r}: 'max' "
            "or 'min', of which nothing is known for this metric."
        )
    return _BETTER[name]


class BestStep:
    """Compares steps by `config.keep_best`; without one no step is the best."""

    def __init__(
        self,
        config: CheckpointConfig,
        inventory_of: Callable[[int], Mapping[str, Any]],
        *,
        report: Callable[[str], None],
    ) -> None:
        """`inventory_of` reads the inventory of a step; damage means none."""
        self._name = config.keep_best
        self._choose = max if best_mode(config) == "max" else min
        self._inventory_of = inventory_of
        self._report = report
        self._values: dict[int, float | None] = {}
        self._warned = False

    def among(self, steps: Sequence[int]) -> int | None:
        """The first of those with the best value; None where no step has one."""
        if self._name is None:
            return None
        values = {step: self._value(step) for step in sorted(steps)}
        found = {step: value for step, value in values.items() if value is not None}
        return self._choose(found, key=found.__getitem__, default=None)

    def named(self, steps: Sequence[int]) -> int:
        """As `among`; raises ValueError where no step is known to be the best."""
        best = self.among(steps)
        if best is None:
            raise ValueError(
                "no checkpoint is known to be the best: the run's checkpoint.keep_best "
                f"is {self._name!r}; steps that exist: {list(steps)}."
            )
        return best

    def saving(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Forget what the step was before; tell, once, if it cannot be the best."""
        self._values.pop(step, None)
        if self._name is None or self._warned or metrics.get(self._name) is not None:
            return
        self._warned = True
        self._report(
            f"checkpoint {step} has no {self._name!r} and cannot be the best (told "
            "once); evaluate where you save, or name another metric"
        )

    def _value(self, step: int) -> float | None:
        if step not in self._values:
            try:
                value = self._inventory_of(step)["metrics"].get(self._name)
            # Damaged, of another version, or of one that saved no metrics. What cannot
            # be read just now may be the best: such an error is the caller's.
            except (DamageError, *BROKEN, ValueError, KeyError):
                value = None
            self._values[step] = value
        return self._values[step]
