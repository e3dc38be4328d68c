"""What a sampler asks at the end of a turn: whether a completion goes on."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Answer(NamedTuple):
    """What follows a turn of a completion.

    Attributes:
      number: of its prompt within this process's share.
      sample: its own number within the group.
      tokens: what it is given before it goes on; None where it is over.
    """

    number: int
    sample: int
    tokens: Sequence[int] | None


class Turns(Protocol):
    """Answers completions that have ended a turn, while others are still drawn.

    Each gets one answer for each of its turns. Which answers are there at which call
    must not depend on the clock, for the numbers that are drawn could.
    """

    def ended(self, number: int, sample: int, ids: list[int]) -> None:
        """Receive all tokens of a completion that has ended a turn; returns at once."""
        ...

    def answers(self, *, wait: bool) -> list[Answer]:
        """Answers to some of those that have ended a turn; with `wait` to all."""
        ...
