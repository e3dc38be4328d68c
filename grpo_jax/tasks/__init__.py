"""Tasks: prompts and their rewards. `load_task` finds a task by its name."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path

from grpo_jax.tasks.arithmetic import arithmetic_task
from grpo_jax.tasks.base import (
    RewardFunction,
    Row,
    Task,
    reward_functions,
    task_from_rows,
)
from grpo_jax.tasks.gsm8k import gsm8k_task
from grpo_jax.tasks.jsonl import jsonl_task
from grpo_jax.tasks.reasoning_gym import reasoning_gym_task

__all__ = ["RewardFunction", "Task", "load_task", "task_from_rows"]

_CHOICES = ("arithmetic", "gsm8k", "gsm8k:boxed", "reasoning_gym:NAME", "FILE.jsonl")


def names_file(task: str) -> bool:
    """Whether a task's name is the path of its rows, not the name of a task."""
    return task.partition(":")[0] not in [c.partition(":")[0] for c in _CHOICES]


def load_task(name: str, *, data: str | None = None, seed: int = 0) -> Task:
    r"""Returns the task of that name.

    `arithmetic`, `gsm8k`, `gsm8k:boxed` (the same with answers in `\boxed{}`),
    `reasoning_gym:NAME`, or the path of a `.jsonl` file or of a folder with
    `train.jsonl`. `data` is the local file or folder that GSM8K reads;
    `seed` decides which problems reasoning_gym makes. Raises `ValueError` for an
    unknown name, rows that cannot be read, a missing library, or `data` with a task
    that takes none.
    """
    if data is not None and name not in ("gsm8k", "gsm8k:boxed"):
        raise ValueError(
            f"task {name!r} takes no data, got {data!r}; only gsm8k does. For your own "
            "rows give the .jsonl file as the task."
        )
    if name == "arithmetic":
        return arithmetic_task()
    if name in ("gsm8k", "gsm8k:boxed"):
        return gsm8k_task(data, boxed=name == "gsm8k:boxed")
    kind, _, rest = name.partition(":")
    if kind == "reasoning_gym":
        return reasoning_gym_task(rest, seed=seed)
    if name.endswith(".jsonl") or (name and Path(name).is_dir()):
        return jsonl_task(name)
    near = difflib.get_close_matches(kind, [c.partition(":")[0] for c in _CHOICES], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"unknown task {name!r}.{hint} Choices: {', '.join(_CHOICES)} or a folder with "
        "train.jsonl."
    )


def choose_task(
    name: str,
    *,
    data: str | None = None,
    seed: int = 0,
    dataset: Sequence[Row] | None = None,
    rewards: RewardFunction | Sequence[RewardFunction] | None = None,
    eval_dataset: Sequence[Row] | None = None,
) -> Task:
    """The caller's own rows and rewards if there are any, else the task of that name.

    Rewards without rows replace those of the task.

    Raises:
      ValueError: if rows come without rewards, or the task cannot be loaded.
    """
    if dataset is not None:
        if rewards is None:
            raise ValueError(
                "a dataset needs rewards: functions that score completions."
            )
        return task_from_rows(dataset, rewards, eval_rows=eval_dataset)
    if eval_dataset is not None:
        raise ValueError("eval_dataset needs a dataset; give both or neither.")
    task = load_task(name, data=data, seed=seed)
    if rewards is None:
        return task
    functions = reward_functions(rewards)
    return dataclasses.replace(task, rewards=functions, reward_weights=None)
