"""Adapters trained on a frozen base in bfloat16, 8 and 4 bits: curves and memory.

    python experiments/quantized_base.py MODEL

The same run for each base, in a process of its own: the reward is the number of commas
in a completion of 16 tokens, up to four. Prints the reward of the first and of
the last steps, and the most memory that the process held, without files: until its last
step, and with the export of the merged model.
Writes the curves and a picture into experiments/results/. Finished runs are kept.
Hardware: 2 CPU cores; for 1.5B parameters 24 GiB. Time: a minute for a step of 1.5B.
Expected result: rewards as in the table of docs/models.md.
"""

import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from grpo_jax import LoraConfig, OptimizerConfig, TrainConfig, per_completion
from grpo_jax.reporting.metrics import read_metrics
from grpo_jax.training.loop import run_to_end

THINGS = (
    "the sea, a clock, bread, snow, a bridge, the moon, a violin, rain, a garden, "
    "a train, salt, a letter, the wind, a lamp, a river, honey"
).split(", ")


@dataclass(frozen=True)
class Options:
    """The options."""

    model: tyro.conf.Positional[str]  # a folder or a GGUF file
    bases: tuple[str, ...] = ("auto", "int8", "nf4")
    steps: int = 12
    seed: int = 0
    learning_rate: float = 5e-4
    runs: Path = Path("runs/quantized_base")
    out: Path = Path("experiments/results")


@per_completion
def commas(completions, **columns):
    """A quarter for each comma, up to 1."""
    return [min(text.count(","), 4) / 4 for text in completions]


def run(options: Options, base: str) -> None:
    """Train on one base."""
    config = TrainConfig(
        model=options.model,
        run_dir=str(options.runs / base),
        seed=options.seed,
        steps=options.steps,
        prompts_per_step=2,
        group_size=8,
        max_prompt_tokens=48,
        max_new_tokens=16,
        eval_every=0,
        compute_dtype="bfloat16",
        lora=LoraConfig(rank=16, base_dtype=base),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate, warmup_steps=0),
    )
    rows = [{"prompt": f"Write one sentence about {thing}."} for thing in THINGS]
    # As the command does: `train` would also give the merged parameters.
    run_to_end(config, with_params=False, dataset=rows, rewards=commas)


def peaks_of(options: Options, base: str) -> dict[str, float]:
    """Run in a new process; the most GiB that it held, steps and export apart."""
    child = multiprocessing.get_context("spawn").Process(
        target=run, args=(options, base)
    )
    child.start()
    status, metrics = Path(f"/proc/{child.pid}/status"), options.runs / base
    most = {"steps": 0.0, "export": 0.0}
    while child.is_alive():
        held = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        if held:
            ends = steps_of(metrics) == options.steps
            part = "export" if ends else "steps"
            most[part] = max(most[part], int(held[1]) / 2**20)
        time.sleep(0.5)
    child.join()
    if child.exitcode:
        raise SystemExit(f"the run with base {base} ended with {child.exitcode}")
    return most


def steps_of(run_dir: Path) -> int:
    """Steps that the run has finished."""
    if not (run_dir / "metrics.jsonl").exists():
        return 0
    return max((int(line["step"]) for line in read_metrics(run_dir)), default=0)


def curve_of(options: Options, base: str) -> dict[str, Any]:
    """What a finished run left: rewards by step, and the most GiB that it held."""
    folder = options.runs / base
    rewards = [x["reward"] for x in read_metrics(folder) if "reward" in x]
    peaks = json.loads((folder / "memory.json").read_text())
    return {"base": base, "rewards": rewards, "GiB": peaks}


def table(curves: Sequence[dict[str, Any]]) -> str:
    """Rewards at both ends and memory, as markdown."""
    rows = ["| base | reward, first 3 steps | last 3 | GiB of the steps | export |"]
    rows.append("| --- | --- | --- | --- | --- |")
    for one in curves:
        ends = statistics.mean(one["rewards"][:3]), statistics.mean(one["rewards"][-3:])
        held = (f"{x:.1f}" for x in one["GiB"].values())
        cells = f"`{one['base']}`", *(f"{x:.2f}" for x in ends), *held
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def draw(curves: Sequence[dict[str, Any]], out: Path) -> None:
    """Rewards beside each other, and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for at, one in enumerate(curves):
        steps = range(1, len(one["rewards"]) + 1)
        left.plot(steps, one["rewards"], label=one["base"], linewidth=1.5)
        most = max(one["GiB"].values())
        right.barh(at, most, color=f"C{at}")
        right.text(most, at, f" {most:.1f}", va="center")
    left.set(xlabel="step", ylabel="mean reward of the samples", ylim=(0, 1.02))
    right.set(xlabel="most memory of the process, GiB")
    right.set_yticks(range(len(curves)), [one["base"] for one in curves])
    right.invert_yaxis()
    right.margins(x=0.12)
    left.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(out, dpi=120)


def main(options: Options) -> None:
    """Train on each base that has no finished run, then write numbers and a picture."""
    for base in options.bases:
        kept = options.runs / base / "memory.json"
        if not kept.is_file():
            peaks = peaks_of(options, base)
            kept.write_text(json.dumps(peaks))
    curves = [curve_of(options, base) for base in options.bases]
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one) + "\n" for one in curves]
    (options.out / "quantized_base.jsonl").write_text("".join(lines))
    draw(curves, options.out / "quantized_base.png")
    print(table(curves))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
