"""Decides which completions are right, by the rules of the task."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout.episodes import Played
from grpo_jax.rollout.scoring import score_rows
from grpo_jax.tasks.base import AnswerReader, Row, Task
from grpo_jax.training.scores import Evaluation

_BATCH = 64  # answers that a verdict is asked for at once


@dataclass(frozen=True)
class Completed:
    """Texts and token ids, one list of samples per prompt.

    Attributes:
      texts: what is judged: the completion; of an episode the policy's last turn.
      completions: what reward functions see, where that differs from the texts.
      played: what the environments did; None without them.
      cut: whether the limit of tokens ended a completion, or dropped an answer of its
        environment.
    """

    texts: list[list[str]]
    ids: list[list[list[int]]]
    completions: list[list[Any]] | None = None
    played: Played | None = None
    cut: Bool[np.ndarray, "N S"] | None = None


def has_ground_truth(task: Task) -> bool:
    """Whether the task can judge a completion as right or wrong."""
    return task.is_correct is not None or task.verdict is not None


def judge(
    completed: Completed, rows: Sequence[Row], task: Task, *, lenient: bool = True
) -> Evaluation:
    """The evaluation of one list of completions per row.

    With `lenient`, also of the lenient reading, where the task has one.

    A task with a `verdict` is judged by it, in the worker process if the task asks for
    isolation; a completion that cannot be judged in time is wrong.
    """
    strict = _judge(completed, rows, task, task.answer, task.is_correct)
    reader, is_correct = task.answer_lenient, task.is_correct_lenient
    if not lenient or reader is None or (is_correct or task.verdict) is None:
        return strict
    relaxed = _judge(completed, rows, task, reader, is_correct)
    return dataclasses.replace(strict, lenient=relaxed)


def _judge(
    completed: Completed,
    rows: Sequence[Row],
    task: Task,
    reader: AnswerReader,
    is_correct: Callable[[str, Row], bool] | None,
) -> Evaluation:
    answers = [
        [reader(text, row) for text in group]
        for group, row in zip(completed.texts, rows, strict=True)
    ]
    if is_correct is not None:
        correct = [
            [is_correct(text, row) for text in group]
            for group, row in zip(completed.texts, rows, strict=True)
        ]
    else:
        correct = _verdicts(answers, completed.ids, rows, task)
    return Evaluation(
        correct=np.array(correct), completions=completed.texts, answers=answers
    )


def _verdicts(
    answers: Sequence[Sequence[Hashable | None]],
    ids: Sequence[Sequence[Sequence[int]]],
    rows: Sequence[Row],
    task: Task,
) -> Bool[np.ndarray, "N S"]:
    """Which answers the task's verdict finds right; no answer is wrong."""
    assert task.verdict is not None, "has_ground_truth() is asked first"
    correct = np.zeros((len(answers), len(answers[0])), bool)
    places = [
        (n, s)
        for n, group in enumerate(answers)
        for s, answer in enumerate(group)
        if answer is not None
    ]
    config = RewardsConfig(isolate=task.isolate)
    with RewardRunner((task.verdict,), config) as runner:
        # The time limit is one of a batch, and what hangs costs its batch a retry.
        for start in range(0, len(places), _BATCH):
            batch = places[start : start + _BATCH]
            scores = score_rows(
                runner,
                [rows[n] for n, _ in batch],
                [str(answers[n][s]) for n, s in batch],
                [ids[n][s] for n, s in batch],
                step=0,
            )
            for (n, s), total in zip(batch, scores.total, strict=True):
                correct[n, s] = total == 1.0
    return correct
