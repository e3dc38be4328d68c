"""Answers are read from the end of a text, strictly, and never evaluated."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.tasks.answers import (
    last_number,
    marked_number,
    parse_number,
    same_answer,
    tagged_answer,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 7.\n#### 18", 18),
        ("####18", 18),
        ("#### $1,234,567.50 dollars", "1234567.5"),
        ("#### 18.", 18),
        ("#### 18.0", 18),
        ("#### -3", -3),
        ("#### -$3", -3),
        ("#### $-3", -3),
        ("#### 1\n#### 2", 2),
        ("#### 5\nThat was easy, 100 %.", 5),
        ("the answer is 18", None),
        ("#### eighteen", None),
        ("####\n18", None),
        ("#### ١٨", None),
        ("#### 18" + " " * 300, None),
        ("", None),
    ],
)
def test_the_marked_number_follows_the_last_mark(text, number):
    expected = None if number is None else Decimal(number)
    assert marked_number(text) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 and then 4", 4),
        ("It costs $1,200.", 1200),
        ("-5", -5),
        ("(-5)", -5),
        ("rows 5-7", 7),
        ("x=-7", -7),
        ("12.50", "12.5"),
        ("version2", 2),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@settings(deadline=None)
@given(st.decimals(min_value=-(10**12), max_value=10**12, places=2))
def test_numbers_survive_commas_marks_and_signs(value):
    assert parse_number(f"{value:,f}") == value
    assert marked_number(f"thus\n#### {value:,f}.") == value


@settings(deadline=None)
@given(st.text(alphabet="#0123456789,.$- \n<answer>/", max_size=400))
def test_any_text_is_read_without_an_exception(text):
    marked_number(text), last_number(text), parse_number(text), tagged_answer(text)


def test_long_texts_cost_no_more_than_their_end():
    hostile = "#### " + "1," * 1_000_000 + "x"
    assert marked_number(hostile) is None
    assert last_number(hostile) is not None
    assert tagged_answer("<answer>" * 500_000) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>4</answer>", "4"),
        ("<answer>1</answer> no: <answer> 2 </answer>.", "2"),
        ("<answer>1<answer>2</answer>", "2"),
        ("<answer>1</answer><answer>2", "1"),
        ("4</answer>", None),
        ("</answer><answer>", None),
        ("<answer></answer>", ""),
        ("<answer>4</answer>" + "x" * 4000, None),
        ("4", None),
    ],
)
def test_the_tagged_answer_is_the_last_closed_one(text, answer):
    assert tagged_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "expected", "same"),
    [
        ("I think it is 1,000.", "1000", True),
        ("1000 or 1001", "1000", False),
        ("  paris. ", "Paris", True),
        ("New   York", "new york", True),
        ("It is Paris", "Paris", False),
        ("no number", "7", False),
    ],
)
def test_numbers_match_as_the_last_and_words_as_the_whole(text, expected, same):
    assert same_answer(text, expected) is same
