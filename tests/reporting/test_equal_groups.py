"""Steps without differing rewards are told: while they go on, and at the end."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.config.files import to_jsonable
from grpo_jax.reporting.equal_groups import EqualGroups, taught_nothing
from grpo_jax.reporting.metrics import reward_metrics


def line(step, rewards):
    return to_jsonable({"step": step, **reward_metrics(np.array(rewards))})


def steps_told(rewards):
    """After which of the steps, one reward list each, something was told."""
    told, now = [], 0
    watch = EqualGroups(report=lambda text: told.append((now, text)))
    for now, values in enumerate(rewards, start=1):
        watch.check(now, line(now, values))
    return told


EQUAL, DIFFERING = [[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]


def test_ten_in_a_row_are_told_and_then_twice_as_many():
    told = steps_told([EQUAL] * 50)
    assert [step for step, _ in told] == [10, 20, 40]
    assert told[1][1].startswith("steps 1 to 20: in no group of completions did")
    assert "The reward stays flat" in told[0][1]


def test_a_step_that_teaches_begins_the_count_anew():
    rewards = [*[EQUAL] * 9, DIFFERING, *[EQUAL] * 10, DIFFERING, *[EQUAL] * 10]
    assert [step for step, _ in steps_told(rewards)] == [20, 31]


@given(st.lists(st.sampled_from([EQUAL, DIFFERING]), max_size=60))
def test_it_is_told_of_every_stretch_of_ten_and_of_no_other(rewards):
    flags = "".join("x" if values is EQUAL else " " for values in rewards)
    stretches = [part for part in flags.split() if len(part) >= 10]
    expected = sum(int(math.log2(len(part) / 10)) + 1 for part in stretches)
    assert len(steps_told(rewards)) == expected


@pytest.mark.parametrize(
    ("rewards", "seen"),
    [
        ([[[0.0, 0.0]], [[0.0, 0.0]]], "(the mean was 0)"),
        ([[[0.5, 0.5]], [[1.0, np.nan]]], "(the mean was 0.5 to 1)"),
        ([[[np.nan, np.nan]]] * 2, "(no completion had one)"),
    ],
)
def test_a_run_that_learned_nothing_says_so(rewards, seen):
    history = [{"step": 0, "eval/reward": 1.0}]
    history += [line(step, values) for step, values in enumerate(rewards, start=1)]
    text = taught_nothing(history)
    assert text.startswith("in none of the 2 steps did rewards differ within a group")
    assert seen in text and "call the reward on one that you write yourself" in text


def test_one_group_that_differed_is_enough():
    history = [line(1, EQUAL), line(2, DIFFERING), line(3, EQUAL)]
    assert taught_nothing(history) is None
    assert taught_nothing([{"step": 0}]) is None
