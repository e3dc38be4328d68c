"""What checkpoints cost a run: seconds that a save blocks the loop, and slows steps.

    python benchmarks/checkpoint.py smol [--models benchmarks/models] [--out FILE]

`grpo_jax.train` saves after every second step. Steps beside a save that still runs in
the background are compared with those beside none.
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import tyro
from workloads import WORKLOADS, exact_prompts, publish, record, reward, versions

from grpo_jax import TrainConfig, train
from grpo_jax.checkpointing import checkpoints as checkpoint
from grpo_jax.config import (
    CheckpointConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
)
from grpo_jax.weights.pretrained import load_without_weights

EVERY = 2  # steps between saves


def main(
    workload: tyro.conf.Positional[str],
    *,
    models: Path = Path("benchmarks/models"),
    steps: int = 6,
    dtype: str = "float32",
    out: Path | None = None,
) -> None:
    """Run the steps of a workload with saves and print one JSON line.

    Args:
      workload: its name in workloads.py.
      models: the folder that models.py made.
      steps: steps in all, at least 5; the first two, which compile, are left out.
      dtype: number type of the matrix products.
      out: a file to which the line is appended.
    """
    if steps < 2 * EVERY + 1:
        raise ValueError(f"--steps must be at least {2 * EVERY + 1}, got {steps}.")
    work = WORKLOADS[workload]
    folder = models / work.model
    tokenizer = load_without_weights(str(folder))[1]
    texts = exact_prompts(
        lambda text: tokenizer.encode_prompt(text), 64, work.prompt_tokens
    )
    with tempfile.TemporaryDirectory() as run_dir, saves_timed() as spent:
        config = TrainConfig(
            model=str(folder),
            run_dir=run_dir,
            steps=steps,
            **work.sizes,
            eval_every=0,
            eval_prompts=0,
            compute_dtype=dtype,
            objective=ObjectiveConfig.preset("grpo"),
            sampling=SamplingConfig(stop_ids=()),
            optimizer=OptimizerConfig(learning_rate=1e-6),
            checkpoint=CheckpointConfig(every=EVERY, keep=1),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            result = train(
                config,
                dataset=[{"prompt": text} for text in texts],
                rewards=lambda completions, **_: reward(completions),
            )
        if result.summary["status"] != "finished":
            raise RuntimeError(f"the run was stopped after step {len(result.history)}")
        newest = run_dir / Path("checkpoints") / str(steps)
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    rows = [line for line in result.history if line["step"] > EVERY]
    beside = [row["time/step"] for row in rows if row["step"] % EVERY == 1]
    alone = [row["time/step"] for row in rows if row["step"] % EVERY != 1]
    step = statistics.median(alone)
    # The first save compiles the checksums.
    seconds = {name: statistics.median(times[1:]) for name, times in spent.items()}
    slower = statistics.median(beside) - step
    publish(
        record(
            f"grpo_jax-checkpoint-{dtype}",
            work,
            {"step": step, "step_beside_save": step + slower, **seconds},
            share_of_step={
                "blocked": round(seconds["blocked"] / step, 4),
                "checksums": round(seconds["checksums"] / step, 4),
                "blocked_and_beside": round((seconds["blocked"] + slower) / step, 4),
            },
            checkpoint_gib=round(size / 2**30, 3),
            all_seconds={"alone": alone, "beside": beside, **spent},
            device=jax.devices()[0].device_kind,
            versions=versions("grpo-jax", "jax", "jaxlib", "orbax-checkpoint"),
        ),
        out,
    )


@contextlib.contextmanager
def saves_timed() -> Iterator[dict[str, list[float]]]:
    """Seconds of each save inside `with`, by what is measured.

    ``blocked``: until the loop may go on; ``checksums``: of these, the metadata.
    """
    spent: dict[str, list[float]] = {"blocked": [], "checksums": []}

    def timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            times.append(time.perf_counter() - start)
            return result

        return call

    save = timed(checkpoint.Checkpoints.save, spent["blocked"])
    metadata = timed(checkpoint.make_metadata, spent["checksums"])
    with (
        mock.patch.object(checkpoint.Checkpoints, "save", save),
        mock.patch.object(checkpoint, "make_metadata", metadata),
    ):
        yield spent


if __name__ == "__main__":
    tyro.cli(main)
