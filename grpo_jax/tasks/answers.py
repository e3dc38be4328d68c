"""Finds final answers in text of a model: numbers, tagged text, whole texts.

Model output is read, never evaluated, in time linear in its length. Equal numbers are
equal answers, however they are written; `grpo_jax.tasks._numbers` reads them.
"""

import re
import unicodedata
from fractions import Fraction

from grpo_jax.tasks._numbers import (
    expression_at,
    last_expression,
    number_text,
    plain,
    typeset,
)

# `####` with digits after it in its line; without digits it is a heading.
_MARK = re.compile(r"####[ \t]*+(?=[^\n#\d]*+\d)")
_DIGIT = re.compile(r"\d")
_BOX = "\\boxed{"
_BRACE = re.compile(r"(?<!\\)[{}]")
_LONGEST_WORD = 1000
_MARKS = " \t*_`$"  # of bold, code and mathematics around an answer
# What may follow a number that is a whole text.
_CLOSING = re.compile(r"[\s$*_`}%€£¥₹]*+\.?[\s$*_`]*+")


def marked_number(text: str) -> Fraction | None:
    """The number that follows the last `####`, the mark of a final answer, or None.

    It must be the first thing in the rest of the line, and the only number there; words
    such as a unit may follow. A `####` without digits in its line is no mark.
    """
    text = typeset(text)
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    found = expression_at(text, marks[-1].end())
    if found is None:
        return None
    end = text.find("\n", found.end)
    rest = text[found.end : len(text) if end < 0 else end]
    return None if _DIGIT.search(rest) else found.value


def boxed_number(text: str) -> Fraction | None:
    r"""The number in the last `\boxed{...}` of the text, or None.

    It must be the first thing in the box, and the only number there; words such as a
    unit may follow. A box that is not closed has none.
    """
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start, depth = start + len(_BOX), 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            content = typeset(text[start : brace.start()]).strip()
            found = expression_at(content, 0)
            alone = found is not None and not _DIGIT.search(content, found.end)
            return found.value if found is not None and alone else None
    return None


def last_number(text: str) -> Fraction | None:
    """The last number in the text, or None: lenient, because any number counts.

    It is also None if the last digits are not a number on their own, such as a time, a
    date, a pair, or a part of a formula. Earlier numbers are not used instead.
    """
    found = last_expression(typeset(text))
    return None if found is None else found.value


def parse_number(text: str) -> Fraction | None:
    """The number that `text` is as a whole, or None.

    Signs of currency and percent, marks of bold and mathematics, and a final period may
    surround it; words may not.
    """
    text = typeset(text).strip()
    found = expression_at(text, 0)
    if found is None or not found.bare or not _CLOSING.fullmatch(text, found.end):
        return None
    return found.value


def tagged_answer(text: str) -> str | None:
    """The content of the last `<answer>...</answer>` within the last 4,000 characters.

    None when there is no such pair; an opening tag that is never closed does not count.
    """
    text = text[-4000:]
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if end < 0 or start < 0:
        return None
    return text[start + len("<answer>") : end].strip()


def last_answer(text: str) -> str | None:
    """The answer at the end of a text, however it is marked, or None: lenient.

    The content of the last `<answer>` pair; else what follows the last `####` or
    `answer:` (or `answer is`) in the last line that is not empty; else that line.
    """
    tagged = tagged_answer(text)
    if tagged is not None:
        return tagged or None
    lines = text.strip().splitlines()
    if not lines:
        return None
    after = re.split(
        r"####|answer(?:\s+is\b|[*_]*\s*:)\s*:?", lines[-1], flags=re.IGNORECASE
    )
    answer = after[-1].strip(_MARKS)
    inner = answer.removesuffix(".").rstrip(_MARKS)
    # The period behind `**B**.` goes with the marks; that of `U.S.` is the answer's.
    return (inner if len(inner) < len(answer) - 1 else answer) or None


def same_answer(text: str, expected: str) -> bool:
    """Whether a completion gives the expected answer.

    An expected number must be the last number of the text; any other answer must be the
    whole text, compared as `_normalized`. An empty answer is given by no text.
    """
    found = answer_like(text, expected)
    return found is not None and found == canonical(expected)


def answer_like(text: str, expected: str) -> str | None:
    """The answer of a completion, of the same kind as the expected one, or None.

    Its last number if a number is expected, else the whole text. Equal answers are
    equal strings.
    """
    if parse_number(expected) is None:
        return _normalized(text) or None
    number = last_number(text)
    return None if number is None else number_text(number)


def canonical(expected: str) -> str:
    """The string that `answer_like` returns for texts that give the expected answer."""
    number = parse_number(expected)
    return _normalized(expected) if number is None else number_text(number)


def _normalized(text: str) -> str:
    """The text without letter case, runs of spaces, a final period and typography.

    Forms of Unicode that mean the same characters become one; so do the variants of
    quotes, dashes and spaces that keyboards do not tell apart.
    """
    text = plain(" ".join(_composed(word) for word in text.split()))
    return " ".join(text.split()).removesuffix(".").strip().casefold()


def _composed(word: str) -> str:
    # Composing takes time quadratic in a run of accents, so words have a limit.
    return unicodedata.normalize("NFC", word) if len(word) <= _LONGEST_WORD else word
