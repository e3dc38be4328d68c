"""Which checkpoints are stored, which is the best, and which are removed."""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_jax.checkpointing._corruption import BROKEN, CorruptCheckpointError
from grpo_jax.config import CheckpointConfig

# Orbax writes a checkpoint into a folder with this in its name, and renames the folder
# when it is complete.
TEMPORARY = "orbax-checkpoint-tmp"

_BETTER: dict[str, Literal["max", "min"]] = {
    "eval/accuracy": "max",
    "eval/reward": "max",
    "reward": "max",
    "loss": "min",
    "kl": "min",
}


@dataclass(frozen=True)
class StepFolders:
    """The folders of a run's checkpoints, one per step, named by its number.

    Methods that change files must be called on one process only.
    """

    directory: Path

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """The complete steps, oldest first; none if there is no folder."""
        # Path.is_dir would report a folder as absent when a mounted bucket fails for a
        # moment; the run would then start over.
        try:
            with os.scandir(self.directory) as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
        except BROKEN:
            return []
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def candidates(self, step: int | None) -> list[int]:
        """The steps to try in order: only `step`, or with None all, newest first.

        Raises:
          ValueError: if `step` does not exist.
        """
        steps = self.steps()
        if step is None:
            return steps[::-1]
        if step in steps:
            return [step]
        raise ValueError(
            f"there is no checkpoint {step} in {self.directory}; steps that exist: "
            f"{steps}."
        )

    def remove_old(
        self, *, keep: int, keep_every: int | None, best: int | None
    ) -> None:
        """Removes all but the newest `keep`, `best`, and multiples of `keep_every`."""
        for step in self.steps()[:-keep]:
            if step != best and (keep_every is None or step % keep_every):
                path = self.path(step)
                # Renamed first: a half-removed step must not look corrupt.
                path = path.rename(f"{path}.old.{TEMPORARY}")
                shutil.rmtree(path, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Removes files of killed processes and failed saves, as far as possible."""
        for path in self.directory.glob(f"*{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)

    def quarantine(self, step: int) -> str:
        """Renames a corrupt step so that its number is free; returns the new name."""
        name = f"{step}.damaged"
        number = 1
        while (self.directory / name).exists():
            number += 1
            name = f"{step}.damaged-{number}"
        self.path(step).rename(self.directory / name)
        return name


def best_mode(config: CheckpointConfig) -> Literal["max", "min"]:
    """Whether the best step has the largest value or the smallest ("max" without one).

    Raises:
      ValueError: if `config` does not say so and the metric is not a known one.
    """
    name = config.keep_best
    if config.best_mode is not None:
        return config.best_mode
    if name is None or re.fullmatch(r"rewards/.*/mean", name):
        return "max"
    if name not in _BETTER:
        raise ValueError(
            f"checkpoint.best_mode is needed for checkpoint.keep_best {name!r}: set "
            "'max' or 'min'; this metric has no default."
        )
    return _BETTER[name]


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
