"""Which of the steps that exist are read, and which are removed."""

from collections.abc import Iterator, Sequence
from pathlib import Path


def chosen_steps(
    steps: list[int], step: int | None, directory: Path | str
) -> list[int]:
    """As `StepFolders.candidates`, of all steps that exist."""
    if step is None:
        return steps[::-1]
    if step in steps:
        return [step]
    raise ValueError(
        f"there is no checkpoint {step} in {directory}; steps that exist: {steps}."
    )


def old_steps(
    steps: Sequence[int], keep: int, keep_every: int | None, best: int | None
) -> Iterator[int]:
    """The steps that are no longer kept, as `StepFolders.remove_old`."""
    for step in steps[:-keep]:
        if step != best and (keep_every is None or step % keep_every):
            yield step
