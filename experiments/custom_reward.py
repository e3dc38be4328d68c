"""A reward function of your own, on a task that comes with the library.

    python experiments/custom_reward.py

Hardware: 2 CPU cores. Time: about a minute.
Result: held-out accuracy 0.449 -> 0.981 (seed 0).
"""

import tyro

from grpo_jax import TrainConfig, per_completion, train
from grpo_jax.tasks.answers import last_number, parse_number


@per_completion
def closeness(completions, answer, **columns):
    """1 for the answer, less for a number further from it, 0 for no number."""
    found = [last_number(text) for text in completions]
    right = [parse_number(text) for text in answer]
    return [
        0.0 if guess is None else 1.0 / (1.0 + float(abs(guess - truth)))
        for guess, truth in zip(found, right, strict=True)
    ]


def main(steps: int = 120, seed: int = 0, run_dir: str | None = None) -> None:
    """Train on two-digit arithmetic and print the accuracy before and after."""
    run_dir = run_dir or f"runs/closeness-{seed}"
    config = TrainConfig(steps=steps, seed=seed, run_dir=run_dir)
    summary = train(config, rewards=closeness).summary
    print(f"{summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
