"""The checkpoints of a run in a bucket, where no folder can be renamed."""

import json
from typing import Any

from grpo_jax.checkpointing._gcs import Objects
from grpo_jax.checkpointing._steps import chosen_steps, old_steps

# In a bucket, Orbax writes a checkpoint in its place, and this object last.
_COMPLETE = "commit_success.txt"


class BucketFolders:
    """As `StepFolders`, in a bucket.

    A step counts from the moment its mark of completeness is written. A checkpoint is
    removed with its mark first, so that a half-removed one does not count. Where a save
    failed, a process that is late can write into the next save of that step; its
    checksums would show it.
    """

    def __init__(self, address: str) -> None:
        self.directory = address
        self._objects = Objects(address)

    def path(self, step: int) -> str:
        """The address of a step."""
        return f"{self.directory}/{step}"

    def steps(self) -> list[int]:
        """The complete steps, oldest first."""
        return [step for step in self._begun() if self.has(step, _COMPLETE)]

    def candidates(self, step: int | None) -> list[int]:
        """As `StepFolders.candidates`."""
        return chosen_steps(self.steps(), step, self.directory)

    def has(self, step: int, name: str) -> bool:
        """Whether a part of a step is there."""
        return self._objects.has(f"{step}/{name}")

    def read_json(self, step: int, name: str) -> Any:
        """The content of a JSON file of a step."""
        return json.loads(self._objects.read(f"{step}/{name}"))

    def prepare(self, step: int) -> None:
        """Makes the place of a step free, and removes what failed saves left."""
        self.remove_leftovers()
        self._remove(step)

    def unfinished(self, step: int, number: int) -> str:
        """Where Orbax writes: at its place, whatever the `number` of the save."""
        del number
        return self.path(step)

    def complete(self, step: int, number: int) -> None:
        """Does nothing: Orbax has written the mark."""

    def remove_old(
        self, *, keep: int, keep_every: int | None, best: int | None
    ) -> None:
        """As `StepFolders.remove_old`."""
        for step in old_steps(self.steps(), keep, keep_every, best):
            self._remove(step)

    def remove_leftovers(self) -> None:
        """Removes the steps that are not complete."""
        for step in self._begun():
            if not self.has(step, _COMPLETE):
                self._objects.remove(str(step))

    def quarantine(self, step: int) -> str:
        """Moves a corrupt step aside, its mark first; returns the new name."""
        name, number = f"{step}.damaged", 1
        while self._objects.has(name):
            number += 1
            name = f"{step}.damaged-{number}"
        self._objects.remove(f"{step}/{_COMPLETE}")
        self._objects.move(str(step), name)
        return name

    def _begun(self) -> list[int]:
        names = self._objects.folders()
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def _remove(self, step: int) -> None:
        self._objects.remove(f"{step}/{_COMPLETE}")
        self._objects.remove(str(step))
