"""How the time of each phase grows with G, P, T, V and L, measured and by the floors.

    python benchmarks/growth.py [--sizes G P] [--plot docs/growth.png]

One size is changed at a time, from a small model and batch. The last line is JSON. The
picture shows the newest curve of each size among the results.
"""

import dataclasses
import json
from pathlib import Path

import jax
import tyro
from machine import Machine, floors, measure, share_left
from phases import phases
from workloads import Workload, own_versions, publish, show, surroundings

from grpo_jax.config import MeshConfig
from grpo_jax.models.config import ModelConfig

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
WORK = Workload("growth", "1.9M random", 2, 8, 64, 32, steps=1)
# What is changed, and the values that it takes.
SIZES = {
    "G": (2, 4, 8, 16, 32, 64),
    "P": (16, 64, 256, 512, 1024),
    "T": (8, 32, 64, 128),
    "V": (512, 2048, 8192, 32768),
    "L": (1, 2, 4, 8),
}
NAMES = {
    "G": "completions per prompt",
    "P": "prompt tokens",
    "T": "new tokens",
    "V": "vocabulary",
    "L": "layers",
}
COLORS = {"rollout": "#4269d0", "reference": "#3ca951", "update": "#ff725c"}


def main(
    *,
    sizes: tuple[str, ...] = tuple(SIZES),
    plot: Path | None = None,
    out: Path = Path("benchmarks/results/growth.jsonl"),
) -> None:
    """Measure the points of some sizes.

    Args:
      sizes: which of G, P, T, V and L.
      plot: where a picture goes.
      out: a file to which the line is appended.
    """
    machine = measure(bytes_read=2**24)
    curves = {}
    for size in sizes:
        rows = {}
        for value in SIZES[size]:
            seconds, least = point(size, value, machine)
            rows[str(value)] = seconds | {f"{n} floor": least[n] for n in seconds}
        show(f"{size}, {NAMES[size]}: seconds", rows)
        curves[size] = rows
        share_left(machine)
    line = {
        "benchmark": "growth",
        "curves": curves,
        "machine_rates": dataclasses.asdict(machine),
        "device": jax.devices()[0].device_kind,
        "versions": own_versions(),
        **surroundings(),
    }
    publish(line, out)
    if plot is not None:
        draw(newest(out), plot)


def point(
    size: str, value: int, machine: Machine
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the phases, and their floors, with one size changed."""
    fields = {"G": "group", "P": "prompt_tokens", "T": "new_tokens"}
    keys = {"V": "vocab_size", "L": "num_hidden_layers"}
    hf = MODEL | ({keys[size]: value} if size in keys else {})
    changes = {fields[size]: value} if size in fields else {}
    work = dataclasses.replace(WORK, **changes)
    model = dataclasses.replace(ModelConfig.from_hf(hf), remat="dots")
    return phases(model, work, MeshConfig(data=1, fsdp=1)), floors(model, machine, work)


def newest(out: Path) -> dict[str, dict[str, dict[str, float]]]:
    """The newest curve of each size that was measured."""
    found = {}
    for line in out.read_text().splitlines():
        found |= json.loads(line)["curves"]
    return {size: found[size] for size in SIZES if size in found}


def draw(curves: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """One panel per size: measured lines, dashed floors, both axes logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(2.6 * len(curves), 2.9), sharey=True, squeeze=False
    )
    for axis, (size, rows) in zip(axes[0], curves.items(), strict=True):
        values = [int(value) for value in rows]
        for phase, color in COLORS.items():
            for name, style in ((phase, "-o"), (f"{phase} floor", "--")):
                seconds = [1e3 * row[name] for row in rows.values()]
                label = name if style == "-o" else None
                axis.plot(
                    values, seconds, style, color=color, markersize=3, label=label
                )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(values, [str(value) for value in values], fontsize=7)
        axis.set_xlabel(f"{size}, {NAMES[size]}", fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("milliseconds (dashed: floor)", fontsize=8)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
