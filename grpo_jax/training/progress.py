"""`Progress`, which is saved with the state, and `TrainResult`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from grpo_jax.reporting import metrics as names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands; saved with the state, so that a resumed run loses nothing."""

    step: int = 0  # steps done
    position: int = 0  # prompts drawn
    skipped: int = 0  # steps in a row whose updates were skipped
    seconds: float = 0.0  # spent in training, over all starts
    measured_at: int | None = None  # the step of the newest evaluation
    # Results of the first and the newest evaluation; None if the task has no such one.
    accuracy_before: float | None = None
    accuracy: float | None = None
    eval_reward_before: float | None = None
    eval_reward: float | None = None

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> "Progress":
        """From a checkpoint, without fields that only another version knows."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in known})

    def is_due(self, every: int | None) -> bool:
        """Whether this step is a multiple of `every`; never for None and 0."""
        return bool(every) and self.step % every == 0

    def after_step(self, *, drawn: int, skipped: bool) -> "Progress":
        """The progress after one more step, which drew that many prompts."""
        return dataclasses.replace(
            self,
            step=self.step + 1,
            position=self.position + drawn,
            skipped=self.skipped + 1 if skipped else 0,
        )

    def evaluated(self, metrics: Mapping[str, float]) -> "Progress":
        """The progress with a new evaluation; before any step it is the first one."""
        after = "" if self.step else "_before"
        measured = {
            f"accuracy{after}": metrics.get(names.ACCURACY),
            f"eval_reward{after}": metrics.get(names.EVAL_REWARD),
        }
        return dataclasses.replace(self, measured_at=self.step, **measured)

    def summary(self, *, finished: bool) -> dict[str, Any]:
        """Fields of `summary.json`; only a finished run has numbers "after"."""
        return {
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy if finished else None,
            "eval_reward_before": self.eval_reward_before,
            "eval_reward_after": self.eval_reward if finished else None,
            "steps": self.step,
            "seconds": self.seconds,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves.

    Attributes:
      params: the trained parameters; with LoRA, those of the model with the adapters
        merged.
      tokenizer: the model's tokenizer.
      run_dir: where everything is kept, a folder or the address of one in a bucket.
      history: one dict of metrics per step, with ``step``.
      summary: ``accuracy_before`` and ``accuracy_after``, or ``eval_reward_before`` and
        ``eval_reward_after`` where nothing knows what is right; ``steps``, ``seconds``,
        ``params_sha256`` and ``status`` ("finished" or "preempted").
    """

    params: PyTree
    tokenizer: Any
    run_dir: Path | str
    history: list[dict[str, Any]]
    summary: dict[str, Any]
