"""Seconds of a whole GRPO step of this library, phase by phase.

    python benchmarks/step.py tiny [--steps 14] [--dtype float32] [--out FILE]

The step is that of `grpo_jax.train`: what is measured is what a user runs.
"""

import contextlib
import dataclasses
import io
import tempfile
from pathlib import Path

import jax
import tyro
from machine import floors, measure, ratios, share_left, token_bytes
from workloads import (
    WORKLOADS,
    exact_prompts,
    medians,
    own_versions,
    publish,
    record,
    reward,
    show,
)

from grpo_jax import TrainConfig, train
from grpo_jax.config import ObjectiveConfig, OptimizerConfig, SamplingConfig
from grpo_jax.weights.pretrained import load_without_weights

WARMUP = 1


def main(
    workload: tyro.conf.Positional[str],
    *,
    models: Path = Path("benchmarks/models"),
    steps: int | None = None,
    dtype: str = "float32",
    remat: str = "auto",
    microbatch_size: int | None = None,
    out: Path | None = None,
) -> None:
    """Run the steps of a workload; print floors and, last, a line of JSON.

    Args:
      workload: its name in workloads.py.
      models: the folder that models.py made.
      steps: steps in all; the first one compiles and is left out.
      dtype: number type of the matrix products.
      remat: what the backward pass computes again.
      microbatch_size: sequences held at once; all by default.
      out: a file to which the line is appended.
    """
    work = WORKLOADS[workload]
    folder = work.folder(models)
    count = steps or work.steps
    config = lambda run_dir: TrainConfig(  # noqa: E731
        model=str(folder),
        run_dir=run_dir,
        steps=count,
        **work.sizes,
        eval_every=0,
        eval_prompts=0,
        compute_dtype=dtype,
        remat=remat,
        microbatch_size=microbatch_size,
        objective=ObjectiveConfig.preset("grpo"),
        sampling=SamplingConfig(stop_ids=()),
        optimizer=OptimizerConfig(learning_rate=1e-6),
    )
    model, tokenizer = load_without_weights(str(folder))
    model = dataclasses.replace(model, dtype=dtype)
    machine = measure(dtype, bytes_read=token_bytes(model, work))
    texts = exact_prompts(
        lambda text: tokenizer.encode_prompt(text), 64, work.prompt_tokens
    )
    with tempfile.TemporaryDirectory() as run_dir:
        with contextlib.redirect_stdout(io.StringIO()):
            result = train(
                config(run_dir),
                dataset=[{"prompt": text} for text in texts],
                rewards=lambda completions, **_: reward(completions),
            )
    rows = [line for line in result.history if line["step"] > WARMUP]
    assert all(row["completions/mean_length"] == work.new_tokens for row in rows)
    middle = medians(rows)
    phases = {
        name: middle[f"time/{key}"]
        for name, key in (
            ("rollout", "rollout"),
            ("reference", "score"),
            ("update", "update"),
            ("step", "step"),
        )
    }
    least = floors(model, machine, work)
    rates = f"{machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s"
    show(f"{workload}, {dtype}: {rates}", ratios(phases, least))
    publish(
        record(
            f"grpo_jax-{dtype}",
            work,
            phases,
            floors={name: round(value, 5) for name, value in least.items()},
            machine_rates=dataclasses.asdict(machine),
            rate_left=round(share_left(machine, dtype), 3),
            sampler_logp_diff=max(row["sampler_logp_diff/max"] for row in rows),
            device=jax.devices()[0].device_kind,
            versions=own_versions(),
        ),
        out,
    )


if __name__ == "__main__":
    tyro.cli(main)
