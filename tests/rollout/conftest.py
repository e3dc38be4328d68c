"""What the tests of rollouts share: groups that say whose they are."""

import numpy as np
import pytest

from grpo_jax.rollout.rollout import Rollout


def make_rollout(rewards, *, start=0, width=3, prompt_width=4, **changes):
    """A rollout of groups of two; what is in a group tells its number."""
    rewards = np.array(rewards, float)
    count, group = rewards.shape
    numbers = np.arange(start, start + count)
    tokens = np.broadcast_to(numbers[:, None, None], (count, group, width))
    fields = {
        "rows": [{"prompt": f"p{n}"} for n in numbers],
        "prompts": np.broadcast_to(numbers[:, None] + 50, (count, prompt_width)),
        "prompt_lengths": np.full(count, prompt_width),
        "tokens": tokens,
        "logp": -tokens.astype(float),
        "lengths": np.full((count, group), width),
        "finished": np.broadcast_to(numbers[:, None] % 2 == 0, (count, group)),
        "mask": np.ones((count, group, width), bool),
        "completions": [[f"{n}.{g}" for g in range(group)] for n in numbers],
        "keep": np.ones(count, bool),
        "rewards": rewards,
        "rewards_by_name": {"f": rewards * 2},
        "failures_by_name": {"f": np.broadcast_to(numbers[:, None], (count, group))},
        "extra": {"x": [[f"x{n}.{g}" for g in range(group)] for n in numbers]},
        "logged": {"depth": [float(start)]},
        "seconds": {"time/reward": 1.0},
    }
    return Rollout(**(fields | changes))


@pytest.fixture(name="make_rollout", scope="session")
def make_rollout_fixture():
    return make_rollout
