"""Dynamic sampling: groups of equal rewards are replaced from further rollouts.

They give no gradient. DAPO, Yu et al. 2025, section 3.2,
https://arxiv.org/abs/2503.14476.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.rewards.metrics import has_signal, merge_logged
from grpo_jax.rollout.collect import Collector
from grpo_jax.rollout.rollout import Rollout

# Fields of a rollout that are not one value per group, or are not there with it.
_OF_ALL_GROUPS = ("logged", "seconds", "staleness", "began_before")
_OF_ALL_GROUPS += ("playing", "digest")


def resample(
    collector: Collector,
    agreement: Agreement,
    *,
    step: int,
    position: int,
    limit: int,
) -> tuple[Rollout, Rollout] | None:
    """A rewarded rollout whose groups differ in reward, and all that was sampled.

    None when the run is asked to stop.

    Groups of equal rewards are replaced, whole, from up to `limit` further rollouts. If
    some are still missing then, such groups fill their places and are not kept.
    """
    taken: list[Rollout] = []
    while True:
        drawn = sum(len(one.rows) for one in taken) * jax.process_count()
        rollout = collector.sample(step=step, position=position + drawn)
        with agreement.phase("rewards"):
            taken.append(collector.reward(rollout, step=step))
        if agreement.stop:
            return None
        sampled = _join(taken)
        kept = _refill(sampled, len(rollout.rows), short=len(taken) > limit)
        # If one process is short of groups, all sample again: sampling is a collective
        # computation, and a process that left the loop would block the others.
        missing = meshes.gather_rows(np.array([kept is None]))
        if kept is not None and not missing.any():
            return kept, sampled


def _refill(sampled: Rollout, wanted: int, *, short: bool) -> Rollout | None:
    """The first `wanted` groups of all that were sampled whose rewards differ.

    When there are fewer: None, or with `short` the missing ones are filled with groups
    of equal rewards that are not kept.
    """
    useful = has_signal(sampled.rewards)
    if useful.sum() < wanted and not short:
        return None
    # A stable sort keeps the order in which groups were sampled.
    chosen = np.argsort(~useful, kind="stable")[:wanted]
    picked = {name: _take(values, chosen) for name, values in _groups(sampled).items()}
    return dataclasses.replace(sampled, **picked | {"keep": useful[chosen]})


def _join(rollouts: Sequence[Rollout]) -> Rollout:
    """All groups of several rollouts; times are summed.

    Reward functions may log a column in some rollouts only: it is filled with None.
    """
    columns = dict.fromkeys(name for one in rollouts for name in one.extra)
    parts = []
    for one in rollouts:
        nothing = [[None] * one.lengths.shape[1] for _ in one.rows]
        extra = {name: one.extra.get(name, nothing) for name in columns}
        parts.append(_groups(one) | {"extra": extra})
    seconds = [one.seconds for one in rollouts]
    return Rollout(
        **_concatenate(parts),
        logged=merge_logged([one.logged for one in rollouts]),
        digest="".join(one.digest for one in rollouts),
        seconds={name: sum(part[name] for part in seconds) for name in seconds[0]},
    )


def _groups(rollout: Rollout) -> dict[str, Any]:
    """The fields that have a value per group: arrays, lists, or dicts of them."""
    return {k: v for k, v in vars(rollout).items() if k not in _OF_ALL_GROUPS}


def _take(values: Any, chosen: np.ndarray) -> Any:
    if isinstance(values, dict):
        return {name: _take(column, chosen) for name, column in values.items()}
    if isinstance(values, np.ndarray):
        return values[chosen]
    return [values[n] for n in chosen]


def _concatenate(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {name: _concatenate([part[name] for part in parts]) for name in parts[0]}
    if not isinstance(parts[0], np.ndarray):
        return [value for part in parts for value in part]
    if parts[0].ndim > 1:
        # Each rollout is as wide as the bucket of its own longest row.
        width = max(part.shape[-1] for part in parts)
        before = [(0, 0)] * (parts[0].ndim - 1)
        parts = [np.pad(p, [*before, (0, width - p.shape[-1])]) for p in parts]
    return np.concatenate(parts)
