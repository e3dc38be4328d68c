"""Rows and a reward of your own, in one file: addition without carrying.

    python experiments/own_task.py

Hardware: 2 CPU cores. Time: about a minute.
Result: reward on 500 held-out rows ? -> ? (seed 0), after 60 steps.

`37+48=` is 75 here: 3+4 is 7, and of 7+8 the last digit is 5. The model that comes
with the package was never told so, yet some of its answers are right, and that is what
GRPO needs: it makes likelier what is sampled and rewarded, and finds nothing that is
never sampled.
"""

import random

import tyro

from grpo_jax import TrainConfig, train


def without_carry(a: int, b: int) -> str:
    """The sum, to whose tens the ones carry nothing: 37 and 48 are 75."""
    return f"{a // 10 + b // 10}{(a + b) % 10}"


def digits(completions, answer, **columns):
    """The share of the digits that are right, 0 for a text of another length."""
    scores = []
    for text, right in zip(completions, answer, strict=True):
        same = sum(one == other for one, other in zip(text, right, strict=False))
        scores.append(same / len(right) if len(text) == len(right) else 0.0)
    return scores


def main(steps: int = 60, seed: int = 0, run_dir: str | None = None) -> None:
    """Train on most of the rows; print the mean reward on the others, before, after."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"{a}+{b}=", "answer": without_carry(a, b)} for a, b in pairs]
    config = TrainConfig(
        steps=steps, seed=seed, run_dir=run_dir or f"runs/without-carry-{seed}"
    )
    summary = train(
        config, dataset=rows[500:], rewards=digits, eval_dataset=rows[:500]
    ).summary
    before, after = summary["eval_reward_before"], summary["eval_reward_after"]
    print(f"{before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
