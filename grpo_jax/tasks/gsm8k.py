"""Grade-school word problems whose answers are whole numbers.

Cobbe et al. 2021, https://arxiv.org/abs/2110.14168: 7,473 training and 1,319 test
problems. Rows come from local files, or from the Hugging Face hub.
"""

import reprlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from grpo_jax.tasks._numbers import number_text
from grpo_jax.tasks._rows import FileRows, Row, place
from grpo_jax.tasks.answers import (
    boxed_number,
    last_number,
    marked_number,
    parse_number,
)
from grpo_jax.tasks.base import Task, completion_text, per_completion
from grpo_jax.tasks.jsonl import read_splits

INSTRUCTION = (
    "Solve the problem step by step. "
    'Then write the final answer as a number after "####".'
)
# What rows have as `mark` where the answer is asked for in a box.
_BOX = r"\boxed{}"
_BOXED = INSTRUCTION.replace('after "####"', f"within {_BOX}")
_HUB_NAME = "openai/gsm8k"


def gsm8k_task(data: str | None, *, boxed: bool = False) -> Task:
    r"""Returns GSM8K from a folder with `train.jsonl` and `test.jsonl`, or from a file.

    Without `data` it is downloaded from the hub, which needs the extra `hub`. Prompts
    are one user message; the columns are `question` and `answer`, the gold number. The
    default weights make the right answer worth ten times the format.

    The prompt asks for the answer after `####`, and only there it counts. With `boxed`,
    both is so of `\boxed{}`, which models that were trained on mathematics write.
    """
    train, test, held_out = _from_hub() if data is None else read_splits(data)
    return Task(
        name="gsm8k:boxed" if boxed else "gsm8k",
        train=_rows(train, boxed=boxed),
        test=_rows(test, boxed=boxed),
        held_out=held_out,
        rewards=(accuracy_reward, format_reward),
        reward_weights=(1.0, 0.1),
        is_correct=is_correct,
        is_correct_lenient=is_correct_lenient,
        answer=lambda text, row: _vote(_marked(text, row.get("mark"))),
        answer_lenient=lambda text, row: _vote(last_number(text)),
    )


@per_completion
def accuracy_reward(
    prompts: list,
    completions: list,
    answer: list[str],
    mark: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 where the marked number is the gold answer, else 0.0.

    It follows the last `####`, or is in the last box of a row whose `mark` is the box.
    """
    marks = mark or [None] * len(completions)
    return [
        float(is_correct(completion_text(completion), {"answer": gold, "mark": kind}))
        for completion, gold, kind in zip(completions, answer, marks, strict=True)
    ]


@per_completion
def format_reward(
    prompts: list, completions: list, mark: list[str] | None = None, **columns: Any
) -> list[float]:
    """1.0 where a completion has a marked number, right or wrong, else 0.0."""
    marks = mark or [None] * len(completions)
    return [
        float(_marked(completion_text(completion), kind) is not None)
        for completion, kind in zip(completions, marks, strict=True)
    ]


def is_correct(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the marked number, as in `accuracy_reward`, is the row's answer."""
    return _equal(_marked(completion, row.get("mark")), row["answer"])


def is_correct_lenient(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the last number of the completion is the row's answer.

    For models that were not taught the format: it counts answers without a mark, and
    also numbers that were never meant as one.
    """
    return _equal(last_number(completion), row["answer"])


def _marked(text: str, mark: str | None) -> Fraction | None:
    return boxed_number(text) if mark == _BOX else marked_number(text)


def _equal(found: Fraction | None, gold: str) -> bool:
    # A gold answer that is no number would otherwise equal an answer that is missing.
    return found is not None and found == parse_number(gold)


def _vote(found: Fraction | None) -> str | None:
    return None if found is None else number_text(found)


def _rows(items: Sequence[Row], *, boxed: bool) -> Sequence[Row]:
    rows = [
        _row(item, boxed=boxed, where=place(items, number, name=_HUB_NAME))
        for number, item in enumerate(items)
    ]
    if isinstance(items, FileRows):
        return FileRows(rows, file=items.file, lines=items.lines)
    return rows


def _row(item: Mapping[str, Any], *, boxed: bool, where: str) -> dict[str, Any]:
    for name in ("question", "answer"):
        if not isinstance(item.get(name), str) or not item[name]:
            found = reprlib.repr(item[name]) if name in item else "none"
            raise ValueError(
                f"{where} must have the strings 'question' and 'answer', but has "
                f"{found} for {name!r}; its columns are {', '.join(sorted(item))}."
            )
    question, solution = item["question"], item["answer"]
    gold = marked_number(solution)
    if gold is None:
        _, mark, end = solution.rpartition("####")
        raise ValueError(
            f"{where} has no number after '####' in its answer, or more than one: "
            f"{(mark + end)[-60:]!r}; write one number there, such as #### 3.5."
        )
    instruction = _BOXED if boxed else INSTRUCTION
    prompt = [{"role": "user", "content": f"{question}\n\n{instruction}"}]
    row = {"prompt": prompt, "question": question, "answer": number_text(gold)}
    return row | {"mark": _BOX} if boxed else row


def _from_hub() -> tuple[Any, Any, str]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "GSM8K from the hub needs the datasets library: pip install "
            "'grpo-jax[hub]', or give a local copy with --data DIR."
        ) from error
    try:
        splits = datasets.load_dataset(_HUB_NAME, "main")
    except OSError as error:  # ConnectionError and every other failed download
        raise ValueError(
            f"cannot load {_HUB_NAME} from the hub ({error}). Give a local copy with "
            "--data DIR, a folder with train.jsonl and test.jsonl."
        ) from error
    return splits["train"], splits["test"], f"those of {_HUB_NAME}"
