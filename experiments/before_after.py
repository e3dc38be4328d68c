"""GRPO on GSM8K with a pretrained model: measured, trained, measured again.

    python experiments/before_after.py --model Qwen/Qwen2.5-0.5B-Instruct
    python experiments/get_model.py qwen2.5-coder-0.5b
    python experiments/before_after.py --data DIR \\
        --model models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

`--data` is a folder with train.jsonl and test.jsonl. Without it the rows come from the
hub. The task is `gsm8k:boxed`, because such models conclude in a box. After an
interruption the same command goes on.

Hardware: one accelerator (all weights, 100 steps, all held-out problems), or a CPU
(adapters, 30 small steps, 400 problems).
Time: on 2 CPU cores some hours a seed; `--steps 2 --prompts 8` is a trial.
Expected result: a line for each seed in results.jsonl, with the accuracy before and
after, strict and lenient, its standard error, and the share of cut completions.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from grpo_jax import TrainConfig, evaluate, load_pretrained, load_task, restore, train
from grpo_jax.config import CheckpointConfig, LoraConfig, ObjectiveConfig
from grpo_jax.config import OptimizerConfig as Adam
from grpo_jax.config.files import to_json_line


@dataclass(frozen=True)
class Options:
    """The options; None chooses a value for the hardware."""

    model: str
    data: str | None = None
    task: str = "gsm8k:boxed"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    prompts_per_step: int | None = None
    group_size: int | None = None
    max_new_tokens: int = 400
    learning_rate: float | None = None
    prompts: int | None = None  # held-out problems, from the first one on
    runs: Path = Path("runs/before_after")


def main(options: Options) -> None:
    """Measure the model, then train and measure it with each seed."""
    before = measure(options, "before", lambda: load_pretrained(options.model))
    for seed in options.seeds:
        config, name = configure(options, seed), f"after-{seed}"
        if (options.runs / f"{name}.json").is_file():
            continue
        if train(config).summary["status"] != "finished":
            return  # it was asked to stop
        after = measure(options, name, lambda run=config.run_dir: restore(run))
        line = {"seed": seed, "before": before, "after": after}
        with (options.runs / "results.jsonl").open("a") as file:
            file.write(to_json_line(line) + "\n")
        print(to_json_line(line), flush=True)


def configure(options: Options, seed: int) -> TrainConfig:
    """The run of a seed; there is no reference, and no evaluation in between."""
    cpu = jax.default_backend() == "cpu"
    return TrainConfig(
        model=options.model,
        task=options.task,
        data=options.data,
        seed=seed,
        run_dir=str(options.runs / f"seed-{seed}"),
        steps=options.steps or (30 if cpu else 100),
        prompts_per_step=options.prompts_per_step or (4 if cpu else 16),
        group_size=options.group_size or (8 if cpu else 16),
        max_new_tokens=options.max_new_tokens,
        eval_every=0,
        eval_prompts=0,
        objective=ObjectiveConfig(kl_coef=0.0),
        optimizer=Adam(learning_rate=options.learning_rate or (1e-4 if cpu else 1e-6)),
        lora=LoraConfig(rank=16 if cpu else None),
        checkpoint=CheckpointConfig(every=1 if cpu else 50),
    )


def measure(options: Options, name: str, source: Callable[[], Any]) -> dict[str, Any]:
    """The summary of an evaluation, and its completions in a file beside it."""
    path = options.runs / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    policy, task = source(), load_task(options.task, data=options.data)
    result = evaluate(
        policy.model,
        policy.params,
        policy.tokenizer,
        task,
        prompts=options.prompts or (400 if jax.default_backend() == "cpu" else None),
        max_new_tokens=options.max_new_tokens,
        batch_size=128 if jax.default_backend() == "cpu" else 512,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (to_json_line(record) + "\n" for record in result.records(task.test))
    path.with_suffix(".jsonl").write_text("".join(lines))
    path.write_text(json.dumps(result.summary(), indent=2) + "\n")
    return result.summary()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
