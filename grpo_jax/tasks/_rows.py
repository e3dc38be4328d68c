"""Rows of a task: where they come from, and whether they can be used."""

import itertools
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

Row = Mapping[str, Any]

# Keywords that reward functions also receive.
_RESERVED_COLUMNS = frozenset(
    {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}
)


class FileRows(list[Row]):
    """Rows of a file that know their lines, counted from 1."""

    def __init__(self, rows: Iterable[Row], *, file: str, lines: Sequence[int]) -> None:
        super().__init__(rows)
        self.file, self.lines = file, lines

    def pick(self, numbers: Iterable[int]) -> "FileRows":
        """The rows of these numbers, in this order."""
        chosen = list(numbers)
        return FileRows(
            [self[number] for number in chosen],
            file=self.file,
            lines=[self.lines[number] for number in chosen],
        )

    def line(self, number: int) -> str:
        """The file and the line of the row of this number."""
        return f"{self.file}, line {self.lines[number]}"


def place(rows: Sequence[Row], number: int, *, name: str) -> str:
    """The place of a row for messages: its line, or its number among these rows."""
    if isinstance(rows, FileRows):
        return rows.line(number)
    return f"{name}: row {number} (counting from 0)"


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
    first: Row = {}
    for number, row in enumerate(itertools.islice(rows, count)):
        first = first or row
        problem = _row_problem(row) or _unlike(row, first)
        if problem:
            raise ValueError(f"{place(rows, number, name=name)} {problem}.")


def is_conversational(rows: Sequence[Row]) -> bool:
    """Whether the prompts are chat messages; rows that passed `check_rows` agree."""
    return not isinstance(rows[0]["prompt"], str)


def _row_problem(row: Any) -> str | None:
    """What is wrong with one row on its own, or None."""
    if not isinstance(row, Mapping):
        return f"is a {type(row).__name__}; expected a mapping such as a dict"
    if "prompt" not in row:
        return f"has no 'prompt' column; its columns are {_listed(row)}"
    reserved = sorted(_RESERVED_COLUMNS & row.keys())
    if reserved:
        return f"has a column {reserved[0]!r}, a name reserved for reward functions"
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return None if prompt else "has an empty prompt"
    if not isinstance(prompt, Sequence):
        return (
            f"has a prompt of type {type(prompt).__name__}, {reprlib.repr(prompt)}; "
            "expected a string or a list of messages"
        )
    if not prompt:
        return "has an empty list of messages as its prompt"
    for number, message in enumerate(prompt):
        problem = _message_problem(message)
        if problem:
            return (
                f"has a bad message in its prompt, number {number} from 0: {problem}; "
                'each must be {"role": "...", "content": "..."} with both strings'
            )
    return None


def _message_problem(message: Any) -> str | None:
    """What is wrong with a chat message, or None."""
    if not isinstance(message, Mapping):
        return f"{reprlib.repr(message)} is a {type(message).__name__}"
    for field in ("role", "content"):
        if field not in message:
            return f"it has no {field!r}, only {_listed(message)}"
        value = message[field]
        if not isinstance(value, str):
            kind = type(value).__name__
            return f"its {field!r} is {reprlib.repr(value)}, a {kind}"
    return None


def _unlike(row: Row, first: Row) -> str | None:
    """In what a row differs from the first one, or None."""
    if is_conversational([row]) != is_conversational([first]):
        return "mixes string prompts and chat messages, unlike the first row"
    if row.keys() != first.keys():
        return f"has the columns {_listed(row)}, the first has {_listed(first)}"
    return None


def _listed(row: Row) -> str:
    return ", ".join(sorted(map(str, row))) or "none"
