"""All objectives on arithmetic from the same start: which one learns, and how fast.

    python experiments/compare_objectives.py
    python experiments/compare_objectives.py --presets grpo dapo --seeds 0

Trains the embedded model with every preset and three seeds, then writes a table and a
picture into experiments/results/: held-out accuracy after equal numbers of completions
and after equal wall time (compilation and evaluation excluded). Finished runs are kept
in runs/compare and not repeated.
Hardware: 2 CPU cores. Time: about 15 minutes.
Expected result: the table in docs/results.md.
"""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from grpo_jax import ObjectiveConfig, TrainConfig, train
from grpo_jax.config import PRESETS
from grpo_jax.reporting.metrics import ACCURACY


@dataclass(frozen=True)
class Options:
    """The options."""

    presets: tuple[str, ...] = PRESETS
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 60
    runs: Path = Path("runs/compare")
    out: Path = Path("experiments/results")


@dataclass(frozen=True)
class Curve:
    """Held-out accuracy of one run, against completions and seconds."""

    preset: str
    seed: int
    completions: list[int]
    seconds: list[float]
    accuracy: list[float]


def run(preset: str, seed: int, options: Options) -> Curve:
    """Train, and read the curve from the metrics."""
    config = TrainConfig(
        run_dir=str(options.runs / f"{preset}-{seed}"),
        seed=seed,
        steps=options.steps,
        eval_every=5,
        eval_prompts=500,
        objective=ObjectiveConfig.preset(preset),
    )
    return curve(preset, seed, train(config).history)


def curve(preset: str, seed: int, history: Sequence[dict[str, Any]]) -> Curve:
    """Cumulative cost at each evaluation; a step that compiled counts as the median."""
    steps = [line for line in history if line["step"] > 0]
    usual = statistics.median(line["time/step"] for line in steps)
    compiled = [0, *(line["compile/count"] for line in steps)]
    points: list[tuple[int, float, float]] = [(0, 0.0, history[0][ACCURACY])]
    seconds = 0.0
    for line, before in zip(steps, compiled, strict=False):
        seconds += usual if line["compile/count"] > before else line["time/step"]
        if ACCURACY in line:
            points.append((int(line["num_completions"]), seconds, line[ACCURACY]))
    completions, times, accuracy = (
        list(values) for values in zip(*points, strict=True)
    )
    return Curve(preset, seed, completions, times, accuracy)


def accuracy_at(
    costs: Sequence[float], accuracy: Sequence[float], budget: float
) -> float:
    """The last accuracy measured within the budget."""
    within = [a for cost, a in zip(costs, accuracy, strict=True) if cost <= budget]
    return within[-1]


def table(curves: Sequence[Curve]) -> str:
    """Mean and range over seeds at budgets that every run has reached, as markdown."""
    samples = min(c.completions[-1] for c in curves)
    seconds = min(c.seconds[-1] for c in curves)
    rows = [
        f"| preset | after {samples // 2:,} completions | after {samples:,} | "
        f"after {seconds:.0f} s | seconds per step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for preset, group in itertools.groupby(curves, key=lambda c: c.preset):
        own = list(group)
        cells = [
            spread([accuracy_at(c.completions, c.accuracy, n) for c in own])
            for n in (samples // 2, samples)
        ]
        cells.append(spread([accuracy_at(c.seconds, c.accuracy, seconds) for c in own]))
        each = statistics.mean(c.seconds[-1] / (len(c.seconds) - 1) / 5 for c in own)
        rows.append(f"| `{preset}` | {' | '.join(cells)} | {each:.2f} |")
    return "\n".join(rows) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean and extremes in percent."""
    percent = [100 * value for value in values]
    mean, low, high = statistics.mean(percent), min(percent), max(percent)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def draw(curves: Sequence[Curve], out: Path) -> None:
    """Accuracy against completions and against seconds, a line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    colors = dict(zip(PRESETS, pyplot.get_cmap("tab10").colors, strict=False))
    for one in curves:
        label = one.preset if one.seed == curves[0].seed else None
        style = {"color": colors[one.preset], "alpha": 0.8, "linewidth": 1.3}
        panels[0].plot(one.completions, one.accuracy, label=label, **style)
        panels[1].plot(one.seconds, one.accuracy, **style)
    panels[0].set(xlabel="completions sampled", ylabel="held-out accuracy, greedy")
    panels[1].set(xlabel="seconds of training on 2 CPU cores")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set_ylim(0, 1)
    figure.legend(loc="outside right center", frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(out, dpi=120)


def main(options: Options) -> None:
    """Run the missing runs, then write table, picture and numbers."""
    pairs = itertools.product(options.presets, options.seeds)
    curves = [run(preset, seed, options) for preset, seed in pairs]
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dataclasses.asdict(c)) + "\n" for c in curves]
    (options.out / "compare_objectives.jsonl").write_text("".join(lines))
    (options.out / "compare_objectives.md").write_text(table(curves))
    draw(curves, options.out / "compare_objectives.png")
    print(table(curves))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
