"""Final answers found in text that a model wrote.

Only the end of the text is searched, with patterns that need time linear in its length,
and numbers are compared as decimals: model output is read, never evaluated.
"""

import re
from decimal import Decimal

# Characters from the end of a completion that may hold its final answer.
TAIL = 300

# An optional sign on either side of a currency sign; commas only between digits.
_NUMBER = r"-?\$?-?(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+)"
_MARKED = re.compile(r"####[ \t]*(" + _NUMBER + ")")
# A hyphen behind a digit or a letter is a range or a dash, not a sign.
_ANY = re.compile(r"(?<![0-9A-Za-z])" + _NUMBER + r"|[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?")


def marked_number(text: str) -> Decimal | None:
    """The last number that follows `####`, the mark of a final answer, or None."""
    found = _MARKED.findall(text[-TAIL:])
    return parse_number(found[-1]) if found else None


def last_number(text: str) -> Decimal | None:
    """The last number in the text, or None: lenient, because any number counts."""
    found = _ANY.findall(text[-TAIL:])
    return parse_number(found[-1]) if found else None


def parse_number(text: str) -> Decimal | None:
    """The number that `text` is, without commas, `$` and a final period, or None."""
    cleaned = text.strip().removesuffix(".")
    if not re.fullmatch(_NUMBER, cleaned, re.ASCII):
        return None
    digits = cleaned.replace(",", "").replace("$", "")
    negative = digits.startswith("-")
    value = Decimal(digits.lstrip("-"))
    return -value if negative else value


def tagged_answer(text: str, *, tail: int = 4000) -> str | None:
    """The content of the last `<answer>...</answer>` within the last `tail` characters.

    None when there is no such pair; an opening tag that is never closed does not count.
    """
    text = text[-tail:]
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
    lines = text[-TAIL:].strip().splitlines()
    if not lines:
        return None
    after = re.split(
        r"####|answer(?:\s+is\b|\s*:)\s*:?", lines[-1], flags=re.IGNORECASE
    )
    return after[-1].strip(" \t*_`$") or None


def same_answer(text: str, expected: str) -> bool:
    """Whether a completion gives the expected answer.

    An expected number must be the last number of the text; any other answer must be
    the whole text, letter case, runs of spaces and a final period aside.
    """
    number = parse_number(expected)
    if number is not None:
        return last_number(text) == number
    return normalized(text) == normalized(expected)


def normalized(text: str) -> str:
    """The text without letter case, runs of spaces and a final period."""
    return " ".join(text.split()).removesuffix(".").casefold()
