"""An environment of three turns, which answers by its seed."""

import random

from grpo_jax.environments.base import Step, TextEnvironment


class Echo(TextEnvironment):
    """Says a digit, and rewards short turns."""

    def reset(self, *, seed, **row):
        self.random, self.turns = random.Random(seed), 0
        return f"{self.random.randrange(10, 100)}+{self.random.randrange(10, 100)}="

    def step(self, text):
        self.turns += 1
        reward = self.random.random() / (1 + len(text))
        digit = str(self.random.randrange(10))
        return Step(digit, reward=reward, done=self.turns == 3)
