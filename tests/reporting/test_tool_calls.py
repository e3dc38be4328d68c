"""A policy that stops to call its tools, or does not begin, is told of, once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.reporting.metrics import CALLS
from grpo_jax.reporting.tool_calls import ToolCalls


def steps_told(frequencies):
    """After which of the steps something was told; None is a step without tools."""
    told, now = [], 0
    watch = ToolCalls(report=lambda text: told.append((now, text)))
    for now, calls in enumerate(frequencies, start=1):
        watch.check(now, {} if calls is None else {CALLS: calls})
    return told


@pytest.mark.parametrize("frequencies", [[], [0.0] * 9, [None] * 9, [0.5, 0.25, 1.0]])
def test_nothing_is_told_of_tools_that_are_used_or_may_still_be(frequencies):
    assert steps_told(frequencies) == []


def test_the_first_step_without_a_call_is_told_with_what_there_was_before():
    ((step, text),) = steps_told([0.0, 0.5, 0.125, 0.0, 0.5, 0.0])
    assert step == 4
    assert text.startswith("step 4: no completion called a tool, after 0.125 calls per")


def test_ten_steps_without_any_call_are_told():
    ((step, text),) = steps_told([None, *[0.0] * 12, 0.5, 0.0])
    assert step == 11
    assert text.startswith("step 11: no completion of 10 steps called a tool.")


@given(st.lists(st.sampled_from([None, 0.0, 0.5]), max_size=30))
def test_it_is_told_at_most_once(frequencies):
    told = steps_told(frequencies)
    known = [calls for calls in frequencies if calls is not None]
    falls = any(a > 0 and b == 0 for a, b in zip(known, known[1:], strict=False))
    never = len(known) > 9 and not any(known[:10])
    assert len(told) == (falls or never)
