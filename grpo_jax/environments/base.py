"""What an environment is, and what one answers to a turn of the policy."""

import abc
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, NamedTuple

# A chat message: "role", "content", and where there are any "tool_calls" or "name".
Message = Mapping[str, Any]
# What the policy reads first.
Opening = str | Sequence[Message] | None


class Step(NamedTuple):
    """What a text environment answers to a turn.

    Attributes:
      observation: what the policy reads next: the text of a user's message, or
        messages.
      reward: for this turn; a trajectory's reward is the sum of those of its turns,
        and 0 before the first. None withholds it: a trajectory whose turns all have
        None has no reward, and is left out of means and of its group.
      done: whether the episode is over. The observation is then not shown.
    """

    observation: str | Sequence[Message] = ""
    reward: float | None = 0.0
    done: bool = False


class TextEnvironment(abc.ABC):
    """An environment that reads and writes text, such as a game.

    The policy's turn is its text. An instance plays one episode after the other, each
    from its own `reset`. All methods may be `async`.
    """

    @abc.abstractmethod
    def reset(self, *, seed: int, **row: Any) -> Opening | Awaitable[Opening]:
        """Begin an episode; all members of a group begin with the same seed and row.

        Args:
          seed: from which all random numbers of the episode follow.
          row: the columns of the task's row, "prompt" among them.

        Returns:
          What the policy reads first. A text is appended to the last message of the
          prompt; messages take the place of the prompt; None leaves it as it is.
        """

    @abc.abstractmethod
    def step(self, text: str) -> Step | Awaitable[Step]:
        """Answer a turn of the policy, its text without special tokens."""

    def close(self) -> Any:  # noqa: B027 - most have nothing to give back
        """Gives back what the environment holds, at the end of the run."""
