"""References that a run has made on its way, kept so that a resumed run finds its own.

With `objective.reference_every` the reference is the policy of an earlier step. No
checkpoint of the run holds it, so each is saved by itself, under ``references/<step>``.
"""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp

from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.config import CheckpointConfig, TrainConfig
from grpo_jax.training.learner import Learner
from grpo_jax.training.state import TrainState, state_items


class References:
    """The references of a run; does nothing when the first one stays for good."""

    def __init__(
        self, directory: Path, config: TrainConfig, *, report: Callable[[str], None]
    ) -> None:
        self._every = config.objective.reference_every
        # Each checkpoint that is kept must find its reference.
        steps = config.checkpoint.keep * config.checkpoint.every
        keep = CheckpointConfig(keep=steps // (self._every or steps) + 2)
        self._saved = Checkpoints(
            directory, keep, report=lambda text: report(f"the reference's {text}")
        )
        self._unsaved: int | None = None  # the step of a reference not on disk

    def refresh_after(self, step: int, learner: Learner) -> None:
        """Make the policy the reference, and save it, if it is due after this step."""
        if self._every is None or step % self._every:
            return
        learner.refresh_reference()
        if learner.reference is not None:
            self._unsaved = step
            self.are_saved(learner)

    def are_saved(self, learner: Learner) -> bool:
        """Whether the reference is on disk, where checkpoints will look for it.

        One that could not be saved when it was made is tried again.
        """
        if self._unsaved is None or learner.reference is None:
            return True
        kept = learner.reference[_renewed(learner)]
        only = TrainState(step=jnp.int32(self._unsaved), params=kept, opt_state=())
        failed = self._saved.failed_saves
        self._saved.save(self._unsaved, state_items(only), {}, wait=True)
        if self._saved.failed_saves > failed:
            return False
        self._unsaved = None
        return True

    def restore_at(self, step: int, learner: Learner) -> None:
        """Give the learner the reference that it had after this step.

        Raises:
          ValueError: if that reference is not there or is damaged.
        """
        made = step // self._every * self._every if self._every else 0
        if made and learner.reference is not None:
            name = _renewed(learner)
            if name not in learner.reference:
                learner.refresh_reference()  # for the places of its arrays
            like = learner.reference[name]
            _, params, _ = self._saved.restore_params(made, like=like)
            learner.reference = {**learner.reference, name: params}


def _renewed(learner: Learner) -> str:
    """The collection of the reference that changes; a frozen base does not."""
    return "params" if learner.base is None else "lora"
