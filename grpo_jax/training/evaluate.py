"""A policy on held-out prompts: what it answers, and how often it is right."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from grpo_jax.config import MeshConfig, SamplingConfig
from grpo_jax.models.limits import longest_prompt
from grpo_jax.models.protocol import LanguageModel
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout import encoding as texts
from grpo_jax.rollout.collect import unpadded
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.rollout.generate import generate
from grpo_jax.tasks.base import Row, Task, first_rows
from grpo_jax.training.scores import Completed, Evaluation, is_judged, judge
from grpo_jax.weights.tokenizer import Tokenizer

GREEDY = SamplingConfig(temperature=0.0)
# Completions sampled at once where nothing else is said.
BATCH = 128


def evaluate(
    model: LanguageModel,
    params: PyTree,
    tokenizer: Tokenizer,
    task: Task,
    *,
    prompts: int | None = None,
    samples: int = 1,
    sampling: SamplingConfig = GREEDY,
    max_prompt_tokens: int = 512,
    max_new_tokens: int = 256,
    seed: int = 0,
    batch_size: int = BATCH,
    mesh: Mesh | None = None,
) -> Evaluation:
    """How often a model is right on a task's held-out prompts.

    Args:
      prompts: how many of them, from the first on; all by default.
      samples: completions per prompt.
      sampling: how tokens are drawn; greedy by default. `Restored.sampling` gives that
        of a run.
      batch_size: completions sampled at once; those of one prompt are never parted.
      mesh: over which the prompts are split; one device by default.

    Raises:
      ValueError: if the task has no held-out prompts or cannot tell right from wrong.
    """
    if not is_judged(task) or not len(task.test):
        raise ValueError(
            f"task {task.name!r} has no held-out prompts with known answers; accuracy "
            "cannot be measured on it."
        )
    rows = first_rows(task.test, prompts)
    evaluator = Evaluator(
        model,
        tokenizer,
        rows,
        mesh or one_device(),
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        samples=samples,
        sampling=sampling,
        seed=seed,
        batch_size=batch_size,
    )
    completed = evaluator.complete({"params": params})
    return judge(completed, rows, task)


def complete(
    model: LanguageModel,
    params: PyTree,
    tokenizer: Tokenizer,
    prompts: Sequence[Any],
    *,
    samples: int = 1,
    sampling: SamplingConfig = GREEDY,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[list[str]]:
    """The texts of `samples` completions for each prompt (a string or messages)."""
    evaluator = Evaluator(
        model,
        tokenizer,
        [{"prompt": prompt} for prompt in prompts],
        one_device(),
        max_prompt_tokens=model.config.max_position_embeddings,
        max_new_tokens=max_new_tokens,
        samples=samples,
        sampling=sampling,
        seed=seed,
    )
    return evaluator.complete({"params": params}).texts


def one_device() -> Mesh:
    """A mesh of the default device alone."""
    return meshes.make_mesh(MeshConfig(), devices=jax.local_devices()[:1])


class Evaluator:
    """Completes the same held-out prompts again and again; compiles once.

    `batch_size` completions at once, or all those of one prompt.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        rows: Sequence[Row],
        mesh: Mesh,
        *,
        max_prompt_tokens: int,
        max_new_tokens: int,
        samples: int = 1,
        sampling: SamplingConfig = GREEDY,
        seed: int = 0,
        batch_size: int = BATCH,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._samples = samples
        self._new_tokens = max_new_tokens
        self._sampling = policy_sampling(model, tokenizer, sampling)
        self._key = jax.random.key(seed)
        limit = longest_prompt(
            max_prompt_tokens,
            new_tokens=max_new_tokens,
            context=model.config.max_position_embeddings,
        )
        self._encoded = texts.encode_rows(
            tokenizer, rows, limit=limit, vocab_size=model.config.vocab_size
        )
        longest = max(len(ids) for ids in self._encoded)
        self._length = texts.bucket(longest, limit=limit)
        parts = meshes.batch_shards(mesh)
        prompts = min(max(batch_size // samples, 1), len(rows))
        self._batch = -(-prompts // parts) * parts

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
            sampling=self._sampling,
            prompt_ids=sent[2],
            lora=variables.get("lora"),
        )
        found = meshes.gather(sampled)
        return unpadded(found.tokens, found.lengths)[: len(encoded) * self._samples]
