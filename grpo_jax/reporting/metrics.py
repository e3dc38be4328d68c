"""The metrics of a run: their names, and how they are computed.

Names are TRL's where TRL has one
(https://huggingface.co/docs/trl/grpo_trainer#logged-metrics). Lengths are in tokens,
and a reward of NaN means that the completion has none.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.checkpointing.bucket import local_copy
from grpo_jax.reporting._run_files import read_lines
from grpo_jax.rewards.metrics import has_signal

METRICS_FILE = "metrics.jsonl"

# Metrics that console, plots and report page name.
REWARD = "reward"
REWARD_STD = "reward_std"
EQUAL_GROUPS = "frac_reward_zero_std"
ACCURACY = "eval/accuracy"
EVAL_REWARD = "eval/reward"  # for tasks without a test of correctness
KL = "kl"
ENTROPY = "entropy"
GRAD_NORM = "grad_norm"
MEAN_LENGTH = "completions/mean_length"
CLIPPED_RATIO = "completions/clipped_ratio"
TOKENS_PER_SECOND = "tokens_per_second/total"
# With tools or environments.
TURNS = "episodes/turns"
CALLS = "tools/call_frequency"
FAILED_CALLS = "tools/failure_frequency"

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def completion_metrics(
    lengths: Int[np.ndarray, "N G"], finished: Bool[np.ndarray, "N G"]
) -> dict[str, float]:
    """Lengths of the completions, and of those that ended on their own ("terminated").

    A length counts the tokens that the policy drew, and none that it was given.

    `completions/clipped_ratio` is the share cut at the token limit. When none ended,
    the three terminated lengths are 0, as in TRL.
    """
    terminated = lengths[finished]
    if terminated.size == 0:
        terminated = np.zeros(1)
    return {
        MEAN_LENGTH: float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        CLIPPED_RATIO: float(1.0 - finished.mean()),
        "completions/mean_terminated_length": float(terminated.mean()),
        "completions/min_terminated_length": float(terminated.min()),
        "completions/max_terminated_length": float(terminated.max()),
    }


def reward_metrics(rewards: Float[np.ndarray, "N G"]) -> dict[str, float]:
    """Mean reward, mean spread within groups, and the share of groups without spread.

    `reward` is the mean over completions that have one. `reward_std` is the mean over
    groups of the unbiased standard deviation, over groups with at least two rewards.
    `frac_reward_zero_std` is the share of groups that give no gradient: their largest
    reward equals the smallest, or they have no reward. A mean over nothing is NaN.
    """
    groups = [group[~np.isnan(group)] for group in np.asarray(rewards, np.float64)]
    spreads = [group.std(ddof=1) for group in groups if group.size > 1]
    return {
        REWARD: _mean(np.concatenate(groups)),
        REWARD_STD: _mean(spreads),
        EQUAL_GROUPS: _mean(~has_signal(rewards)),
    }


def episode_metrics(played: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What tools and environments did in a step.

    `episodes/turns` is the mean number of turns of the policy. The share of completions
    without a reward because their environment failed is `episodes/failed_rate`, and
    that of those that ended because an answer did not fit `episodes/dropped_rate`.

    With tools, `tools/call_frequency` is the number of calls per completion, and
    `tools/failure_frequency` the share of calls that failed, as in TRL.
    `tools/malformed_frequency` is the number of calls per completion that cannot be
    read, and `tools/latency_s` the mean time of a call in seconds.

    Args:
      played: ``[N, G]`` counts by name, as `Rollout.played`.
    """
    metrics = {
        "episodes/turns": float(played["turns"].mean()),
        "episodes/failed_rate": float(played["failed"].mean()),
        "episodes/dropped_rate": float(played["dropped_answers"].mean()),
    }
    if "calls" not in played:
        return metrics
    calls, count = float(played["calls"].sum()), played["calls"].size
    malformed = float(played["malformed_calls"].sum())
    return metrics | {
        "tools/call_frequency": calls / count,
        "tools/failure_frequency": float(played["failed_calls"].sum()) / max(calls, 1),
        "tools/malformed_frequency": malformed / count,
        "tools/latency_s": float(played["tool_seconds"].sum()) / max(calls, 1),
    }


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; step 0 holds the first evaluation.

    A last line that a killed run left unfinished is dropped. Raises ValueError if the
    file is missing, or damaged anywhere else.
    """
    path = local_copy(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(
            f"{run_dir} has no {METRICS_FILE}; give the directory of a run that has"
            " made at least one step"
        )
    return read_lines(path)


class CompileCounter:
    """Counts the programs that JAX compiles, or loads from its cache, inside `with`.

    A count that keeps growing after the first steps means that shapes keep changing.
    """

    def __init__(self) -> None:
        self._count = 0
        self._seconds = 0.0

    def __enter__(self) -> Self:
        import jax.monitoring

        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import jax.monitoring

        jax.monitoring.unregister_event_duration_listener(self._listen)

    def metrics(self) -> dict[str, float]:
        """Programs compiled so far, and the seconds spent on them."""
        return {"compile/count": self._count, "compile/seconds": self._seconds}

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILE_EVENT:
            self._count += 1
            self._seconds += duration_secs


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan
