"""The rewards of completions, and a rollout with its rewards."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.rewards.runner import RewardRunner, Scores
from grpo_jax.rollout.episodes import Played
from grpo_jax.rollout.rollout import Rollout
from grpo_jax.tasks.base import Row


def score_rows(
    runner: RewardRunner,
    rows: Sequence[Row],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    step: int,
    more: Mapping[str, Sequence[Any]] | None = None,
) -> Scores:
    """The rewards of one completion per row.

    Args:
      more: further columns, which reward functions get by name. Environments do not
        travel to another process.
    """
    more = dict(more or {})
    if runner.is_isolated:
        more.pop("environments", None)
    columns = [name for name in rows[0] if name != "prompt"]
    return runner.score(
        [row["prompt"] for row in rows],
        list(completions),
        {name: [row[name] for row in rows] for name in columns} | more,
        completion_ids=completion_ids,
        step=step,
    )


def with_scores(rollout: Rollout, scores: Scores, played: Played | None) -> Rollout:
    """The rollout with the rewards of its completions, group after group.

    Args:
      played: the episodes, if there were any.
    """
    shape = size, group = rollout.lengths.shape
    total, more = scores.total.reshape(shape), {}
    if played is not None:
        # A trajectory that failed has no reward, whatever functions say of it.
        total = np.where(played.counts["failed"], np.nan, total)
        more = {"played": played.counts, "digest": played.digest}
    by_name = lambda values: dict(  # noqa: E731
        zip(scores.names, values.reshape(-1, *shape), strict=True)
    )
    return dataclasses.replace(
        rollout,
        rewards=total,
        rewards_by_name=by_name(scores.rewards),
        failures_by_name=by_name(scores.failures),
        extra={
            name: [values[n * group : (n + 1) * group] for n in range(size)]
            for name, values in scores.extra.items()
        },
        logged=scores.logged,
        **more,
    )
