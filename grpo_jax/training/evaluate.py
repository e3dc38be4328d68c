"""How often a policy is right: accuracy, pass@k and majority@k on held-out prompts."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, PyTree

from grpo_jax.config import SamplingConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout import prompts as texts
from grpo_jax.rollout.collect import unpadded, with_stop_ids
from grpo_jax.rollout.generate import generate
from grpo_jax.tasks.base import Row
from grpo_jax.weights.tokenizer import Tokenizer

GREEDY = SamplingConfig(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Completions of held-out prompts, and which of them are right.

    Attributes:
      correct: ``[prompts, samples]``.
      completions: texts, one list per prompt.
    """

    correct: Bool[np.ndarray, "N S"]
    completions: Sequence[Sequence[str]]

    @property
    def accuracy(self) -> float:
        """Mean share of right completions."""
        return float(self.correct.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy over prompts; NaN for a single prompt."""
        share = self.correct.mean(axis=1)
        if len(share) < 2:
            return math.nan
        return float(share.std(ddof=1) / math.sqrt(len(share)))

    def pass_at(self, k: int) -> float:
        """Probability that one of k completions is right, without bias.

        The mean over prompts of 1 - C(n - c, k) / C(n, k), for c right ones among n
        samples: Chen et al. 2021, eq. 1, https://arxiv.org/abs/2107.03374.

        Raises:
          ValueError: if k is not between 1 and the number of samples.
        """
        samples = self.correct.shape[1]
        if not 1 <= k <= samples:
            raise ValueError(f"k must lie between 1 and {samples} samples, got {k}.")
        missed = [
            math.comb(samples - int(right), k) / math.comb(samples, k)
            for right in self.correct.sum(axis=1)
        ]
        return float(1.0 - np.mean(missed))

    def majority(self, answer: Callable[[str], str | None] = str.strip) -> float:
        """Share of prompts whose most frequent answer is right (majority@samples).

        `answer` takes the answer out of a completion; completions without one (None) do
        not vote. Of equally frequent answers, the one that was given first counts.
        """
        right = []
        for verdicts, completions in zip(self.correct, self.completions, strict=True):
            answers = [answer(text) for text in completions]
            votes = Counter(a for a in answers if a is not None)
            winner = votes.most_common(1)[0][0] if votes else None
            right.append(winner is not None and bool(verdicts[answers.index(winner)]))
        return float(np.mean(right))


def judge(
    completions: Sequence[Sequence[str]],
    rows: Sequence[Row],
    is_correct: Callable[[str, Row], bool],
) -> Evaluation:
    """The evaluation of one list of completions per row."""
    correct = [
        [is_correct(text, row) for text in group]
        for group, row in zip(completions, rows, strict=True)
    ]
    return Evaluation(correct=np.array(correct), completions=completions)


@dataclass(frozen=True)
class Completed:
    """Texts and token ids, one list of samples per prompt."""

    texts: list[list[str]]
    ids: list[list[list[int]]]


class Evaluator:
    """Completes the same held-out prompts again and again; compiles once."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        rows: Sequence[Row],
        mesh: Mesh,
        *,
        max_prompt_tokens: int,
        max_new_tokens: int,
        samples: int = 1,
        sampling: SamplingConfig = GREEDY,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._samples = samples
        self._new_tokens = max_new_tokens
        self._sampling = sampling
        self._key = jax.random.key(seed)
        self._encoded = texts.encode_rows(
            tokenizer,
            rows,
            max_prompt_tokens=max_prompt_tokens,
            vocab_size=model.config.vocab_size,
        )
        longest = max(len(ids) for ids in self._encoded)
        self._length = texts.bucket(longest, limit=max_prompt_tokens)
        parts = meshes.batch_shards(mesh)
        self._batch = -(-min(batch_size, len(rows)) // parts) * parts

    def complete(self, variables: PyTree) -> Completed:
        """The completions of every row, on every process."""
        ids: list[list[int]] = []
        for start in range(0, len(self._encoded), self._batch):
            ids += self._sample(variables, start)
        each = self._samples
        grouped = [ids[i : i + each] for i in range(0, len(ids), each)]
        texts = [[self._tokenizer.decode(one) for one in group] for group in grouped]
        return Completed(texts=texts, ids=grouped)

    def _sample(self, variables: PyTree, start: int) -> list[list[int]]:
        encoded = self._encoded[start : start + self._batch]
        missing = self._batch - len(encoded)
        # The last batch is filled up, so that all have one shape.
        prompts, lengths = texts.pad(
            [*encoded, *([encoded[0]] * missing)],
            length=self._length,
            pad_id=self._tokenizer.pad_id,
        )
        numbers = np.arange(start, start + self._batch, dtype=np.uint32)
        sent = meshes.whole_to_mesh(self._mesh, (prompts, lengths, numbers))
        sampled = generate(
            self._model,
            variables["params"],
            sent[0],
            sent[1],
            self._key,
            group_size=self._samples,
            max_new_tokens=self._new_tokens,
            sampling=with_stop_ids(self._sampling, self._tokenizer),
            prompt_ids=sent[2],
            lora=variables.get("lora"),
        )
        found = meshes.gather(sampled)
        return unpadded(found.tokens, found.lengths)[: len(encoded) * self._samples]
