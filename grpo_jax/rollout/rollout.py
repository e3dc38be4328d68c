"""Rollouts as rows of groups: joining several, and choosing whole groups of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.rewards.metrics import merge_logged
from grpo_jax.tasks.base import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Completions of a step with all that is known of them, on the host.

    Attributes:
      rows: the N rows of the task.
      prompts: ``[N, P]`` right-padded ids; `prompt_lengths` ``[N]``.
      tokens, logp: ``[N, G, T]`` as sampled, cut to the longest completion's bucket.
      lengths, finished: ``[N, G]``.
      completions: the ``N x G`` texts, group by group.
      counts: ``[N]`` False for groups that the update leaves out.
      rewards: ``[N, G]`` weighted sums, NaN where a completion has none.
      rewards_by_name: the unweighted rewards of each function, ``[N, G]``.
      failures_by_name: on which completions a function failed, ``[N, G]``; codes of
        `reward_metrics`.
      extra: columns that reward functions logged, one value per completion.
      logged: numbers that reward functions logged, a value per call.
      seconds: spent on it, by the name of the metric (``time/rollout``).
    """

    rows: Sequence[Row]
    prompts: Int[np.ndarray, "N P"]
    prompt_lengths: Int[np.ndarray, " N"]
    tokens: Int[np.ndarray, "N G T"]
    logp: Float[np.ndarray, "N G T"]
    lengths: Int[np.ndarray, "N G"]
    finished: Bool[np.ndarray, "N G"]
    completions: Sequence[str]
    counts: Bool[np.ndarray, " N"]
    rewards: Float[np.ndarray, "N G"]
    rewards_by_name: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    failures_by_name: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    extra: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    logged: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def mask(self) -> Bool[np.ndarray, "N G T"]:
        """True for the tokens that an update learns from."""
        inside = np.arange(self.tokens.shape[-1]) < self.lengths[..., None]
        return inside & self.counts[:, None, None]

    def records(self, step: int, advantages: np.ndarray) -> list[dict[str, Any]]:
        """One dict per completion, group by group, for people to read."""
        group = self.lengths.shape[1]
        by_name = {name: v.reshape(-1) for name, v in self.rewards_by_name.items()}
        return [
            {
                # First, so that no column of a reward function hides a field.
                **{name: values[i] for name, values in self.extra.items()},
                "step": step,
                "prompt": self.rows[i // group]["prompt"],
                "completion": text,
                "rewards": {name: values[i] for name, values in by_name.items()},
                "reward": self.rewards.reshape(-1)[i],
                "advantage": advantages.reshape(-1)[i],
                "length": self.lengths.reshape(-1)[i],
                "finished": self.finished.reshape(-1)[i],
            }
            for i, text in enumerate(self.completions)
        ]


def informative(rewards: Float[np.ndarray, "N G"]) -> Bool[np.ndarray, " N"]:
    """Whether a group's rewards differ; NaN (no reward) takes no part.

    Largest and smallest are compared, since a standard deviation of equal rewards can
    differ from 0 by rounding.
    """
    present = ~np.isnan(rewards)
    largest = np.where(present, rewards, -np.inf).max(axis=1)
    smallest = np.where(present, rewards, np.inf).min(axis=1)
    return present.any(axis=1) & (largest > smallest)


def refill(sampled: Rollout, wanted: int, *, short: bool) -> Rollout | None:
    """The first `wanted` groups of all that were sampled whose rewards differ.

    When there are fewer: None, or with `short` the missing ones are filled with groups
    of equal rewards that do not count.
    """
    useful = informative(sampled.rewards)
    if useful.sum() < wanted and not short:
        return None
    # A stable sort keeps the order in which groups were sampled.
    chosen = np.argsort(~useful, kind="stable")[:wanted]
    picked = _pick(sampled, chosen)
    return dataclasses.replace(picked, counts=useful[chosen])


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """All groups of several rollouts; times are summed.

    Reward functions may log a column in some rollouts only: it is filled with None.
    """
    return Rollout(
        rows=[row for one in rollouts for row in one.rows],
        completions=[text for one in rollouts for text in one.completions],
        rewards_by_name=_stacked([one.rewards_by_name for one in rollouts]),
        failures_by_name=_stacked([one.failures_by_name for one in rollouts]),
        extra={
            name: [v for one in rollouts for v in _column(one, name)]
            for name in dict.fromkeys(name for one in rollouts for name in one.extra)
        },
        logged=merge_logged([one.logged for one in rollouts]),
        seconds={
            name: sum(one.seconds[name] for one in rollouts)
            for name in rollouts[0].seconds
        },
        **{
            name: _concatenate([vars(one)[name] for one in rollouts])
            for name in _ARRAYS
        },
    )


_ARRAYS = (
    "prompts",
    "prompt_lengths",
    "tokens",
    "logp",
    "lengths",
    "finished",
    "counts",
    "rewards",
)


def _stacked(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _column(rollout: Rollout, name: str) -> Sequence[Any]:
    return rollout.extra.get(name, [None] * len(rollout.completions))


def _concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays on top of each other, those with a shorter last axis padded with 0."""
    if arrays[0].ndim == 1:
        return np.concatenate(arrays)
    width = max(array.shape[-1] for array in arrays)
    short = [[(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])] for a in arrays]
    return np.concatenate(
        [np.pad(array, pads) for array, pads in zip(arrays, short, strict=True)]
    )


def _pick(rollout: Rollout, chosen: np.ndarray) -> Rollout:
    group = rollout.lengths.shape[1]
    flat = [n * group + g for n in chosen for g in range(group)]
    return dataclasses.replace(
        rollout,
        rows=[rollout.rows[n] for n in chosen],
        completions=[rollout.completions[i] for i in flat],
        rewards_by_name={n: v[chosen] for n, v in rollout.rewards_by_name.items()},
        failures_by_name={n: v[chosen] for n, v in rollout.failures_by_name.items()},
        extra={name: [v[i] for i in flat] for name, v in rollout.extra.items()},
        **{name: vars(rollout)[name][chosen] for name in _ARRAYS},
    )
