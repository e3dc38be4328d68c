"""Evaluation of a policy on held-out prompts: accuracy, rewards, what tools did."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PyTree

from grpo_jax.config import (
    EnvironmentsConfig,
    MeshConfig,
    RewardsConfig,
    SamplingConfig,
)
from grpo_jax.environments.host import Host
from grpo_jax.models.limits import longest_prompt
from grpo_jax.models.protocol import LanguageModel
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.rollout.encoding import encode_rows
from grpo_jax.rollout.generate import GroupSampler
from grpo_jax.rollout.scoring import score_episodes
from grpo_jax.tasks import task_from_rows
from grpo_jax.tasks.base import Row, Task, first_rows
from grpo_jax.training._environments import (
    EMPTY_ROW,
    EnvironmentFactory,
    Tools,
    open_episodes,
    reward_functions_of,
    with_played_rewards,
)
from grpo_jax.training._held_out import BATCH, complete_share
from grpo_jax.training._judge import Completed, has_ground_truth, judge
from grpo_jax.training.scores import Evaluation
from grpo_jax.weights.tokenizer import Tokenizer

GREEDY = SamplingConfig(temperature=0.0)
# Episodes of an environment that brings its own prompts, where no number is given.
_EPISODES = 100


def evaluate(
    model: LanguageModel,
    params: PyTree,
    tokenizer: Tokenizer,
    task: Task | None,
    *,
    prompts: int | None = None,
    samples: int = 1,
    sampling: SamplingConfig = GREEDY,
    max_prompt_tokens: int = 512,
    max_new_tokens: int = 256,
    seed: int = 0,
    batch_size: int = BATCH,
    mesh: Mesh | None = None,
    tools: Tools | None = None,
    environment_factory: EnvironmentFactory | None = None,
    environments: EnvironmentsConfig | None = None,
    rewards: RewardsConfig | None = None,
) -> Evaluation:
    """How often a model is right on a task's held-out prompts.

    With tools or environments, also the rewards of the task and the environments. If
    the task cannot tell right from wrong, they are all that is measured.

    Args:
      task: None for environments that bring their own prompts.
      prompts: how many of them, from the first on; by default all, or 100 of the
        environment's.
      samples: completions per prompt.
      sampling: how tokens are drawn; greedy by default. `Restored.sampling` gives that
        of a run.
      batch_size: completions sampled at once; those of one prompt are never parted.
      seed: of the sampling, and of the episodes. With the seed of a run, its episodes
        are those of the run's own evaluations.
      mesh: over which the prompts are split; one device by default.
      tools: as for `train`; so is `environment_factory`.
      environments: how tools are called; by default as in a run.
      rewards: how reward functions are called, and their weights.

    Raises:
      ValueError: if the task has no held-out prompts, or there is nothing to measure:
        it cannot tell right from wrong, and there are no rewards of environments.
    """
    with contextlib.ExitStack() as stack:
        host = _open_host(tools, environment_factory, environments, stack)
        task = _checked_task(task, host, prompts, rewards)
        rows = first_rows(task.test, prompts)
        own = _complete_own(
            model,
            params,
            tokenizer,
            rows,
            stack=stack,
            host=host,
            mesh=mesh or one_device(),
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            samples=samples,
            sampling=sampling,
            seed=seed,
            batch_size=batch_size,
        )
        scores = None
        if host is not None:
            scores = _rewards(own, task, rewards or RewardsConfig(), batch_size)
        completed = own.gathered()
    result = Evaluation(completions=completed.seen)
    if has_ground_truth(task):
        result = judge(completed, rows, task)
    result = dataclasses.replace(
        result,
        completions=completed.seen,
        prompts=completed.prompts,
        cut=completed.cut,
    )
    if scores is None:
        return result
    return dataclasses.replace(
        result, rewards=meshes.gather_rows(scores), played=completed.counts
    )


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
    tools: Tools | None = None,
    environment_factory: EnvironmentFactory | None = None,
    environments: EnvironmentsConfig | None = None,
) -> list[list[Any]]:
    """`samples` completions for each prompt (a string or messages).

    Args:
      tools: as for `train`; so is `environment_factory`.
      environments: how tools are called; by default as in a run.

    Returns:
      Their texts; with tools or environments the messages of each, which follow the
      prompt.
    """
    with contextlib.ExitStack() as stack:
        host = _open_host(tools, environment_factory, environments, stack)
        own = _complete_own(
            model,
            params,
            tokenizer,
            [{"prompt": prompt} for prompt in prompts],
            stack=stack,
            host=host,
            mesh=one_device(),
            max_prompt_tokens=model.config.max_position_embeddings,
            max_new_tokens=max_new_tokens,
            samples=samples,
            sampling=sampling,
            seed=seed,
        )
        return own.gathered().seen


def one_device() -> Mesh:
    """A mesh of the default device alone."""
    return meshes.make_mesh(MeshConfig(), devices=jax.local_devices()[:1])


def _open_host(
    tools: Tools | None,
    environment_factory: EnvironmentFactory | None,
    config: EnvironmentsConfig | None,
    stack: contextlib.ExitStack,
) -> Host | None:
    if not tools and environment_factory is None:
        return None
    return stack.enter_context(Host(tools or (), environment_factory, config))


def _checked_task(
    task: Task | None,
    host: Host | None,
    prompts: int | None,
    config: RewardsConfig | None,
) -> Task:
    """The task, with the rewards of environments; made of these alone for None."""
    played = () if host is None else reward_functions_of(host)
    if task is None and played:
        rows = [EMPTY_ROW] * (prompts or _EPISODES)
        made = task_from_rows(rows, played, eval_rows=rows)
        weights = None if config is None else config.weights
        return dataclasses.replace(made, reward_weights=weights)
    if task is None:
        raise ValueError(
            "there is nothing to measure: give a task, or an environment that gives "
            "rewards (`get_reward`, or `reward` in its steps)."
        )
    if not len(task.test) or not (host is not None or has_ground_truth(task)):
        raise ValueError(
            f"task {task.name!r} has no held-out prompts with known answers; accuracy "
            "cannot be measured on it."
        )
    if host is None:
        return task
    return with_played_rewards(task, host, None if config is None else config.weights)


@dataclasses.dataclass(frozen=True)
class _Own(Completed):
    """What this process completed.

    Attributes:
      rows: with the prompts that the policy saw.
    """

    rows: Sequence[Row] = ()

    def gathered(self) -> "_Gathered":
        """The same of all processes."""
        texts, ids = meshes.gather_lists(self.texts), meshes.gather_lists(self.ids)
        cut = None
        if self.cut is not None:
            cut = np.array(meshes.gather_lists(self.cut.tolist()))
        if self.completions is None or self.played is None:
            return _Gathered(texts, ids, cut=cut, seen=texts)
        return _Gathered(
            texts,
            ids,
            cut=cut,
            seen=meshes.gather_lists(self.completions),
            prompts=meshes.gather_lists([row["prompt"] for row in self.rows]),
            counts=meshes.gather_rows(self.played.counts),
        )


@dataclasses.dataclass(frozen=True)
class _Gathered(Completed):
    """Completions of all processes.

    Attributes:
      seen: texts, or with environments messages.
      prompts: that the policy saw, where they are not those of the rows.
      counts: as `Rollout.played`.
    """

    seen: list[list[Any]] = dataclasses.field(default_factory=list)
    prompts: list[Any] | None = None
    counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def _complete_own(
    model: LanguageModel,
    params: PyTree,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    stack: contextlib.ExitStack,
    host: Host | None,
    mesh: Mesh,
    max_prompt_tokens: int,
    max_new_tokens: int,
    sampling: SamplingConfig,
    samples: int,
    seed: int,
    batch_size: int = BATCH,
) -> _Own:
    """The completions of this process's rows; `stack` ends their episodes."""
    sampling = policy_sampling(model.config, tokenizer, sampling)
    episodes = None
    if host is not None:
        episodes = open_episodes(
            host,
            tokenizer,
            model.config,
            seed=seed,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            stop_ids=sampling.stop_ids or (),
        )
    prompts = encode_rows(
        tokenizer,
        rows,
        limit=longest_prompt(
            max_prompt_tokens,
            new_tokens=max_new_tokens,
            context=model.config.max_position_embeddings,
        ),
        vocab_size=model.config.vocab_size,
        encode=None if episodes is None else episodes.encode,
    )
    share = meshes.own_share(len(rows))
    own_rows, playing = rows[share], None
    if episodes is not None:
        playing = episodes.begin(
            own_rows, step=0, numbers=range(len(rows))[share], members=samples
        )
        stack.callback(playing.close)
        own_rows, prompts = playing.rows, meshes.gather_lists(playing.prompts)
    sampler = GroupSampler(model, mesh, max_prompt_tokens=max_prompt_tokens)
    sampler.update({"params": params}, version=0)
    own = complete_share(
        sampler,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        playing=playing,
    )
    return _Own(own.texts, own.ids, own.completions, own.played, own.cut, rows=own_rows)


def _rewards(
    own: _Own, task: Task, config: RewardsConfig, batch: int
) -> Float[np.ndarray, "N S"]:
    """The weighted rewards of this process's episodes; NaN for one without."""
    assert own.completions is not None and own.played is not None
    # Those of `config` are in the task's already.
    config = dataclasses.replace(
        config, weights=task.reward_weights, isolate=config.isolate or task.isolate
    )
    seen = list(itertools.chain(*own.completions))
    ids = list(itertools.chain(*own.ids))
    failed = own.played.counts["failed"]
    rows = [row for row in own.rows for _ in range(failed.shape[1])]
    totals: list[float] = []
    with RewardRunner(task.rewards, config) as runner:
        for start in range(0, len(rows), batch):
            part = slice(start, start + batch)
            asked = runner, rows[part], seen[part], ids[part]
            scores = score_episodes(*asked, own.played, step=0, first=start)
            totals += scores.total.tolist()
    return np.array(totals).reshape(failed.shape)
