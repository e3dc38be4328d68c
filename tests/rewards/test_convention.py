"""One call: what a function is given, what it may return, what its failures become."""

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.rewards._convention import (
    Failure,
    InvalidRewards,
    RewardInputs,
    TrainerState,
    checked_rewards,
    reward_call,
    reward_names,
)


def batch(count=2, **columns):
    return RewardInputs(
        prompts=[f"p{i}" for i in range(count)],
        completions=[f"c{i}" for i in range(count)],
        columns=columns,
        completion_ids=[[i] for i in range(count)],
        state=TrainerState(global_step=3, max_steps=10),
    )


def run(function, given_batch):
    return reward_call(function, name="f").run(given_batch)


# Whatever is finite in float32, in which advantages are computed.
floats = st.floats(-3.4e38, 3.4e38) | st.just(math.nan)
rewards = st.none() | st.integers(-9, 9) | floats


@given(values=st.lists(rewards, max_size=5), kind=st.sampled_from([list, tuple, iter]))
def test_numbers_come_back_as_they_are_and_none_as_nan(values, kind):
    found = checked_rewards(kind(values), name="f", count=len(values))
    expected = [math.nan if value is None else float(value) for value in values]
    np.testing.assert_array_equal(found, expected)
    for other in (len(values) - 1, len(values) + 1):
        with pytest.raises(InvalidRewards, match=f"'f' returned {len(values)} rewards"):
            checked_rewards(kind(values), name="f", count=other)


@pytest.mark.parametrize(
    "values", [None, 1.0, "10", b"10", {0: 1.0, 1: 0.0}, np.float64(1), np.array(1.0)]
)
def test_what_is_no_list_of_numbers_is_refused(values):
    with pytest.raises(InvalidRewards, match="reward function 'f' returned a "):
        checked_rewards(values, name="f", count=2)


@pytest.mark.parametrize("item", [math.inf, -math.inf, "1", [1.0], {}, 10**400])
def test_an_item_that_is_no_reward_is_named_with_its_place(item):
    with pytest.raises(InvalidRewards, match="for completion 1; expected a finite"):
        checked_rewards([0.0, item], name="f", count=2)


def test_columns_arrive_by_name_and_never_under_the_names_of_arguments():
    seen = {}

    def everything(**keywords):
        seen.update(keywords)
        return [0, 0]

    run(everything, batch(answer=[1, 2], prompt=["x", "x"], completion_ids=[9, 9]))
    assert seen["answer"] == [1, 2]
    assert seen["completion_ids"] == [[0], [1]]
    assert seen["trainer_state"].global_step == 3
    assert "prompt" not in seen and seen["prompts"] == ["p0", "p1"]


def test_a_function_with_names_gets_those_alone():
    assert list(run(lambda completions: [1, 2], batch(answer=[1, 2])).rewards) == [1, 2]
    call = reward_call(lambda completions, answer, extra=1: [1, 2], name="f")
    assert call.required == {"completions", "answer"}
    with pytest.raises(ValueError, match="'f' needs answer, which the rows do not"):
        call.check_columns(["prompt"])
    call.check_columns(["answer"])


def test_the_batch_of_one_completion_is_its_part_of_everything():
    whole = batch(3, answer=[7, 8, 9])
    for index in range(3):
        one = whole.only(index)
        assert len(one) == 1
        assert one.columns == {"answer": [7 + index]}
        assert (one.prompts, one.completions, one.completion_ids) == (
            [f"p{index}"],
            [f"c{index}"],
            [[index]],
        )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("x"), "error"),
        (SystemExit(3), "error"),
        (InvalidRewards("no"), "invalid"),
    ],
)
def test_what_a_function_raises_is_a_failure_and_no_exception(error, kind):
    def fails(completions):
        raise error

    async def fails_later(completions):
        raise error

    later = reward_call(fails_later, name="f")
    assert later.is_async
    for failure in (run(fails, batch()), asyncio.run(later.run_async(batch()))):
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.exception) == (kind, error)


def test_ctrl_c_is_the_user_s():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted, batch())


def test_names_are_distinct():
    def same():
        return []

    class Judge:
        def __call__(self):
            return []

    assert reward_names([same, Judge(), same, same]) == (
        "same",
        "Judge",
        "same_2",
        "same_3",
    )
