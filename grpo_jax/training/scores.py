"""How often completions are right: accuracy, pass@k and majority@k, with their errors.

Answers are read in two ways. The strict one asks for the format that the task asked
for; the lenient one takes the answer wherever the completion ends with one.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout.collect import score_rows
from grpo_jax.tasks.base import AnswerReader, Row, Task

_BATCH = 64  # answers that a verdict is asked for at once


@dataclass(frozen=True)
class Completed:
    """Texts and token ids, one list of samples per prompt."""

    texts: list[list[str]]
    ids: list[list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Completions of held-out prompts, and which of them are right.

    Attributes:
      correct: ``[prompts, samples]``.
      completions: texts, one list per prompt.
      answers: what each completion answers, None for nothing; by default its text
        without the spaces around it.
      lenient: the same completions with their answers read leniently; None where the
        task knows one way only.
    """

    correct: Bool[np.ndarray, "N S"]
    completions: Sequence[Sequence[str]]
    answers: Sequence[Sequence[Hashable | None]] | None = None
    lenient: "Evaluation | None" = None

    @property
    def accuracy(self) -> float:
        """Mean share of right completions."""
        return float(self.correct.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy over prompts; NaN for a single prompt."""
        return _standard_error(self.correct.mean(axis=1))

    def pass_at(self, k: int) -> float:
        """Probability that one of k completions is right, without bias.

        The mean over prompts of 1 - C(n - c, k) / C(n, k), for c right ones among n
        samples: Chen et al. 2021, eq. 1, https://arxiv.org/abs/2107.03374.

        Raises:
          ValueError: if k is not between 1 and the number of samples.
        """
        return float(self._pass_at(k).mean())

    def majority(self) -> float:
        """Share of prompts whose most frequent answer is right (majority@samples).

        Completions without an answer do not vote. Of equally frequent answers, the one
        that was given first counts.
        """
        return float(self._majority().mean())

    def summary(self) -> dict[str, Any]:
        """The numbers, each with its standard error, ready for JSON.

        ``pass@k`` for k = 1, 2, 4 and so on, and ``majority@n``, where there are
        several samples; ``lenient`` holds the same for the lenient reading. Standard
        errors are those of a mean over prompts: null for a single prompt.
        """
        prompts, samples = self.correct.shape
        counts = {"prompts": prompts, "samples": samples}
        lenient = {} if self.lenient is None else {"lenient": self.lenient._numbers()}
        return counts | self._numbers() | lenient

    def records(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """A JSON object per completion: prompt, text, answer found, right or wrong."""
        for number, group in enumerate(self.completions):
            for sample, text in enumerate(group):
                record = {
                    "prompt": rows[number]["prompt"],
                    "completion": text,
                    **self._verdict(number, sample),
                }
                if self.lenient is not None:
                    record["lenient"] = self.lenient._verdict(number, sample)
                yield record

    def _verdict(self, number: int, sample: int) -> dict[str, Any]:
        found = self._answers()[number][sample]
        return {
            "answer": None if found is None else str(found),
            "correct": bool(self.correct[number, sample]),
        }

    def _answers(self) -> Sequence[Sequence[Hashable | None]]:
        if self.answers is not None:
            return self.answers
        return [[text.strip() or None for text in group] for group in self.completions]

    def _numbers(self) -> dict[str, Any]:
        samples = self.correct.shape[1]
        values: dict[str, Any] = {
            "accuracy": self.accuracy,
            "standard_error": _or_null(self.standard_error),
        }
        if samples == 1:
            return values
        powers = [1 << i for i in range(samples.bit_length()) if 1 << i <= samples]
        rates = {f"pass@{k}": self._pass_at(k) for k in powers}
        rates[f"majority@{samples}"] = self._majority()
        for name, rate in rates.items():
            values[name] = float(rate.mean())
            values[f"{name}/standard_error"] = _or_null(_standard_error(rate))
        return values

    def _pass_at(self, k: int) -> Float[np.ndarray, " N"]:
        samples = self.correct.shape[1]
        if not 1 <= k <= samples:
            raise ValueError(f"k must be between 1 and {samples} samples, got {k}.")
        missed = [
            math.comb(samples - int(right), k) / math.comb(samples, k)
            for right in self.correct.sum(axis=1)
        ]
        return 1.0 - np.array(missed)

    def _majority(self) -> Float[np.ndarray, " N"]:
        right = []
        for verdicts, given in zip(self.correct, self._answers(), strict=True):
            votes = Counter(answer for answer in given if answer is not None)
            winner = votes.most_common(1)[0][0] if votes else None
            right.append(
                winner is not None and bool(verdicts[list(given).index(winner)])
            )
        return np.array(right, np.float64)


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


def _standard_error(values: Float[np.ndarray, " N"]) -> float:
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value
