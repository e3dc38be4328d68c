"""Problems of reasoning-gym in several tries; needs the extra `tasks`."""

import functools
import multiprocessing
from collections.abc import Callable
from typing import Any

from grpo_jax.environments.base import Step, TextEnvironment
from grpo_jax.tasks.answers import tagged_answer
from grpo_jax.tasks.reasoning_gym import library_score


def reasoning_gym_environment(
    *, tries: int = 3, discount: float = 1.0
) -> Callable[[], TextEnvironment]:
    """Returns a factory of environments that let the policy answer a problem again.

    Rows are those of a task `reasoning_gym:NAME`, whose columns say which problem it
    is: `load_task` makes them. A turn is read like a completion of that task, between
    <answer> and </answer>. The policy reads the library's score of a wrong answer,
    partial credit included, and what it has left.

    The return is `discount ** (k - 1)` for a right answer at try `k`, which ends the
    episode, and 0.0 if none is right. So the best try is the last one. Partial credit
    is no reward, as in the task: a policy learns to exploit it. Where there are few
    possible answers, a discount below 1 makes guessing worth less.

    The library's scorers evaluate what the policy wrote: set `environments.isolate`.

    Args:
      tries: most answers to one problem, at least 1.
      discount: above 0 and at most 1.
    """
    if tries < 1 or not 0.0 < discount <= 1.0:
        raise ValueError(
            "tries must be at least 1, and discount above 0 and at most 1, got "
            f"{tries} and {discount}."
        )
    return functools.partial(ReasoningGym, tries, discount)


class ReasoningGym(TextEnvironment):
    """One problem after the other; made by `reasoning_gym_environment`."""

    def __init__(self, tries: int, discount: float) -> None:
        self._tries, self._discount = tries, discount
        self._problem: dict[str, Any] = {}
        self._used = 0

    def reset(self, *, seed: int, **row: Any) -> None:
        """Begin with the problem of the row; its prompt stays as it is.

        Raises `ValueError` for rows of another task, and outside of a process for
        environments.
        """
        if not _may_hang_here():
            raise ValueError(
                "scorers of reasoning-gym evaluate what the policy wrote: set "
                "environments.isolate to True, which gives them their own process."
            )
        names = ("dataset", "dataset_seed", "index")
        missing = [name for name in names if name not in row]
        if missing:
            raise ValueError(
                f"the row has no column {', '.join(missing)}: rows must be those of a "
                "task reasoning_gym:NAME."
            )
        self._problem = {name: row[name] for name in names}
        self._used = 0

    def step(self, text: str) -> Step:
        """Score the answer of a turn; over when it is right, or was the last try."""
        self._used += 1
        answer = tagged_answer(text)
        score = library_score(answer, **self._problem)
        if score == 1.0:
            return Step(reward=self._discount ** (self._used - 1), done=True)
        left = self._tries - self._used
        if left <= 0:
            return Step(reward=0.0, done=True)
        fault = f"Your answer has a score of {score:.2f}; the right one has 1.00."
        if answer is None:
            fault = "There is no answer between <answer> and </answer>."
        again = "Try once more." if left == 1 else f"You have {left} more tries."
        return Step(observation=f"{fault} {again}", reward=0.0)


def _may_hang_here() -> bool:
    """Whether this is a process that another one started, and can replace."""
    return multiprocessing.parent_process() is not None
