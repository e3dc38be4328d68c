"""Metrics of the rewards of a step, over all its rollouts and processes.

They are computed once from all completions: a mean of means would depend on how
completions were spread over rollouts and processes.
"""

from collections.abc import Mapping, Sequence

import numpy as np

# Why a function that failed gave a completion no reward.
ERROR, TIMEOUT = 1, 2


def has_signal(rewards: np.ndarray) -> np.ndarray:
    """Of rewards ``[N, G]``, whether those of each group differ; NaN is no reward.

    Largest and smallest are compared, since a standard deviation of equal rewards can
    differ from 0 by rounding.
    """
    missing = np.isnan(rewards)
    largest = np.where(missing, -np.inf, rewards).max(axis=1)
    smallest = np.where(missing, np.inf, rewards).min(axis=1)
    return largest > smallest


def reduce_metrics(
    rewards: Mapping[str, np.ndarray],
    failures: Mapping[str, np.ndarray],
    logged: Sequence[Mapping[str, Sequence[float]]],
) -> dict[str, float]:
    """Metrics of each reward function, and the means of what functions logged.

    ``rewards/<name>/mean`` and ``rewards/<name>/std`` are over completions with a
    reward from it, and absent where there are none; the deviation divides by one less
    than their number, as TRL's does, and is 0 for a single one. ``none_rate``,
    ``error_rate`` and ``timeout_rate`` are shares of all completions.

    Args:
      rewards: of each function, any shape, NaN where there is none.
      failures: in the same shapes 0, `ERROR` or `TIMEOUT`.
      logged: for each part of the step, the values that functions logged, by name.
    """
    metrics: dict[str, float] = {}
    for name, values in rewards.items():
        given = values[~np.isnan(values)]
        if given.size:
            deviation = float(given.std(ddof=1)) if given.size > 1 else 0.0
            metrics[f"rewards/{name}/mean"] = float(given.mean())
            metrics[f"rewards/{name}/std"] = deviation
        failed = failures[name]
        silent = np.isnan(values) & (failed == 0)
        metrics[f"rewards/{name}/none_rate"] = float(silent.mean())
        metrics[f"rewards/{name}/error_rate"] = float((failed == ERROR).mean())
        metrics[f"rewards/{name}/timeout_rate"] = float((failed == TIMEOUT).mean())
    means = {
        name: float(np.mean(values)) for name, values in merge_logged(logged).items()
    }
    return metrics | means


def merge_logged(
    logged: Sequence[Mapping[str, Sequence[float]]],
) -> dict[str, list[float]]:
    """The values of several parts, part after part."""
    merged: dict[str, list[float]] = {}
    for part in logged:
        for name, values in part.items():
            merged.setdefault(name, []).extend(values)
    return merged
