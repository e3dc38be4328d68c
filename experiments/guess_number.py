"""A game learned: guess a number from 0 to 9 in four tries.

    python experiments/guess_number.py

Hardware: 2 CPU cores. Time: ten minutes of processor time.
Result: the mean reward of 200 greedy games rises from 0.06 to 0.35, from 0.12 to 0.43
and from 0.08 to 0.39 (seeds 0, 1 and 2). Halving the range of possible numbers at each
guess would give 0.525, and choosing digits at random, none of them twice, 0.25.
"""

import random

import tyro

from grpo_jax import (
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    Step,
    TextEnvironment,
    TrainConfig,
    train,
)

# The packaged model writes a digit only behind sums, so sums are the signs of the game.
BEGIN, HIGHER, LOWER = "99-95=", "99-94=", "99-97="
TRIES = 4


class GuessTheNumber(TextEnvironment):
    """A right guess is worth 1, and a quarter less for each try before it."""

    def reset(self, *, seed, **row):
        """Choose the number that all members of a group have to find."""
        self.number, self.tries = random.Random(seed).randrange(10), 0
        return BEGIN

    def step(self, text):
        """Judge one guess."""
        self.tries += 1
        guess = "0123456789".find(text) if len(text) == 1 else -1
        if guess == self.number:
            return Step(reward=1.0 - (self.tries - 1) / TRIES, done=True)
        if guess < 0 or self.tries == TRIES:
            return Step(reward=0.0, done=True)
        return Step(HIGHER if guess < self.number else LOWER)


def main(steps: int = 200, seed: int = 0, run_dir: str | None = None) -> None:
    """Train, then print the mean return of greedy games before and after."""
    config = TrainConfig(
        steps=steps,
        seed=seed,
        run_dir=run_dir or f"runs/guess-number-{seed}",
        prompts_per_step=16,
        group_size=16,
        max_new_tokens=40,
        eval_every=50,
        eval_prompts=200,
        sampling=SamplingConfig(temperature=1.5),
        objective=ObjectiveConfig(kl_coef=0.0, advantage="leave_one_out"),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, schedule="linear", warmup_steps=5
        ),
    )
    summary = train(config, environment_factory=GuessTheNumber).summary
    before, after = summary["eval_reward_before"], summary["eval_reward_after"]
    print(f"return {before:.3f} -> {after:.3f}; the best possible is 0.525")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
