"""Answers are read from the end of a text, strictly, and never evaluated."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.tasks.answers import (
    _normalized,
    answer_like,
    boxed_number,
    canonical,
    last_answer,
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
        ("#### 18" + " " * 300, 18),
        ("#### 18\n\n" + "I checked it. " * 40, 18),
        ("#### 7/2", "3.5"),
        ("#### **18**", 18),
        ("#### 18\n#### Done", 18),  # a heading
        ("#### 18\n#### about 19", None),
        ("#### 18 of 20", None),
        ("#### 3 or 4", None),
        ("#### 10:30", None),
        ("#### 3-4", None),
        ("#### 1.8 million", None),
        ("", None),
    ],
)
def test_the_marked_number_follows_the_last_mark(text, number):
    expected = None if number is None else Decimal(number)
    assert marked_number(text) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"so \(\boxed{18}\).", 18),
        (r"\boxed{1} no, \boxed{2}, for 3 * 4", 2),
        (r"\boxed{ \$1,200 }", 1200),
        (r"\boxed{-3 \text{ dollars}}", -3),
        (r"\boxed{\frac{7}{2}}", "3.5"),
        (r"\boxed{\boxed{18}}", 18),
        (r"\boxed{\{18\}}", None),  # a set
        (r"\boxed{x = 18}", None),
        (r"\boxed{18 of 20}", None),
        (r"\boxed{10:30}", None),
        (r"\boxed{1.8 million}", None),
        (r"\boxed{eighteen} 18", None),
        (r"\boxed{18", None),
        (r"\boxed{}", None),
        ("18", None),
    ],
)
def test_the_boxed_number_is_that_of_the_last_box(text, number):
    expected = None if number is None else Decimal(number)
    assert boxed_number(text) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 and then 4", 4),
        ("It costs $1,200.", 1200),
        ("-5", -5),
        ("(-5)", -5),
        ("rows 5-7", None),  # two numbers, or a difference
        ("5 to 7", 7),
        ("7 or 8, 9", 9),
        ("x=-7", -7),
        ("12.50", "12.5"),
        ("version2", None),
        ("12 m2", 12),
        ("12, then CO2", None),  # an earlier number does not take its place
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
    boxed_number(rf"\boxed{{{text}")


@pytest.mark.parametrize(
    "hostile",
    [
        "1,",
        "1 ",
        "\\frac{1}",
        "\\frac{",
        "####",
        "1'",
        "5 and ",
        "answer ",
        "a_1 ",
        "\u2212",
        "\\boxed{",
        "{",
    ],
)
def test_a_long_hostile_text_takes_time_in_proportion(hostile):
    # Of quadratic time none of this would end.
    text = "#### " + hostile * (100_000 // len(hostile)) + "x"
    assert marked_number(text) is None is boxed_number(rf"\boxed{{{text}")
    last_number(text), parse_number(text), last_answer(text), _normalized(text)


def test_runs_of_accents_are_composed_up_to_a_length():
    assert _normalized("e\u0301" * 400) == "\u00e9" * 400
    _normalized("e" + "\u0301\u0323" * 100_000)
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
        ("It is 0.00001", "1e-05", True),
        ("10\u2077", "1e7", True),
        ("\\frac{1}{2}", "0.5", True),
        ("(3, 4)", "(3,4)", False),  # a text, compared as one
        ("4", "(3, 4)", False),
        ("10:30", "10:30", True),
        ("30", "10:30", False),
        ("cafe\u0301", "Caf\u00e9", True),
        ("\uff21\uff13", "a3", True),
        ("x\u22121", "x-1", True),
        ("don\u2019t", "don't", True),
        ("x\u00b2", "x2", False),
        ("", "", False),
        (".", "", False),
    ],
)
def test_numbers_match_as_the_last_and_words_as_the_whole(text, expected, same):
    assert same_answer(text, expected) is same


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=8))
def test_equal_votes_are_equal_verdicts(one, two, expected):
    for text in (one, two, expected):
        vote = answer_like(text, expected)
        assert same_answer(text, expected) == (vote == canonical(expected) != "")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("**Answer**: Paris", "Paris"),
        ("**Answer: Paris**", "Paris"),
        ("_Answer:_ Paris", "Paris"),
        ("The answer is **B**.", "B"),
        ("The answer is: `B`.", "B"),
        ("The answer is $B.$", "B."),
        ("The answer is U.S.", "U.S."),
        ("Answer: **.5**", ".5"),
        ("Paris\n", "Paris"),
        ("Answer: **", None),
    ],
)
def test_marks_of_bold_around_an_answer_are_not_of_it(text, answer):
    assert last_answer(text) == answer
