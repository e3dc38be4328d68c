"""The folders of a run's checkpoints: one per step, named by its number.

Folders whose name holds `TEMPORARY` are not complete; Orbax writes into such a folder
and renames it when all is there.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from grpo_jax.checkpointing.corruption import BROKEN

TEMPORARY = "orbax-checkpoint-tmp"


@dataclass(frozen=True)
class StepFolders:
    """File operations on one folder of checkpoints; the caller is one process."""

    directory: Path

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """The steps that are complete, oldest first; none if there is no folder."""
        # Not `Path.is_dir`, which calls a folder absent that cannot be read just now.
        try:
            with os.scandir(self.directory) as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
        except BROKEN:
            return []
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def candidates(self, step: int | None) -> list[int]:
        """The steps to try, best first: this one, or all from the newest on.

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
        """Removes all but the newest `keep`, `best`, and what `keep_every` divides."""
        for step in self.steps()[:-keep]:
            if step != best and (keep_every is None or step % keep_every):
                path = self.path(step)
                # Renamed first: a step that is half removed must not look damaged.
                path = path.rename(f"{path}.old.{TEMPORARY}")
                shutil.rmtree(path, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Removes what a killed process or a failed save left, as far as possible."""
        for path in self.directory.glob(f"*{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, step: int) -> str:
        """Renames a damaged step so that its number is free; the new name."""
        name = f"{step}.damaged"
        number = 1
        while (self.directory / name).exists():
            number += 1
            name = f"{step}.damaged-{number}"
        self.path(step).rename(self.directory / name)
        return name
