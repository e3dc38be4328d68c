"""A task: rows with prompts, reward functions, and a test of correctness.

A row is a mapping with a `prompt` (a string, or a list of chat messages) and any
further columns; reward functions receive the columns by name, a value per completion.
"""

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from grpo_jax.tasks._rows import FileRows, Row, check_rows, is_conversational

# f(prompts, completions, **columns) -> one reward per completion, None for "no reward";
# a plain or an `async def` function. The convention is TRL's GRPOTrainer's.
RewardFunction = Callable[..., Any]
# Completion text and its row -> the answer that it gives, or None.
# Equal answers are one vote of a majority, so they must be both right or both wrong.
AnswerReader = Callable[[str, Row], Hashable | None]

# The name of a task made of rows that the caller gave.
CALLERS_ROWS = "dataset"

_Function = TypeVar("_Function", bound=RewardFunction)
# By identity: a decorator that copies a function's attributes to another one, as
# `functools.wraps` does, must not mark the other one.
_PER_COMPLETION: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _whole_text(completion: str, row: Row) -> str | None:
    """The completion without the spaces around it; None for an empty one."""
    return completion.strip() or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts to train on, held-out prompts, and how completions are judged.

    Construction looks at the first rows only, because rows may be made on demand; code
    that reads rows from elsewhere calls `check_rows` on all of them.
    """

    name: str
    train: Sequence[Row]
    test: Sequence[Row] = ()  # held-out rows; may be empty
    held_out: str = ""  # where they come from; "" where that is obvious
    rewards: tuple[RewardFunction, ...]
    # Completion text and its row -> right or wrong; None where only rewards can judge.
    is_correct: Callable[[str, Row], bool] | None = None
    # The same for a lenient reading, which asks for the answer and not for the format.
    is_correct_lenient: Callable[[str, Row], bool] | None = None
    answer: AnswerReader = _whole_text
    answer_lenient: AnswerReader | None = None
    # The judge where comparing texts is not enough: a reward function that receives
    # what `answer` found instead of the completions, and returns 1.0 for right.
    verdict: RewardFunction | None = None
    reward_weights: tuple[float, ...] | None = None  # the task's own; None means all 1
    # Whether rewards must run in a worker process, because they parse model output.
    isolate: bool = False

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError(
                f"task {self.name!r} has no reward function; give at least one."
            )
        for reward in self.rewards:
            if not callable(reward):
                raise ValueError(
                    f"rewards of task {self.name!r} must be functions, got {reward!r}."
                )
        weights = self.reward_weights
        if weights is not None and len(weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights of task {self.name!r} has {len(weights)} entries for "
                f"{len(self.rewards)} reward functions; give one per function."
            )
        check_rows(self.train, name=f"{self.name} training rows", count=1)
        if len(self.test):
            check_rows(self.test, name=f"{self.name} held-out rows", count=1)
            if is_conversational(self.train) != is_conversational(self.test):
                raise ValueError(
                    f"task {self.name!r} has prompts of two kinds, strings and chat "
                    "messages, in its training and held-out rows; use one kind."
                )


def task_from_rows(
    rows: Sequence[Row],
    rewards: RewardFunction | Sequence[RewardFunction],
    *,
    eval_rows: Sequence[Row] | None = None,
) -> Task:
    """Returns a task made of the caller's own rows and reward functions.

    `rows` may be a list of dicts or anything like it with a length, such as a
    `datasets.Dataset` (its rows stay on disk until they are used). Raises `ValueError`
    for no rows, and for the first row that cannot be used.
    """
    check_rows(rows, name="dataset rows")
    if eval_rows is not None:
        check_rows(eval_rows, name="held-out dataset rows")
    return Task(
        name=CALLERS_ROWS,
        train=rows,
        test=() if eval_rows is None else eval_rows,
        rewards=reward_functions(rewards),
    )


def per_completion(function: _Function) -> _Function:
    """Mark a reward function that scores each completion on its own.

    What it returns and gives to `log_extra` for a completion then follows from that
    completion, its prompt and its columns alone, and each number that it gives to
    `log_metric` is a mean over the completions of the call. A run may call it group by
    group, in a thread, while other groups are still sampled. For functions, methods
    (also `__call__`), partials and objects; returns the same object.
    """
    if not callable(function) or isinstance(function, type):
        raise ValueError(
            f"per_completion marks a reward function, got {function!r:.100}; of a "
            "class, mark its method __call__."
        )
    _PER_COMPLETION[id(function)] = function
    return function


def is_per_completion(function: RewardFunction) -> bool:
    """Whether a reward function, or what it is a partial or a method of, is marked."""
    if _PER_COMPLETION.get(id(function)) is function:
        return True
    if isinstance(function, functools.partial):
        return is_per_completion(function.func)
    if inspect.ismethod(function):
        return is_per_completion(function.__func__)
    call = type(function).__call__  # of an object
    return inspect.isfunction(call) and is_per_completion(call)


def reward_functions(given: Any) -> tuple[RewardFunction, ...]:
    """Returns one function or several as a tuple; `Task` checks what is in it."""
    if callable(given):
        return (given,)
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(
            f"rewards must be a function or a list of functions, got {given!r:.100}."
        )
    return tuple(given)


def describe_held_out(task: Task) -> str:
    """The number of held-out rows, and their source if it is not obvious."""
    if not len(task.test):
        return "none held out"
    source = f" ({task.held_out})" if task.held_out else ""
    return f"{len(task.test):,} held out{source}"


def first_rows(rows: Sequence[Row], count: int | None) -> Sequence[Row]:
    """The first `count` rows as a list, or all; rows of a file still know their lines.

    Rows are read one by one: a slice of a `datasets.Dataset` is not a list of rows.
    """
    numbers = range(len(rows) if count is None else min(count, len(rows)))
    if isinstance(rows, FileRows):
        return rows.pick(numbers)
    return [rows[number] for number in numbers]


def line_of(rows: Sequence[Row], number: int) -> str | None:
    """The file and the line that a row comes from, or None for rows of no file."""
    if isinstance(rows, FileRows):
        return rows.line(number)
    return None


def completion_text(completion: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a completion: itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    return completion[-1]["content"]
