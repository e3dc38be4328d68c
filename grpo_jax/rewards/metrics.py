"""Numbers about what reward functions gave and logged.

They are made once, from the completions of all rollouts of a step and all processes: a
mean of means would depend on how completions were spread over them.
"""

from collections.abc import Mapping, Sequence

import numpy as np

# Why a function gave a completion nothing, where it did not choose to.
ERROR, TIMEOUT = 1, 2


def function_metrics(
    rewards: Mapping[str, np.ndarray], failures: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Mean, deviation and shares without a reward of each function, by its name.

    ``rewards/<name>/mean`` and ``rewards/<name>/std`` are over completions with a
    reward from it, and absent where there are none; the deviation divides by one less
    than their number, as TRL's does, and is 0 for a single one. ``none_rate``,
    ``error_rate`` and ``timeout_rate`` are shares of all completions.

    Args:
      rewards: of each function, any shape, NaN where there is none.
      failures: in the same shapes 0, `ERROR` or `TIMEOUT`.
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
    return metrics


def logged_metrics(logged: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """What functions logged, by name: the mean over all calls of all parts."""
    return {
        name: float(np.mean(values)) for name, values in merge_logged(logged).items()
    }


def merge_logged(
    logged: Sequence[Mapping[str, Sequence[float]]],
) -> dict[str, list[float]]:
    """The values of several parts, part after part."""
    merged: dict[str, list[float]] = {}
    for part in logged:
        for name, values in part.items():
            merged.setdefault(name, []).extend(values)
    return merged
