"""How often completions are right: accuracy, pass@k and majority@k, with their errors.

Answers are read in two ways. The strict one asks for the format that the task asked
for; the lenient one takes the answer wherever the completion ends with one.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from grpo_jax.reporting.metrics import CLIPPED_RATIO, episode_metrics
from grpo_jax.tasks.base import Row


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Completions of held-out prompts, which of them are right, and their rewards.

    Attributes:
      completions: texts, one list per prompt; with tools or environments the messages
        that follow the prompt.
      correct: ``[prompts, samples]``; None where the task cannot tell right from wrong.
      answers: what each completion answers, None for nothing; by default its text
        without the spaces around it.
      lenient: the same completions with their answers read leniently; None where the
        task knows one way only.
      rewards: ``[prompts, samples]``, NaN where a completion has none; None where
        rewards were not computed.
      played: what tools and environments did, ``[prompts, samples]`` counts by name.
      prompts: what the policy saw, where that is not the prompts of the rows.
      cut: ``[prompts, samples]`` whether the limit of tokens ended a completion.
    """

    completions: Sequence[Sequence[Any]]
    correct: Bool[np.ndarray, "N S"] | None = None
    answers: Sequence[Sequence[Hashable | None]] | None = None
    lenient: "Evaluation | None" = None
    rewards: Float[np.ndarray, "N S"] | None = None
    played: Mapping[str, np.ndarray] = field(default_factory=dict)
    prompts: Sequence[Any] | None = None
    cut: Bool[np.ndarray, "N S"] | None = None

    @property
    def accuracy(self) -> float:
        """Mean share of right completions; NaN where nothing tells right from wrong."""
        return math.nan if self.correct is None else float(self._correct.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy over prompts; NaN for a single prompt."""
        if self.correct is None:
            return math.nan
        return _standard_error(self._correct.mean(axis=1))

    @property
    def reward(self) -> float:
        """Mean reward over completions that have one; NaN where none has."""
        return math.nan if self.rewards is None else _mean(self.rewards)

    @property
    def _correct(self) -> Bool[np.ndarray, "N S"]:
        if self.correct is None:
            raise ValueError("the task cannot tell right from wrong.")
        return self.correct

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
        ``completions/clipped_ratio`` is the share of completions that were cut.
        """
        counts = {"prompts": len(self.completions), "samples": self._samples}
        cut = {} if self.cut is None else {CLIPPED_RATIO: float(self.cut.mean())}
        lenient = {} if self.lenient is None else {"lenient": self.lenient._numbers()}
        rights = {} if self.correct is None else self._numbers()
        other = self._of_rewards() | self._of_episodes()
        return counts | cut | rights | lenient | other

    @property
    def _samples(self) -> int:
        return len(self.completions[0])

    def _of_rewards(self) -> dict[str, Any]:
        if self.rewards is None:
            return {}
        means = [_mean(group) for group in self.rewards]
        known = np.array([mean for mean in means if not math.isnan(mean)])
        return {
            "reward": _or_null(self.reward),
            "reward/standard_error": _or_null(_standard_error(known)),
            "reward/none_rate": float(np.isnan(self.rewards).mean()),
        }

    def _of_episodes(self) -> dict[str, float]:
        return episode_metrics(self.played) if self.played else {}

    def records(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """A JSON object per completion: prompt, text, answer found, right or wrong.

        Where it is known, also whether the completion was cut. Where there are any,
        also the reward and the counts of the episode; the text is then a list of
        messages.
        """
        for number, group in enumerate(self.completions):
            for sample, text in enumerate(group):
                seen = self.prompts
                prompt = rows[number]["prompt"] if seen is None else seen[number]
                record = {"prompt": prompt, "completion": text}
                if self.cut is not None:
                    record["cut"] = bool(self.cut[number, sample])
                if self.correct is not None:
                    record |= self._verdict(number, sample)
                if self.rewards is not None:
                    record["reward"] = _or_null(float(self.rewards[number, sample]))
                for name, counts in self.played.items():
                    record[name] = counts[number, sample].item()
                if self.lenient is not None:
                    record["lenient"] = self.lenient._verdict(number, sample)
                yield record

    def _verdict(self, number: int, sample: int) -> dict[str, Any]:
        found = self._answers()[number][sample]
        return {
            "answer": None if found is None else str(found),
            "correct": bool(self._correct[number, sample]),
        }

    def _answers(self) -> Sequence[Sequence[Hashable | None]]:
        if self.answers is not None:
            return self.answers
        return [[text.strip() or None for text in group] for group in self.completions]

    def _numbers(self) -> dict[str, Any]:
        samples = self._correct.shape[1]
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
        samples = self._correct.shape[1]
        if not 1 <= k <= samples:
            raise ValueError(f"k must be between 1 and {samples} samples, got {k}.")
        missed = [
            math.comb(samples - int(right), k) / math.comb(samples, k)
            for right in self._correct.sum(axis=1)
        ]
        return 1.0 - np.array(missed)

    def _majority(self) -> Float[np.ndarray, " N"]:
        right = []
        for verdicts, given in zip(self._correct, self._answers(), strict=True):
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


def _mean(values: Float[np.ndarray, "..."]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value
