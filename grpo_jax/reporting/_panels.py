"""Which curves of a run are shown, and how; one list for the plot and the page."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_jax.reporting import _run_files, metrics


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One curve: its title, its metric, and the name and unit of its vertical axis."""

    title: str
    metric: str
    label: str
    band: str | None = None  # metric drawn as a band of plus and minus its value
    sparse: bool = False  # measured now and then: drawn as points joined by lines


PANELS = (
    Panel(
        title="Reward",
        metric=metrics.REWARD,
        label="mean ± spread in groups",
        band=metrics.REWARD_STD,
    ),
    Panel(
        title="Held-out accuracy",
        metric=metrics.ACCURACY,
        label="share right",
        sparse=True,
    ),
    Panel(
        title="Held-out reward",
        metric=metrics.EVAL_REWARD,
        label="mean",
        sparse=True,
    ),
    Panel(title="KL to the reference", metric=metrics.KL, label="nats per token"),
    Panel(title="Completion length", metric=metrics.MEAN_LENGTH, label="tokens, mean"),
    Panel(
        title="Cut at the token limit",
        metric=metrics.CLIPPED_RATIO,
        label="share of completions",
    ),
    Panel(title="Turns", metric=metrics.TURNS, label="per completion, mean"),
    Panel(title="Tool calls", metric=metrics.CALLS, label="per completion, mean"),
    Panel(
        title="Failed tool calls",
        metric=metrics.FAILED_CALLS,
        label="share of calls",
    ),
    Panel(title="Gradient norm", metric=metrics.GRAD_NORM, label="L2 norm"),
    Panel(title="Entropy", metric=metrics.ENTROPY, label="nats per token"),
    Panel(
        title="Throughput",
        metric=metrics.TOKENS_PER_SECOND,
        label="tokens per second",
    ),
)

_ONE_REWARD = re.compile(r"rewards/(.+)/mean")


def panels_of(histories: Iterable[Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """The panels of which some history has values.

    Where a run has several reward functions, each has a panel behind that of their sum.
    """
    lines = [line for history in histories for line in history]
    names = dict.fromkeys(name for line in lines for name in line)
    found = [match for name in names if (match := _ONE_REWARD.fullmatch(name))]
    single = [
        Panel(title=f"Reward: {match[1]}", metric=match[0], label="mean")
        for match in (found if len(found) > 1 else [])
    ]
    total, *rest = PANELS
    return [
        panel
        for panel in (total, *single, *rest)
        if _run_files.series(lines, panel.metric)[0]
    ]


def trend(values: Sequence[float]) -> list[float]:
    """Running mean of `values` over the last twenty-fifth of the run; at least 1 value.

    The first entries average what there is so far.
    """
    window = max(1, len(values) // 25)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
