"""Prompts and answers from `.jsonl` files: one JSON object per line.

Read with the standard library, strictly: a line that is not an object is an error that
names the file and the line.
"""

import json
import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.tasks._rows import FileRows, check_rows
from grpo_jax.tasks.answers import answer_like, canonical, last_answer, same_answer
from grpo_jax.tasks.base import Task, completion_text, per_completion

# Without a file of held-out rows: one row in ten is held out, at most 500.
_HELD_OUT_FRACTION = 0.1
_HELD_OUT_MOST = 500
# One split for every run, whatever its seed, so that scores of different seeds compare.
_SPLIT_SEED = 20240212


def jsonl_task(path: str) -> Task:
    """Returns a task of the rows of a `.jsonl` file, or of a folder with `train.jsonl`.

    Each row has a `prompt` (a string or chat messages) and an `answer` (a string or a
    number); see `read_splits` for the held-out rows, `answer_reward` for the reward.
    """
    train, test, held_out = read_splits(path)
    for rows in filter(None, (train, test)):
        check_rows(rows, name=f"rows of {rows.file}")
        for number, row in enumerate(rows):
            if problem := _answer_problem(row):
                raise ValueError(f"{rows.line(number)} {problem}.")
    return Task(
        name=Path(path).stem,
        train=train,
        test=test,
        held_out=held_out,
        rewards=(answer_reward,),
        is_correct=_is_correct,
        is_correct_lenient=_is_correct_lenient,
        answer=_read_answer,
        answer_lenient=_read_answer_lenient,
    )


@per_completion
def answer_reward(
    prompts: list, completions: list, answer: list, **columns: Any
) -> list[float]:
    """1.0 for each completion that gives the answer, else 0.0.

    A number must be the last number of the completion. Any other answer must be the
    whole completion. Letter case, runs of spaces, a final period and variants of the
    same character do not matter.
    """
    return [
        float(same_answer(completion_text(completion), str(expected)))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def _is_correct(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the completion gives the row's answer, as `answer_reward` sees it."""
    return same_answer(completion, str(row["answer"]))


def _is_correct_lenient(completion: str, row: Mapping[str, Any]) -> bool:
    """The same, or whether the answer at its end, however marked, is the row's."""
    return _read_answer_lenient(completion, row) == canonical(str(row["answer"]))


def _read_answer(completion: str, row: Mapping[str, Any]) -> str | None:
    """The answer that a completion gives, or None.

    Its last number if the row's answer is a number, else the whole completion.
    """
    return answer_like(completion, str(row["answer"]))


def _read_answer_lenient(completion: str, row: Mapping[str, Any]) -> str | None:
    """The same for the answer at its end, unless the whole completion is right."""
    if _is_correct(completion, row):
        return _read_answer(completion, row)
    return _read_answer(last_answer(completion) or "", row)


def read_splits(path: str) -> tuple[FileRows, FileRows, str]:
    """Returns training rows, held-out rows and their source, from a file or folder.

    Held-out rows are those of the file beside it whose name has `test` for `train`
    (`train.jsonl` and `test.jsonl`); without one, a fixed tenth of the rows, at most
    500, in a random order that depends on nothing but their number. A folder stands for
    its `train.jsonl`.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "train.jsonl"
        if not file.is_file():
            raise ValueError(f"{path} has no train.jsonl; name a .jsonl file instead.")
    rows = _read_jsonl(file)
    sibling = _test_file(file)
    if sibling is not None:
        return rows, _read_jsonl(sibling), f"those of {sibling}"
    count = min(_HELD_OUT_MOST, int(len(rows) * _HELD_OUT_FRACTION))
    order = random.Random(_SPLIT_SEED).sample(range(len(rows)), len(rows))
    held_out = set(order[:count])
    train = rows.pick(index for index in range(len(rows)) if index not in held_out)
    source = f"a fixed tenth of {file}, at most {_HELD_OUT_MOST}"
    return train, rows.pick(order[:count]), source


def _test_file(file: Path) -> Path | None:
    """The file of held-out rows beside a file of training rows, if any.

    `test` replaces one `train` in the name, or all of them, in the same letter case.
    """

    def test_for(found: re.Match[str]) -> str:
        if found[0].isupper():
            return "TEST"
        return "Test" if found[0][0].isupper() else "test"

    name = file.name
    names = {re.sub("train", test_for, name, flags=re.IGNORECASE)} | {
        name[: found.start()] + test_for(found) + name[found.end() :]
        for found in re.finditer("train", name, re.IGNORECASE)
    }
    present = sorted(n for n in names - {name} if file.with_name(n).is_file())
    if len(present) > 1:
        raise ValueError(
            f"{file} has several files of held-out rows beside it: "
            f"{', '.join(present)}; leave one, or name a folder with train.jsonl and "
            "test.jsonl."
        )
    return file.with_name(present[0]) if present else None


def _read_jsonl(file: Path) -> FileRows:
    """Returns the objects of a `.jsonl` file; blank lines are skipped.

    Raises `ValueError` for a missing or empty file, text that is not UTF-8, and a line
    that is not a JSON object.
    """
    if not file.is_file():
        raise ValueError(f"{file} is not a file.")
    try:
        # A byte order mark at the start of the file is accepted and dropped.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from error
    rows, lines = [], []
    # Not splitlines(): strings in JSON may hold U+2028 and other line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_object(line, where=f"{file}, line {number}"))
            lines.append(number)
    if not rows:
        raise ValueError(f"{file} has no rows; at least one is needed.")
    return FileRows(rows, file=str(file), lines=lines)


def _object(line: str, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(
            line,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
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


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is larger than a float can be; write it as a string")
    return value


def _answer_problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the answer of a row, or None."""
    if "answer" not in row:
        return f"has no 'answer' column; its columns are {', '.join(sorted(row))}"
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        kind = type(answer).__name__
        return f"has the answer {answer!r} ({kind}); expected a string or a number"
    if not canonical(str(answer)):
        return f"has the empty answer {answer!r}, which no completion can give"
    if not same_answer(str(answer), str(answer)):
        return f"has the answer {answer!r}, which would not be judged right itself"
    return None
