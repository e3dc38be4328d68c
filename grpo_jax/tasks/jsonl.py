"""Prompts and answers from `.jsonl` files: one JSON object per line.

Read with the standard library, strictly: a line that is not an object is an error that
names the file and the line.
"""

import json
import random
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.tasks.answers import last_answer, last_number, normalized, same_answer
from grpo_jax.tasks.base import Task, check_rows, completion_text

# Without a file of held-out rows: one row in ten is held out, at most 500.
HELD_OUT_FRACTION = 0.1
HELD_OUT_MOST = 500
# One split for every run, whatever its seed, so that scores of different seeds compare.
_SPLIT_SEED = 20240212


def jsonl_task(path: str) -> Task:
    """Returns a task of the rows of a `.jsonl` file, or of a folder with `train.jsonl`.

    Each row has a `prompt` (a string or chat messages) and an `answer` (a string or a
    number); see `read_splits` for the held-out rows, `answer_reward` for the reward.
    """
    train, test = read_splits(path)
    for rows in (train, test):
        _check_answers(rows, path)
    return Task(
        name=Path(path).stem,
        train=train,
        test=test,
        rewards=(answer_reward,),
        is_correct=is_correct,
        is_correct_lenient=is_correct_lenient,
        answer=read_answer,
        answer_lenient=read_answer_lenient,
    )


def answer_reward(
    prompts: list, completions: list, answer: list, **columns: Any
) -> list[float]:
    """1.0 for each completion that gives the answer, else 0.0.

    A number must be the last number of the completion; any other answer must be the
    whole completion, letter case, runs of spaces and a final period aside.
    """
    return [
        float(same_answer(completion_text(completion), str(expected)))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def is_correct(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the completion gives the row's answer, as `answer_reward` sees it."""
    return same_answer(completion, str(row["answer"]))


def is_correct_lenient(completion: str, row: Mapping[str, Any]) -> bool:
    """The same, or whether the answer at its end, however marked, is the row's."""
    return is_correct(completion, row) or is_correct(last_answer(completion) or "", row)


def read_answer(completion: str) -> Hashable | None:
    """The last number of a completion, else the whole of it; None for an empty one."""
    number = last_number(completion)
    return normalized(completion) or None if number is None else number


def read_answer_lenient(completion: str) -> Hashable | None:
    """The same for the answer at the end of the completion."""
    return read_answer(last_answer(completion) or "")


def read_splits(path: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns training and held-out rows of a file, or of a folder with `train.jsonl`.

    Held-out rows are those of the file beside it whose name has `test` for `train`
    (`train.jsonl` and `test.jsonl`); without one, a fixed tenth of the rows, at most
    500, in a random order that depends on nothing but their number.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "train.jsonl"
        if not file.is_file():
            raise ValueError(f"{path} has no train.jsonl; name a .jsonl file instead.")
    rows = read_jsonl(file)
    sibling = file.with_name(file.name.replace("train", "test"))
    if sibling != file and sibling.is_file():
        return rows, read_jsonl(sibling)
    return _split(rows)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Returns the objects of a `.jsonl` file; blank lines are skipped.

    Raises `ValueError` for a missing or empty file, text that is not UTF-8, and a line
    that is not a JSON object.
    """
    if not file.is_file():
        raise ValueError(f"{file} is not a file.")
    rows = []
    # Not splitlines(): strings in JSON may hold U+2028 and other line separators.
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if line.strip():
            rows.append(_object(line, where=f"{file}, line {number}"))
    if not rows:
        raise ValueError(f"{file} has no rows; at least one is needed.")
    return rows


def _text(file: Path) -> str:
    try:
        # A byte order mark at the start of the file is accepted and dropped.
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from error


def _object(line: str, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object: {line[:80]!r}.")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the keys {names} have a duplicate")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _split(rows: list[dict[str, Any]]) -> tuple[list[dict], list[dict]]:
    count = min(HELD_OUT_MOST, int(len(rows) * HELD_OUT_FRACTION))
    order = random.Random(_SPLIT_SEED).sample(range(len(rows)), len(rows))
    held_out = set(order[:count])
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in order[:count]]


def _check_answers(rows: list[dict[str, Any]], path: str) -> None:
    if not rows:
        return
    check_rows(rows, name=f"rows of {path}")
    for number, row in enumerate(rows):
        if "answer" not in row:
            listed = ", ".join(sorted(row))
            raise ValueError(
                f"rows of {path}: row {number} (counting from 0) has no 'answer' "
                f"column; its columns are {listed}."
            )
        answer = row["answer"]
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(
                f"rows of {path}: row {number} (counting from 0) has the answer "
                f"{answer!r}; expected a string or a number."
            )
