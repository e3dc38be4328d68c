"""Rewards for format and for accuracy, weighted and combined, on rows of your own.

    python experiments/combined_rewards.py
    python experiments/combined_rewards.py --format-weight 0.5

Hardware: 2 CPU cores. Time: about a minute.
Result: reward 0.675 -> 0.950, held-out accuracy 0.449 -> 0.963 (seed 0).

There are two ways to combine rewards. One function can add them, as here. Or pass
several functions and their weights, which also logs each under its name:
`train(TrainConfig(rewards=RewardsConfig(weights=(0.8, 0.2))),
rewards=[accuracy_rewards, format_rewards])`.
"""

import functools
import re

import tyro

from grpo_jax import TrainConfig, evaluate, load_task, per_completion, restore, train
from grpo_jax.tasks.answers import same_answer


@per_completion
def format_rewards(completions):
    """1.0 for a completion that is only a whole number."""
    return [float(bool(re.fullmatch(r"-?[0-9]+", text))) for text in completions]


@per_completion
def accuracy_rewards(completions, answers):
    """1.0 for a completion whose last number is the answer."""
    pairs = zip(completions, answers, strict=True)
    return [float(same_answer(text, answer)) for text, answer in pairs]


@per_completion
def combined_reward_function(prompts, completions, answers, *, format_weight=0.2):
    """The weighted sum, from 0 to 1; it is 1 for only the right answer."""
    accuracy, form = accuracy_rewards(completions, answers), format_rewards(completions)
    return [
        (1.0 - format_weight) * right + format_weight * neat
        for right, neat in zip(accuracy, form, strict=True)
    ]


def main(
    steps: int = 60,
    seed: int = 0,
    format_weight: float = 0.2,
    run_dir: str | None = None,
) -> None:
    """Train on rows with a column `answers` and print accuracy and reward."""
    task = load_task("arithmetic")
    rows = [{"prompt": row["prompt"], "answers": row["answer"]} for row in task.train]
    config = TrainConfig(
        steps=steps, seed=seed, run_dir=run_dir or f"runs/combined-{seed}"
    )
    reward = functools.partial(combined_reward_function, format_weight=format_weight)
    result = train(config, dataset=rows, rewards=reward)
    first, *_, last = (line["reward"] for line in result.history)
    print(f"reward of the first step {first:.3f}, of the last {last:.3f}")
    restored = restore(result.run_dir)
    measured = evaluate(restored.model, restored.params, restored.tokenizer, task)
    print(f"held-out accuracy {measured.accuracy:.3f} ± {measured.standard_error:.3f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
