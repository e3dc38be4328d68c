"""The metrics of a run: their names, how they are computed, and how files are read.

Names are TRL's where TRL has one
(https://huggingface.co/docs/trl/grpo_trainer#logged-metrics). Lengths are in tokens,
and a reward of NaN means that the completion has none.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.rewards.metrics import has_signal

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_DIR = "completions"

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

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def completion_metrics(
    lengths: Int[np.ndarray, "N G"], finished: Bool[np.ndarray, "N G"]
) -> dict[str, float]:
    """Lengths of the completions, and of those that ended on their own ("terminated").

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


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; step 0 holds the first evaluation.

    A last line that a killed run left unfinished is dropped. Raises ValueError if the
    file is missing, or damaged anywhere else.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(
            f"{run_dir} has no {METRICS_FILE}; give the directory of a run that has"
            " made at least one step"
        )
    return read_lines(path)


def completion_steps(run_dir: str | Path) -> list[int]:
    """The steps whose completions were written, in order."""
    files = (Path(run_dir) / COMPLETIONS_DIR).glob("step_*.jsonl")
    return sorted(int(file.stem.removeprefix("step_")) for file in files)


def read_completions(run_dir: str | Path, step: int) -> list[dict[str, Any]]:
    """The completions written at `step`, one dict each."""
    return read_lines(completions_file(run_dir, step))


def completions_file(run_dir: str | Path, step: int) -> Path:
    """The file of the completions of `step`."""
    return Path(run_dir) / COMPLETIONS_DIR / f"step_{step:06d}.jsonl"


def series(
    history: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, without the lines that lack a number for it."""
    found = [(line["step"], line.get(name)) for line in history]
    points = [(step, value) for step, value in found if isinstance(value, int | float)]
    return [step for step, _ in points], [float(value) for _, value in points]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a torn last line."""
    # Split bytes, because a text may contain other line breaks than the newline.
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        # ValueError also covers a line that is not text: cut within a character, or
        # filled with zeros.
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number} is damaged ({error}); remove that line"
            ) from error
    return records


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
