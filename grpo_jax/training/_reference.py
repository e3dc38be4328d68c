"""References that a run has made on its way, saved so that a resumed run has its own.

With `objective.reference_every` the reference is the policy of an earlier step. The
run's checkpoints do not hold it, so it is saved on its own, in ``references/<step>``.
"""

from collections.abc import Callable

import jax.numpy as jnp

from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.config import CheckpointConfig, TrainConfig
from grpo_jax.training.learner import Learner
from grpo_jax.training.state import TrainState, state_items


class References:
    """The references of a run; does nothing when the first one stays for good."""

    def __init__(
        self, directory: str, config: TrainConfig, *, report: Callable[[str], None]
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
        if learner.has_reference:
            self._unsaved = step
            self.save_pending(learner)

    def save_pending(self, learner: Learner) -> bool:
        """Save the newest reference, unless it is on disk; returns whether it is now.

        A reference whose save failed is tried again here: a checkpoint without its
        reference could not be resumed.
        """
        if self._unsaved is None:
            return True
        params = learner.reference_on_devices()[_renewed(learner)]
        only = TrainState(step=jnp.int32(self._unsaved), params=params, opt_state=())
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
        if not made or not learner.has_reference:
            return
        name, reference = _renewed(learner), learner.reference_on_devices()
        if name not in reference:
            # A copy of the policy has the shardings of the arrays.
            learner.refresh_reference()
            reference = learner.reference_on_devices()
        _, params, _ = self._saved.restore_params(made, like=reference[name])
        learner.set_reference({**reference, name: params})


def _renewed(learner: Learner) -> str:
    """The collection of the reference that changes; a frozen base does not."""
    return "params" if learner.base is None else "lora"
