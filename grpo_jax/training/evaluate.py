"""Evaluation of a policy on held-out prompts: completions and their accuracy."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from grpo_jax.config import MeshConfig, SamplingConfig
from grpo_jax.models.limits import longest_prompt
from grpo_jax.models.protocol import LanguageModel
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.rollout.encoding import encode_rows
from grpo_jax.rollout.generate import GroupSampler
from grpo_jax.tasks.base import Row, Task, first_rows
from grpo_jax.training._held_out import BATCH, complete_share
from grpo_jax.training._judge import Completed, has_ground_truth, judge
from grpo_jax.training.scores import Evaluation
from grpo_jax.weights.tokenizer import Tokenizer

GREEDY = SamplingConfig(temperature=0.0)


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
    if not has_ground_truth(task) or not len(task.test):
        raise ValueError(
            f"task {task.name!r} has no held-out prompts with known answers; accuracy "
            "cannot be measured on it."
        )
    rows = first_rows(task.test, prompts)
    completed = _complete_all(
        model,
        params,
        tokenizer,
        rows,
        mesh=mesh or _one_device(),
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        samples=samples,
        sampling=sampling,
        seed=seed,
        batch_size=batch_size,
    )
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
    completed = _complete_all(
        model,
        params,
        tokenizer,
        [{"prompt": prompt} for prompt in prompts],
        mesh=_one_device(),
        max_prompt_tokens=model.config.max_position_embeddings,
        max_new_tokens=max_new_tokens,
        samples=samples,
        sampling=sampling,
        seed=seed,
    )
    return completed.texts


def _one_device() -> Mesh:
    """A mesh of the default device alone."""
    return meshes.make_mesh(MeshConfig(), devices=jax.local_devices()[:1])


def _complete_all(
    model: LanguageModel,
    params: PyTree,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    mesh: Mesh,
    max_prompt_tokens: int,
    max_new_tokens: int,
    sampling: SamplingConfig,
    **options: Any,
) -> Completed:
    """The completions of all rows, on every process."""
    sampling = policy_sampling(model.config, tokenizer, sampling)
    prompts = encode_rows(
        tokenizer,
        rows,
        limit=longest_prompt(
            max_prompt_tokens,
            new_tokens=max_new_tokens,
            context=model.config.max_position_embeddings,
        ),
        vocab_size=model.config.vocab_size,
    )
    sampler = GroupSampler(model, mesh, max_prompt_tokens=max_prompt_tokens)
    sampler.update({"params": params}, version=0)
    own = complete_share(
        sampler,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        **options,
    )
    texts, ids = meshes.gather_lists(own.texts), meshes.gather_lists(own.ids)
    return Completed(texts=texts, ids=ids)
