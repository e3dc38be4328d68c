"""What a task is: rows with prompts, reward functions, and a test of correctness.

A row is a mapping with a `prompt` (a string, or a list of chat messages) and any
further columns; reward functions receive the columns by name, a value per completion.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence, Sized
from typing import Any

Row = Mapping[str, Any]
# f(prompts, completions, **columns) -> one reward per completion, None for "no reward";
# a plain or an `async def` function. The convention is TRL's GRPOTrainer's.
RewardFunction = Callable[..., Any]
# What a completion gives as its answer; None where it gives none. Equal answers are one
# vote of a majority.
AnswerReader = Callable[[str], Hashable | None]

# Keywords that reward functions receive besides the columns.
RESERVED_COLUMNS = frozenset(
    {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}
)

# The name of a task made of rows that the caller gave.
CALLERS_ROWS = "dataset"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts to train on, held-out prompts, and how completions are judged.

    Construction looks at the first rows only, because rows may be made on demand; code
    that reads rows from elsewhere calls `check_rows` on all of them.
    """

    name: str
    train: Sequence[Row]
    test: Sequence[Row] = ()  # held-out rows; may be empty
    rewards: tuple[RewardFunction, ...]
    # Completion text and its row -> right or wrong; None where only rewards can judge.
    is_correct: Callable[[str, Row], bool] | None = None
    # The same for a lenient reading, which asks for the answer and not for the format.
    is_correct_lenient: Callable[[str, Row], bool] | None = None
    answer: AnswerReader = str.strip
    answer_lenient: AnswerReader | None = None
    # Judges where comparing cannot tell: a reward function that is given what `answer`
    # found in place of the completions, and gives 1.0 for right.
    verdict: RewardFunction | None = None
    reward_weights: tuple[float, ...] | None = None  # the task's own; None means all 1
    isolate: bool = (
        False  # rewards must run in a worker process: they parse model output
    )

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
    functions = (rewards,) if callable(rewards) else tuple(rewards)
    return Task(
        name=CALLERS_ROWS,
        train=rows,
        test=() if eval_rows is None else eval_rows,
        rewards=functions,
    )


def is_conversational(rows: Sequence[Row]) -> bool:
    """Whether the prompts are chat messages; rows that passed `check_rows` agree."""
    return not isinstance(rows[0]["prompt"], str)


def check_rows(rows: Sequence[Row], *, name: str, count: int | None = None) -> None:
    """Raises `ValueError` naming the first row that cannot be used, and why.

    Looks at the first `count` rows; None means all.

    Every row must be a mapping with the same columns, and with a `prompt` of the same
    kind: a non-empty string, or a non-empty list of `{"role": ..., "content": ...}`.
    """
    if isinstance(rows, Mapping | str) or not isinstance(rows, Sized):
        kind = type(rows).__name__
        remedy = "Turn it into a list of dicts"
        if isinstance(rows, Mapping) and kind.endswith("DatasetDict"):
            remedy = f"Choose a split: {', '.join(map(str, rows))}"
        raise ValueError(
            f"{name} must be a sequence of rows with a length, got a {kind}. {remedy}."
        )
    if not len(rows):
        raise ValueError(f"{name} are empty; at least one row is needed.")
    first: Row | None = None
    for number, row in enumerate(itertools.islice(rows, count)):
        problem = _row_problem(row) or _difference(row, first)
        if problem:
            raise ValueError(f"{name}: row {number} (counting from 0) {problem}.")
        first = row if first is None else first


def completion_text(completion: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a completion: itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    return completion[-1]["content"]


def _row_problem(row: Any) -> str | None:
    """What is wrong with one row by itself, or None."""
    if not isinstance(row, Mapping):
        return f"is a {type(row).__name__}; expected a mapping such as a dict"
    if "prompt" not in row:
        return f"has no 'prompt' column; its columns are {_listed(row)}"
    reserved = sorted(RESERVED_COLUMNS & row.keys())
    if reserved:
        return f"has a column {reserved[0]!r}, a name reserved for reward functions"
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return None if prompt else "has an empty prompt"
    if not isinstance(prompt, Sequence):
        kind = type(prompt).__name__
        return f"has a prompt of type {kind}; expected a string or a list of messages"
    if not prompt:
        return "has an empty list of messages as its prompt"
    if not all(_is_message(message) for message in prompt):
        return (
            "has a prompt with a bad message; each must be "
            '{"role": "...", "content": "..."} with both strings'
        )
    return None


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(
        isinstance(message.get(field), str) for field in ("role", "content")
    )


def _difference(row: Row, first: Row | None) -> str | None:
    """How a row differs in kind from the first one, or None."""
    if first is None:
        return None
    if isinstance(row["prompt"], str) != isinstance(first["prompt"], str):
        return "mixes string prompts and chat messages; row 0 has the other kind"
    if row.keys() != first.keys():
        return f"has the columns {_listed(row)}, row 0 has {_listed(first)}"
    return None


def _listed(row: Row) -> str:
    return ", ".join(sorted(map(str, row))) or "none"
