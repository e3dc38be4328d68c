"""Grade-school word problems whose answers are whole numbers.

Cobbe et al. 2021, https://arxiv.org/abs/2110.14168: 7,473 training and 1,319 test
problems. Rows come from local files, or from the Hugging Face hub.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from grpo_jax.tasks.answers import last_number, marked_number, parse_number
from grpo_jax.tasks.base import Task, completion_text
from grpo_jax.tasks.jsonl import read_splits

INSTRUCTION = (
    "Solve the problem step by step. "
    'Then write the final answer as a number after "####".'
)
_HUB_NAME = "openai/gsm8k"


def gsm8k_task(data: str | None) -> Task:
    """Returns GSM8K from a folder with `train.jsonl` and `test.jsonl`, or from a file.

    Without `data` it is downloaded from the hub, which needs the extra `hub`. Prompts
    are one user message; the columns are `question` and `answer`, the gold number. The
    default weights make the right answer worth ten times the format.
    """
    train, test = _from_hub() if data is None else read_splits(data)
    source = _HUB_NAME if data is None else data
    return Task(
        name="gsm8k",
        train=_rows(train, source=source),
        test=_rows(test, source=source),
        rewards=(accuracy_reward, format_reward),
        reward_weights=(1.0, 0.1),
        is_correct=is_correct,
        is_correct_lenient=is_correct_lenient,
        answer=marked_number,
        answer_lenient=last_number,
    )


def accuracy_reward(
    prompts: list, completions: list, answer: list[str], **columns: Any
) -> list[float]:
    """1.0 where the number after the last `####` is the gold answer, else 0.0."""
    return [
        float(_equal(marked_number(completion_text(completion)), gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def format_reward(prompts: list, completions: list, **columns: Any) -> list[float]:
    """1.0 where the end of a completion has `####` and a number, right or wrong."""
    return [
        float(marked_number(completion_text(completion)) is not None)
        for completion in completions
    ]


def is_correct(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the number after the last `####` is the row's answer."""
    return _equal(marked_number(completion), row["answer"])


def is_correct_lenient(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the last number of the completion is the row's answer.

    For models that were not taught the format: it counts answers without `####`, and
    also numbers that were never meant as one.
    """
    return _equal(last_number(completion), row["answer"])


def _equal(found: Decimal | None, gold: str) -> bool:
    # A gold answer that is no number would otherwise equal an answer that is missing.
    return found is not None and found == parse_number(gold)


def _rows(items: Iterable[Mapping[str, Any]], *, source: str) -> list[dict[str, Any]]:
    return [
        _row(item, where=f"{source}: row {number} (counting from 0)")
        for number, item in enumerate(items)
    ]


def _row(item: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    question, solution = item.get("question"), item.get("answer")
    if not isinstance(question, str) or not isinstance(solution, str) or not question:
        columns = ", ".join(sorted(item))
        raise ValueError(
            f"{where} must have the strings 'question' and 'answer'; "
            f"its columns are {columns}."
        )
    gold = marked_number(solution)
    if gold is None:
        raise ValueError(f"{where} has no number after '####' in its answer.")
    prompt = [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}]
    return {"prompt": prompt, "question": question, "answer": str(gold)}


def _from_hub() -> tuple[Iterable[Any], Iterable[Any]]:
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
    return splits["train"], splits["test"]
