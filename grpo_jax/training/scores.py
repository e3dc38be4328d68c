"""How often completions are right: accuracy, pass@k and majority@k, with their errors.

Answers are read in two ways. The strict one asks for the format that the task asked
for; the lenient one takes the answer wherever the completion ends with one.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from grpo_jax.tasks.base import Row


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


def _standard_error(values: Float[np.ndarray, " N"]) -> float:
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value
