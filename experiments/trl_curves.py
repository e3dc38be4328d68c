"""The same run here and with TRL: both learn alike from the same data and settings.

    benchmarks/peers/setup.sh
    python experiments/trl_curves.py

Trains the embedded model on arithmetic with each of three seeds: `grpo_jax.train`, and
TRL's GRPOTrainer in an environment of its own. Model, rows, rewards, sizes, optimizer
and loss (TRL's default) are the same; the order of prompts and the samples are not.
Prints a table, and writes curves and a picture into experiments/results/. Finished
runs are kept.
Hardware: 2 CPU cores. Time: about 10 minutes.
Expected result: the table in docs/results.md.
"""

import dataclasses
import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import grpo_jax
from grpo_jax import ObjectiveConfig, TrainConfig, load_task, train
from grpo_jax.reporting.metrics import ACCURACY

# TRL's default loss.
OBJECTIVE = ObjectiveConfig(
    advantage="standardized", aggregation="token_mean", kl_coef=0.0
)
MODEL = Path(grpo_jax.__file__).parent / "assets/arithmetic-1m"
SYSTEMS = "grpo_jax", "TRL"


@dataclass(frozen=True)
class Options:
    """The options."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 60
    trl: Path = Path("benchmarks/peers/trl/bin/python")  # a Python that has TRL
    runs: Path = Path("runs/trl_curves")
    out: Path = Path("experiments/results")


@dataclass(frozen=True)
class Curve:
    """A run: mean reward of each step, and greedy accuracy after some."""

    system: str
    seed: int
    rewards: list[float]
    accuracy: list[list[float]]
    seconds: float


def configure(options: Options, seed: int) -> TrainConfig:
    """The run of a seed."""
    return TrainConfig(
        run_dir=str(options.runs / f"grpo_jax-{seed}"),
        seed=seed,
        steps=options.steps,
        eval_every=5,
        eval_prompts=500,
        objective=OBJECTIVE,
    )


def run_here(config: TrainConfig) -> Curve:
    """Train with this library."""
    history = train(config).history
    steps = [line for line in history if line["step"] > 0]
    return Curve(
        "grpo_jax",
        config.seed,
        [line["reward"] for line in steps],
        [[line["step"], line[ACCURACY]] for line in history if ACCURACY in line],
        sum(line["time/step"] for line in steps),
    )


def run_there(config: TrainConfig, options: Options) -> Curve:
    """Train with TRL, from the values of this run."""
    task, optimizer = load_task("arithmetic"), config.optimizer
    given = options.runs / f"trl-{config.seed}.json"
    out = given.with_suffix(".out.json")
    if not out.is_file():
        run: dict[str, Any] = {
            "model": str(MODEL),
            "train": list(task.train),
            "test": list(task.test)[: config.eval_prompts],
            "seed": config.seed,
            "learning_rate": optimizer.learning_rate,
            "warmup_steps": optimizer.warmup_steps,
        }
        names = "steps", "prompts_per_step", "group_size", "max_new_tokens"
        run |= {name: vars(config)[name] for name in (*names, "eval_every")}
        given.parent.mkdir(parents=True, exist_ok=True)
        given.write_text(json.dumps(run))
        script = "benchmarks/peers/trl_learn.py"
        subprocess.run([options.trl, script, given, out], check=True)
    return Curve("TRL", config.seed, **json.loads(out.read_text()))


def table(curves: Sequence[Curve]) -> str:
    """Accuracy of both at some steps, mean and range over seeds, as markdown."""
    steps = [int(step) for step, _ in curves[0].accuracy]
    shown = [step for step in steps if step % 20 == 0]
    titles = [f"accuracy after {n}" if n else "at the start" for n in shown]
    rows = ["| system | " + " | ".join(titles) + " | mean reward of all steps |"]
    rows.append("| --- |" + " --- |" * (len(shown) + 1))
    for system in SYSTEMS:
        own = [one for one in curves if one.system == system]
        cells = [spread([dict(map(tuple, c.accuracy))[n] for c in own]) for n in shown]
        cells.append(spread([statistics.mean(c.rewards) for c in own]))
        rows.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean and extremes in percent."""
    percent = [100 * value for value in values]
    return f"{statistics.mean(percent):.1f} ({min(percent):.1f} to {max(percent):.1f})"


def draw(curves: Sequence[Curve], out: Path) -> None:
    """Mean reward and held-out accuracy against steps, a line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    colors = dict(zip(SYSTEMS, ("tab:blue", "tab:orange"), strict=True))
    for one in curves:
        label = one.system if one.seed == curves[0].seed else None
        style = {"color": colors[one.system], "alpha": 0.8, "linewidth": 1.3}
        panels[0].plot(range(1, len(one.rewards) + 1), one.rewards, **style)
        steps, accuracy = zip(*one.accuracy, strict=True)
        panels[1].plot(steps, accuracy, label=label, **style)
    panels[0].set(xlabel="step", ylabel="mean reward of the samples", ylim=(0, 1))
    panels[1].set(xlabel="step", ylabel="held-out accuracy, greedy")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(out, dpi=120)


def main(options: Options) -> None:
    """Run the missing runs, then write the numbers and the picture."""
    if not options.trl.is_file():
        raise SystemExit(
            f"there is no {options.trl}; benchmarks/peers/setup.sh makes it, or "
            "--trl names a Python that has TRL."
        )
    curves = []
    for config in (configure(options, seed) for seed in options.seeds):
        curves += [run_here(config), run_there(config, options)]
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dataclasses.asdict(c)) + "\n" for c in curves]
    (options.out / "trl_curves.jsonl").write_text("".join(lines))
    draw(curves, options.out / "trl_curves.png")
    print(table(curves))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
