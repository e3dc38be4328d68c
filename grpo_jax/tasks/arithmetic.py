"""Two-digit addition and subtraction, generated, so that a run needs no file.

Prompts look like `37+48=`, answers like `85`; a difference may be negative.
"""

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.tasks.answers import answer_like, same_answer
from grpo_jax.tasks.base import Task, completion_text, per_completion

_HELD_OUT = 1000  # held-out problems, at least
_OPERANDS = range(10, 100)
# One split for every run, whatever its seed: scores of different seeds compare, and a
# model trained by an earlier run has not seen the held-out problems of a later one.
_SPLIT_SEED = 20240212
_PROBLEM = re.compile(r"[1-9][0-9][+-][1-9][0-9]=")


def arithmetic_task() -> Task:
    """Returns all 16,200 problems `a+b` and `a-b`, at least 1,000 of them held out.

    A problem and its twin with exchanged operands are in the same part of the split, so
    that `34+12=` in training never reveals `12+34=` in the test.
    """
    twins = [
        sorted({(a, operator, b), (b, operator, a)})
        for operator in "+-"
        for a, b in itertools.combinations_with_replacement(_OPERANDS, 2)
    ]
    generator = random.Random(_SPLIT_SEED)
    generator.shuffle(twins)
    problems = list(itertools.chain.from_iterable(twins))
    cut = next(
        end
        for end in itertools.accumulate(len(pair) for pair in twins)
        if end >= _HELD_OUT
    )
    test, train = problems[:cut], problems[cut:]
    generator.shuffle(train)
    generator.shuffle(test)
    return Task(
        name="arithmetic",
        train=[_row(*problem) for problem in train],
        test=[_row(*problem) for problem in test],
        rewards=(correct,),
        is_correct=is_correct,
        is_correct_lenient=is_correct_lenient,
        answer_lenient=lambda text, row: answer_like(text, row["answer"]),
    )


def unknown_to_embedded(prompts: Sequence[Any]) -> str | None:
    """A warning of prompts that are not such problems; None if all of them are.

    The embedded model knows no other prompts.
    """
    strange = [p for p in prompts if not (isinstance(p, str) and _PROBLEM.fullmatch(p))]
    if not strange:
        return None
    characters = sorted(set("".join(map(str, strange))) - set("0123456789+-="))
    never = f" It has never seen {' '.join(map(repr, characters[:20]))}."
    return (
        "the embedded model knows only prompts like '37+48=' and '52-19='; "
        f"{len(strange):,} of {len(prompts):,} prompts are of another kind, such as "
        f"{strange[0]!r:.100}.{never if characters else ''} Name a language model with "
        "--model."
    )


@per_completion
def correct(
    prompts: list, completions: list, answer: list[str], **columns: Any
) -> list[float]:
    """1.0 for each completion that is the answer, without outer spaces; else 0.0."""
    return [
        float(is_correct(completion_text(completion), {"answer": expected}))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def is_correct(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the completion, without outer spaces, is the row's answer."""
    return completion.strip() == row["answer"]


def is_correct_lenient(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the last number of the completion is the row's answer."""
    return same_answer(completion, row["answer"])


def _row(a: int, operator: str, b: int) -> dict[str, str]:
    answer = a + b if operator == "+" else a - b
    return {"prompt": f"{a}{operator}{b}=", "answer": str(answer)}
