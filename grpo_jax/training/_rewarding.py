"""The reward functions of a run, checked against its rows and its best step."""

import dataclasses
import difflib
from collections.abc import Sequence

from grpo_jax.checkpointing.retention import best_mode
from grpo_jax.config import TrainConfig
from grpo_jax.environments.host import Host
from grpo_jax.reporting import metrics as names
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.tasks.base import Task
from grpo_jax.training._held_out import held_out_rows
from grpo_jax.training._judge import has_ground_truth


def make_runner(
    config: TrainConfig, task: Task, host: Host | None = None
) -> RewardRunner:
    """The reward functions of the task, called as `config` and the task ask for.

    Args:
      host: gives them further columns.

    Raises:
      ValueError: for rows without a column that a function needs, and for a
        `checkpoint.keep_best` that is no metric of this run.
    """
    chosen = dataclasses.replace(
        config.rewards,
        # A task that plays has the weights of the configuration in its own.
        weights=(None if host else config.rewards.weights) or task.reward_weights,
        isolate=config.rewards.isolate or task.isolate,
    )
    runner = RewardRunner(task.rewards, chosen, max_steps=config.steps)
    played = set() if host is None else set(host.columns)
    if chosen.isolate:
        played.discard("environments")
    runner.check_columns((*task.train[0], *played))
    held_out, judged = held_out_rows(task, config), has_ground_truth(task)
    if held_out and not judged:
        runner.check_columns((*held_out[0], *played), of="the held-out rows")
    measured = names.ACCURACY if judged else names.EVAL_REWARD
    known = [
        *([measured] if held_out else []),
        *(names.REWARD, "loss", names.ENTROPY),
        *([names.KL] if config.objective.kl_coef else []),
        *(f"rewards/{function}/mean" for function in runner.names),
    ]
    _check_best(config.checkpoint.keep_best, known, runner)
    best_mode(config.checkpoint)  # which must be known before anything is saved
    return runner


def _check_best(best: str | None, known: Sequence[str], runner: RewardRunner) -> None:
    if best is None or best in known:
        return
    reserved = best.startswith("eval/") or best in ("accuracy", names.KL)
    if runner.may_log_metrics and not reserved:
        return
    near = difflib.get_close_matches(best, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
    raise ValueError(
        f"checkpoint.keep_best {best!r} is no metric of this run to choose by; {hint}"
    )
