"""The reward that environments give, as a reward function among the others."""

from collections.abc import Mapping, Sequence
from typing import Any


class EnvironmentReward:
    """Reads the reward of one class of environments from what its episodes gave.

    A completion that played in an environment of another class has none.
    """

    def __init__(self, name: str) -> None:
        """The reward of that name, see `Host.reward_names`."""
        self.__name__ = name

    def __call__(
        self, environment_rewards: Sequence[Mapping[str, float]], **_: Any
    ) -> list[float]:
        """The reward of each completion, NaN for none."""
        return [rewards[self.__name__] for rewards in environment_rewards]
