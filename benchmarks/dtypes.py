"""Scoring, updates and sampling in float32 and in bfloat16, in turns.

    python benchmarks/dtypes.py smol

Which dtype wins depends on the instructions of a CPU and on whether JAX uses them. The
weights are random, and all completions have the workload's length.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro
from generate import random_prompts
from packing import make_batch, run_config, timed
from workloads import WORKLOADS, own_versions, publish, show, surroundings

from grpo_jax.config import SamplingConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.rollout.generate import generate
from grpo_jax.training.optimizer import make_optimizer
from grpo_jax.training.state import Batch, make_train_state
from grpo_jax.training.step import make_train_step, score_batch
from grpo_jax.weights.pretrained import read_model_config

DTYPES = "float32", "bfloat16"


def main(
    workload: tyro.conf.Positional[str],
    *,
    models: Path = Path("benchmarks/models"),
    rounds: int = 3,
    out: Path | None = Path("benchmarks/results/dtypes.jsonl"),
) -> None:
    """Measure the phases of a step in both dtypes; the last line is JSON.

    Args:
      workload: its name in workloads.py.
      models: the folder that models.py made.
      rounds: turns of each dtype, of which the median counts.
      out: a file to which the line is appended.
    """
    work = WORKLOADS[workload]
    read = read_model_config(str(work.folder(models)))
    config = run_config(work, "dots", None)
    batch = make_batch(work, config, read.vocab_size, "equal", 0)
    phases = {dtype: phases_of(read, dtype, work, batch) for dtype in DTYPES}
    rows: dict[str, dict[str, float]] = {dtype: {} for dtype in DTYPES}
    for phase in phases["float32"]:
        seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
        for turn in range(rounds + 1):
            for dtype, own in phases.items():
                taken = own[phase]()
                if turn:  # the first turn compiles
                    seconds[dtype].append(taken)
        for dtype, values in seconds.items():
            rows[dtype][f"{phase} s"] = statistics.median(values)
    first, second = (rows[dtype] for dtype in DTYPES)
    rows["float32 / bfloat16"] = {key: first[key] / second[key] for key in first}
    show(f"{workload}, jax {jax.__version__}", rows)
    line = {
        "benchmark": "dtypes",
        "workload": dataclasses.asdict(work),
        "rows": rows,
        "device": jax.devices()[0].device_kind,
        "versions": own_versions(),
        **surroundings(),
    }
    publish(line, out)


def phases_of(
    read: ModelConfig, dtype: str, work: Any, batch: Batch
) -> dict[str, Callable[[], float]]:
    """For each phase a function that runs it and returns its seconds."""
    model = Decoder(dataclasses.replace(read, dtype=dtype, remat="dots"))
    config = dataclasses.replace(run_config(work, "dots", None), compute_dtype=dtype)
    tx = make_optimizer(config.optimizer, total_updates=1000)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    held = {"state": make_train_state(params, tx)}
    score = jax.jit(functools.partial(score_batch, model, config))
    step = jax.jit(make_train_step(model, tx, config), donate_argnums=0)
    prompts, lengths = random_prompts(work, read)

    def rollout() -> float:
        drawn = functools.partial(
            generate,
            group_size=work.group,
            sampling=SamplingConfig(stop_ids=()),
            max_new_tokens=work.new_tokens,
        )
        given = model, held["state"].params, prompts, lengths, jax.random.key(0)
        return timed(drawn, *given)[1]

    def update() -> float:
        (held["state"], _), seconds = timed(step, held["state"], batch)
        return seconds

    def scored() -> float:
        return timed(score, {"params": held["state"].params}, batch)[1]

    return {"rollout": rollout, "score": scored, "update": update}


if __name__ == "__main__":
    tyro.cli(main)
