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
from grpo_jax.config import (
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    SamplingConfig,
)
from grpo_jax.weights.pretrained import load_without_weights

WARMUP = 1
PHASES = {
    "rollout": "rollout",
    "reference": "score",
    "update": "update",
    "step": "step",
}


def main(
    workload: tyro.conf.Positional[str],
    *,
    models: Path = Path("benchmarks/models"),
    steps: int | None = None,
    dtype: str = "float32",
    remat: str = "auto",
    microbatch_size: int | None = None,
    carry_over: bool = False,
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
      carry_over: let completions continue in the next step.
      out: a file to which the line is appended.
    """
    work = WORKLOADS[workload]
    folder = work.folder(models)
    count = steps or work.steps
    model, tokenizer = load_without_weights(str(folder))
    model = dataclasses.replace(model, dtype=dtype)
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
        sampling=SamplingConfig(stop_ids=work.stop_ids(model.vocab_size)),
        rollout=RolloutConfig(carry_over=carry_over),
        optimizer=OptimizerConfig(learning_rate=1e-6),
    )
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
    rows = [
        {name: line[f"time/{key}"] for name, key in PHASES.items()}
        | {"tokens": line["completions/mean_length"] * work.sequences}
        for line in result.history
        if line["step"] > WARMUP
    ]
    work.check([row["tokens"] / work.sequences for row in rows])
    mean = work.mean_tokens or work.new_tokens
    least = floors(model, machine, dataclasses.replace(work, new_tokens=mean))
    rates = f"{machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s"
    show(f"{workload}, {dtype}: {rates}", ratios(medians(rows), least))
    publish(
        record(
            f"grpo_jax-{dtype}" + ("-carry-over" if carry_over else ""),
            work,
            rows,
            floors={name: round(value, 5) for name, value in least.items()},
            machine_rates=dataclasses.asdict(machine),
            rate_left=round(share_left(machine, dtype), 3),
            sampler_logp_diff=max(
                line["sampler_logp_diff/max"] for line in result.history[WARMUP:]
            ),
            device=jax.devices()[0].device_kind,
            versions=own_versions(),
        ),
        out,
    )


if __name__ == "__main__":
    tyro.cli(main)
