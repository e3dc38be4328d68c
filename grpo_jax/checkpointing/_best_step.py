"""Which of the stored steps is the best."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.checkpointing._corruption import BROKEN, CorruptCheckpointError
from grpo_jax.checkpointing.retention import best_mode
from grpo_jax.config import CheckpointConfig


class BestStep:
    """Compares steps by `config.keep_best`; if that is None, no step is the best."""

    def __init__(
        self,
        config: CheckpointConfig,
        read_metadata: Callable[[int], Mapping[str, Any]],
        *,
        report: Callable[[str], None],
    ) -> None:
        """`read_metadata` returns the metadata of a step on disk."""
        self._name = config.keep_best
        self._choose = max if best_mode(config) == "max" else min
        self._read_metadata = read_metadata
        self._report = report
        self._values: dict[int, float | None] = {}
        self._warned = False

    def among(self, steps: Sequence[int]) -> int | None:
        """The first step with the best value; None if no step has a value."""
        if self._name is None:
            return None
        for step in sorted(set(steps) - self._values.keys()):
            try:
                value = self._read_metadata(step)["metrics"].get(self._name)
            # Corrupt, written by another version, or by one that saved no metrics.
            # Any other error is raised: a step that cannot be read at the moment may
            # be the best one.
            except (CorruptCheckpointError, *BROKEN, ValueError, KeyError):
                value = None
            self._values[step] = value
        values = {step: self._values[step] for step in sorted(steps)}
        found = {step: value for step, value in values.items() if value is not None}
        return self._choose(found, key=found.__getitem__, default=None)

    def saving(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Forgets the old value of a step; warns once if it has no new one."""
        self._values.pop(step, None)
        if self._name is None or self._warned or metrics.get(self._name) is not None:
            return
        self._warned = True
        self._report(
            f"checkpoint {step} has no {self._name!r} and cannot be the best "
            "(reported once); evaluate at the steps that are saved, or name another "
            "metric"
        )
