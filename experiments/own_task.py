"""Rows and a reward of your own, in one file: differences below zero.

    python experiments/own_task.py

Hardware: 2 CPU cores. Time: a minute or two.
Result: reward on 500 held-out rows 0.020 -> 0.998 (seeds 0 and 1), after 40 steps.

The packaged model usually forgets the minus sign of `12-57=`, but sometimes it is
right. GRPO needs that: it makes rewarded samples more likely, and it cannot learn an
answer that the model never samples.
"""

import random

import tyro

from grpo_jax import TrainConfig, per_completion, train


@per_completion
def signed(completions, answer, **columns):
    """1 for the answer, 0.2 for another text that begins with a minus sign, else 0."""
    return [
        1.0 if text == right else 0.2 * text.startswith("-")
        for text, right in zip(completions, answer, strict=True)
    ]


def main(steps: int = 40, seed: int = 0, run_dir: str | None = None) -> None:
    """Train, then print the mean reward on held-out rows before and after."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a + 1, 100)]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"{a}-{b}=", "answer": str(a - b)} for a, b in pairs]
    config = TrainConfig(
        steps=steps, seed=seed, run_dir=run_dir or f"runs/below-zero-{seed}"
    )
    summary = train(
        config, dataset=rows[500:], rewards=signed, eval_dataset=rows[:500]
    ).summary
    before, after = summary["eval_reward_before"], summary["eval_reward_after"]
    print(f"{before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
