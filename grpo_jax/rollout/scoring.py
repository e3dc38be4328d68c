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


def score_episodes(
    runner: RewardRunner,
    rows: Sequence[Row],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    played: Played,
    *,
    step: int,
    first: int = 0,
) -> Scores:
    """The rewards of completions that played; those that failed have none.

    Reward functions do not see a failed one: its environment may be in any state.

    Args:
      first: the number of the first of them among all that were played.
    """
    failed = played.counts["failed"].ravel()[first : first + len(rows)]
    sound: list[int] = np.flatnonzero(~failed).tolist()
    shape = len(runner.names), len(rows)
    whole = Scores(
        rewards=np.full(shape, np.nan),
        total=np.full(len(rows), np.nan),
        failures=np.zeros(shape, np.int8),
        names=runner.names,
        logged={},
        extra={},
    )
    if not sound:
        return whole
    scores = score_rows(
        runner,
        [rows[n] for n in sound],
        [completions[n] for n in sound],
        [completion_ids[n] for n in sound],
        step=step,
        more={k: [v[first + n] for n in sound] for k, v in played.columns.items()},
    )
    whole.rewards[:, sound], whole.total[sound] = scores.rewards, scores.total
    whole.failures[:, sound] = scores.failures
    extra: dict[str, list[Any]] = {name: [None] * len(rows) for name in scores.extra}
    for name, values in scores.extra.items():
        for n, value in zip(sound, values, strict=True):
            extra[name][n] = value
    return dataclasses.replace(whole, logged=scores.logged, extra=extra)


def with_scores(rollout: Rollout, scores: Scores, played: Played | None) -> Rollout:
    """The rollout with the rewards of its completions, group after group.

    Args:
      played: the episodes, if there were any.
    """
    shape = size, group = rollout.lengths.shape
    more: dict[str, Any] = {}
    if played is not None:
        more = {"played": played.counts, "digest": played.digest}
    by_name = lambda values: dict(  # noqa: E731
        zip(scores.names, values.reshape(-1, *shape), strict=True)
    )
    return dataclasses.replace(
        rollout,
        rewards=scores.total.reshape(shape),
        rewards_by_name=by_name(scores.rewards),
        failures_by_name=by_name(scores.failures),
        extra={
            name: [values[n * group : (n + 1) * group] for n in range(size)]
            for name, values in scores.extra.items()
        },
        logged=scores.logged,
        **more,
    )
