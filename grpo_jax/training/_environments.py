"""The tools and environments of a run, and the rows and rewards that they bring."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.config import TrainConfig
from grpo_jax.environments.host import Host
from grpo_jax.environments.reward import EnvironmentReward
from grpo_jax.models.limits import longest_prompt
from grpo_jax.models.protocol import LanguageModelConfig
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.rollout.encoding import prompt_problem
from grpo_jax.rollout.episodes import Episodes
from grpo_jax.tasks import choose_task
from grpo_jax.tasks.base import RewardFunction, Row, Task, reward_functions
from grpo_jax.weights.tokenizer import Tokenizer

# What a tool is, and what makes environments.
Tools = Sequence[Callable[..., Any]]
EnvironmentFactory = Callable[[], Any] | Mapping[str, Callable[[], Any]]

# The row of an environment that brings its own prompts, as in TRL.
EMPTY_ROW: Row = {"prompt": [{"role": "user", "content": ""}]}


def make_host(
    config: TrainConfig,
    tools: Tools | None,
    environment_factory: EnvironmentFactory | None,
) -> Host | None:
    """What plays the episodes of a run; None without tools and environments.

    Raises:
      ValueError: for what is no tool or no environment, and for settings that cannot be
        used with them.
    """
    if not tools and environment_factory is None:
        return None
    if config.rollout.carry_over:
        raise ValueError(
            "rollout.carry_over cannot be combined with tools or environments: an "
            "episode that continues in the next step would have to be saved with it. "
            "Set rollout.carry_over to false."
        )
    return Host(tools or (), environment_factory, config.environments)


def choose_played_task(
    config: TrainConfig,
    host: Host | None,
    *,
    dataset: Sequence[Row] | None,
    rewards: RewardFunction | Sequence[RewardFunction] | None,
    eval_dataset: Sequence[Row] | None,
) -> Task:
    """The task of a run, with the rewards of its environments behind its own.

    Without rows and with an environment that brings its own prompt, the rows are empty
    messages of a user.

    Raises:
      ValueError: as `choose_task`.
    """
    given = () if rewards is None else reward_functions(rewards)
    played = () if host is None else reward_functions_of(host)
    if dataset is None and host is not None and host.has_environments:
        # The default task has nothing to do with an environment.
        if config.task == TrainConfig().task:
            dataset = [EMPTY_ROW] * config.prompts_per_step
            if eval_dataset is None:
                eval_dataset = [EMPTY_ROW] * config.eval_prompts or None
    if dataset is not None and (given or played):
        rewards = (*given, *played)
    task = choose_task(
        config.task,
        data=config.data,
        seed=config.seed,
        dataset=dataset,
        rewards=rewards,
        eval_dataset=eval_dataset,
    )
    if host is None:
        return task
    host.check_rewards(given)
    own = task.rewards if dataset is None else given
    return _with_played(task, own, played, config.rewards.weights)


def with_played_rewards(
    task: Task, host: Host, weights: Sequence[float] | None = None
) -> Task:
    """The task with the rewards of its environments behind its own.

    Args:
      weights: of its own rewards, or of all; by default those of the task, or 1.
    """
    return _with_played(task, task.rewards, reward_functions_of(host), weights)


def reward_functions_of(host: Host) -> tuple[RewardFunction, ...]:
    """The rewards that environments give, as reward functions."""
    return tuple(EnvironmentReward(name) for name in host.reward_names)


def _with_played(
    task: Task,
    own: Sequence[RewardFunction],
    played: Sequence[RewardFunction],
    weights: Sequence[float] | None,
) -> Task:
    weights = tuple(weights or task.reward_weights or (1.0,) * len(own))
    if len(weights) == len(own):
        weights = (*weights, *(1.0 for _ in played))
    return dataclasses.replace(task, rewards=(*own, *played), reward_weights=weights)


def make_episodes(
    host: Host | None,
    tokenizer: Tokenizer,
    model: LanguageModelConfig,
    config: TrainConfig,
) -> Episodes | None:
    """The episodes of a run; None without tools and environments."""
    if host is None:
        return None
    sampling = policy_sampling(model, tokenizer, config.sampling)
    return open_episodes(
        host,
        tokenizer,
        model,
        seed=config.seed,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        stop_ids=sampling.stop_ids or (),
    )


def open_episodes(
    host: Host,
    tokenizer: Tokenizer,
    model: LanguageModelConfig,
    *,
    seed: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> Episodes:
    """Episodes of a host, whose prompts leave room for `max_new_tokens`."""
    limit = longest_prompt(
        max_prompt_tokens,
        new_tokens=max_new_tokens,
        context=model.max_position_embeddings,
    )
    return Episodes(
        host,
        tokenizer,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        problem=lambda ids: prompt_problem(
            ids, limit=limit, vocab_size=model.vocab_size
        ),
    )
