"""Which checkpoints are stored, and which are removed."""

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_jax.checkpointing._corruption import BROKEN
from grpo_jax.checkpointing._steps import chosen_steps, old_steps
from grpo_jax.config import CheckpointConfig

# Orbax writes a checkpoint into a folder with this in its name, and renames the folder
# when it is complete: to STEP.NUMBER, which then becomes STEP.
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
        return chosen_steps(self.steps(), step, self.directory)

    def has(self, step: int, name: str) -> bool:
        """Whether a folder of a step is there."""
        try:
            (self.path(step) / name / ".").stat()
        except BROKEN:
            return False
        return True

    def read_json(self, step: int, name: str) -> Any:
        """The content of a JSON file of a step."""
        return json.loads((self.path(step) / name).read_text(encoding="utf-8"))

    def prepare(self, step: int) -> None:
        """Makes the directory, and removes what failed saves left."""
        del step  # what is at its place stays until the new one is complete
        self.directory.mkdir(parents=True, exist_ok=True)
        self.remove_leftovers()

    def unfinished(self, step: int, number: int) -> Path:
        """Where Orbax writes a step: under a name of this save alone.

        So nothing that is late can write into a checkpoint that is saved at the same
        place later.
        """
        return self.directory / f"{step}.{number}"

    def complete(self, step: int, number: int) -> None:
        """Moves what Orbax has written to its place, and removes what was there."""
        path, written = self.path(step), self.unfinished(step, number)
        old = path.with_name(f"{path.name}.old.{TEMPORARY}")
        with contextlib.suppress(FileNotFoundError):
            path.rename(old)
        try:
            written.rename(path)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def remove_old(
        self, *, keep: int, keep_every: int | None, best: int | None
    ) -> None:
        """Removes all but the newest `keep`, `best`, and multiples of `keep_every`."""
        for step in old_steps(self.steps(), keep, keep_every, best):
            path = self.path(step)
            # Renamed first: a half-removed step must not look corrupt.
            path = path.rename(f"{path}.old.{TEMPORARY}")
            shutil.rmtree(path, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Removes files of killed processes and failed saves, as far as possible."""
        for path in self.directory.glob("[0-9]*.*"):
            if TEMPORARY in path.name or re.fullmatch(r"\d+\.\d+", path.name):
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
