"""Scoring and updates with completions of a prompt in shared rows, and without.

    python benchmarks/packing.py smol tiny [--lengths geometric equal]

Lengths are geometric with the workload's `new_tokens` as mean and four times as many as
limit, or all at that mean. Both forms run in turns on the same weights and tokens, with
the rows that the learner would take. Memory and operations are what XLA says of the
compiled programs.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from workloads import WORKLOADS, Workload, own_versions, publish, show, surroundings

from grpo_jax.config import TrainConfig
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.models.packing import pack
from grpo_jax.rollout.encoding import bucket
from grpo_jax.training.optimizer import make_optimizer
from grpo_jax.training.state import Batch, make_train_state
from grpo_jax.training.step import make_train_step, score_batch
from grpo_jax.weights.pretrained import read_model_config

Lengths = Literal["geometric", "equal"]


def main(
    workloads: tyro.conf.Positional[tuple[str, ...]],
    *,
    models: Path = Path("benchmarks/models"),
    lengths: tuple[Lengths, ...] = ("geometric", "equal"),
    draws: int = 3,
    rounds: int = 5,
    remat: Literal["none", "layer", "dots"] = "dots",
    microbatch_size: int | None = None,
    out: Path | None = Path("benchmarks/results/packing.jsonl"),
) -> None:
    """Measure both forms of each workload; a JSON line for each and each draw.

    Args:
      workloads: names in workloads.py.
      models: the folder that models.py made.
      lengths: how the lengths of completions are drawn.
      draws: batches with lengths of their own.
      rounds: turns of each form, of which the median counts.
      remat: what the backward pass computes again.
      microbatch_size: sequences of an update held at once; all by default.
      out: a file to which the lines are appended.
    """
    for name in workloads:
        work = WORKLOADS[name]
        config = run_config(work, remat, microbatch_size)
        model = dataclasses.replace(
            read_model_config(str(work.folder(models))), dtype="float32", remat=remat
        )
        for kind in lengths:
            for seed in range(draws):
                batch = make_batch(work, config, model.vocab_size, kind, seed)
                rows = measure(Decoder(model), config, batch, rounds)
                title = f"{name}, {kind} lengths, draw {seed}"
                show(f"{title}: {describe(batch)}", rows)
                line = {
                    "benchmark": "packing",
                    "workload": dataclasses.asdict(work),
                    "lengths": kind,
                    "draw": seed,
                    "tokens": int(batch.mask.sum()),
                    "shape": describe(batch),
                    "remat": remat,
                    "microbatch_size": microbatch_size,
                    "rows": rows,
                    "device": jax.devices()[0].device_kind,
                    "versions": own_versions(),
                    **surroundings(),
                }
                publish(line, out)


def run_config(work: Workload, remat: Any, microbatch_size: int | None) -> TrainConfig:
    """The run whose programs these are."""
    sizes = work.sizes | {"max_new_tokens": 4 * work.new_tokens}
    return TrainConfig(
        model="benchmark",
        **sizes,
        microbatch_size=microbatch_size,
        compute_dtype="float32",
        remat=remat,
    )


def make_batch(
    work: Workload, config: TrainConfig, vocabulary: int, kind: Lengths, seed: int
) -> Batch:
    """Random tokens in the rows that the learner would take."""
    rng = np.random.default_rng(seed)
    limit, shape = config.max_new_tokens, (work.prompts, work.group)
    lengths = np.full(shape, work.new_tokens)
    if kind == "geometric":
        lengths = np.minimum(rng.geometric(1 / work.new_tokens, shape), limit)
    width = bucket(int(lengths.max()), limit=limit)
    mask = np.arange(width) < lengths[..., None]
    draw = functools.partial(rng.integers, 2, vocabulary, dtype=np.int32)
    batch = Batch(
        prompts=draw((work.prompts, work.prompt_tokens)),
        prompt_lengths=np.full(work.prompts, work.prompt_tokens, np.int32),
        completions=draw(mask.shape),
        mask=mask,
        advantages=rng.normal(size=shape).astype(np.float32),
        sampler_logp=np.full(mask.shape, -9.0, np.float32),
        ref_logp=np.full(mask.shape, -9.0, np.float32),
        packing=pack(mask, work.prompt_tokens, microbatch_size=config.microbatch_size),
    )
    return jax.tree.map(jnp.asarray, batch)


def describe(batch: Batch) -> str:
    """Rows and places, unpacked and shared: ``64 of 127 in 20 of 128``."""
    groups, group, width = batch.completions.shape
    rows, places = groups * group, width - 1
    if batch.packing is None:
        return f"{rows} of {places}"
    parts, fewer, other = batch.packing.source.shape
    return f"{rows} of {places} in {parts * fewer} of {other}"


def measure(
    model: Decoder, config: TrainConfig, batch: Batch, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds, GFLOP and MiB of scoring and update, in both forms and their ratios."""
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    tx = make_optimizer(config.optimizer, total_updates=1000)
    score = jax.jit(functools.partial(score_batch, model, config))
    step = jax.jit(make_train_step(model, tx, config), donate_argnums=0)
    state = make_train_state(params, tx)
    forms = {"packed": batch, "unpacked": batch.replace(packing=None)}
    rows: dict[str, dict[str, float]] = {name: {} for name in forms}
    programs = {}
    for name, given in forms.items():
        programs[name] = (
            score.lower({"params": params}, given).compile(),
            step.lower(state, given).compile(),
        )
        for phase, program in zip(("score", "update"), programs[name], strict=True):
            rows[name] |= compiled(phase, program)
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for name, given in forms.items():
            scored, updated = programs[name]
            taken = timed(scored, {"params": state.params}, given)[1]
            (state, _), more = timed(updated, state, given)
            if turn:  # the first turn touches memory for the first time
                seconds.setdefault((name, "score"), []).append(taken)
                seconds.setdefault((name, "update"), []).append(more)
    for (name, phase), values in seconds.items():
        rows[name][f"{phase} s"] = statistics.median(values)
    rows["unpacked / packed"] = {
        key: rows["unpacked"][key] / rows["packed"][key] for key in rows["packed"]
    }
    return rows


def compiled(phase: str, program: Any) -> dict[str, float]:
    """Operations and memory of a compiled program."""
    memory = program.memory_analysis()
    return {
        f"{phase} GFLOP": program.cost_analysis()["flops"] / 1e9,
        f"{phase} MiB": memory.temp_size_in_bytes / 2**20,
    }


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The result of a call, and its seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - start


if __name__ == "__main__":
    tyro.cli(main)
