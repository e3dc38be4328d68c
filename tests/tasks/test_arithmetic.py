"""Every problem is there once, is right, and is held out together with its twin."""

import re

from grpo_jax.tasks import load_task
from grpo_jax.tasks.arithmetic import correct, is_correct


def parsed(row):
    a, operator, b = re.fullmatch(r"(\d\d)([+-])(\d\d)=", row["prompt"]).groups()
    return int(a), operator, int(b)


TASK = load_task("arithmetic")


def test_all_problems_of_two_digits_are_there_once_with_their_answers():
    rows = [*TASK.train, *TASK.test]
    problems = [parsed(row) for row in rows]
    numbers = range(10, 100)
    assert len(rows) == len(set(problems)) == 2 * 90 * 90
    assert set(problems) == {(a, o, b) for a in numbers for o in "+-" for b in numbers}
    for (a, operator, b), row in zip(problems, rows, strict=True):
        assert int(row["answer"]) == (a + b if operator == "+" else a - b)


def test_at_least_a_thousand_problems_are_held_out_with_their_twins():
    train = {parsed(row) for row in TASK.train}
    test = {parsed(row) for row in TASK.test}
    assert len(test) >= 1000
    assert not train & test
    assert not train & {(b, operator, a) for a, operator, b in test}


def test_the_split_is_the_same_for_every_seed():
    assert load_task("arithmetic", seed=1).test == TASK.test


def test_the_first_held_out_problems_are_a_fair_sample_of_both_operators():
    share = sum("+" in row["prompt"] for row in TASK.test[:200]) / 200
    assert 0.35 < share < 0.65


def test_only_the_whole_completion_is_correct():
    completions = ["85", " 85\n", "85.", "085", "37+48=85", "", "-85", "８５"]
    expected = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    rewards = correct(["37+48="] * 8, completions, answer=["85"] * 8, other=[0] * 8)
    assert rewards == expected
    row = {"prompt": "37+48=", "answer": "85"}
    assert [float(is_correct(text, row)) for text in completions] == expected
    assert TASK.rewards == (correct,)
