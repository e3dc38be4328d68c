"""What environments return: made into messages and numbers, or refused."""

import numpy as np
import pytest

from grpo_jax.environments._checked import (
    NonsenseError,
    checked_messages,
    checked_reward,
    checked_step,
    opening,
)
from grpo_jax.environments.base import Step

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def begins(row, observation, may_replace=False):
    return opening(row, observation, may_replace=may_replace)


@pytest.mark.parametrize("done", [True, np.True_, np.array(True), 1])
def test_an_end_is_one_however_it_is_said(done):
    assert checked_step(Step("m", 1.0, done)) == ([], 1.0, True)
    assert not checked_step(Step("m", 1.0, done ^ 1)).done


@pytest.mark.parametrize(
    "done", ["False", "", None, 0.5, 2, np.array([True]), [1], [1, [2]]]
)
def test_anything_else_is_no_end(done):
    with pytest.raises(NonsenseError, match="returned done=.*expected True or False"):
        checked_step(Step("m", 1.0, done))


def test_a_text_is_appended_to_the_last_message_and_the_row_stays():
    row = {"prompt": CHAT}
    found = begins(row, " more")
    assert found == [CHAT[0], {"role": "user", "content": "u more"}]
    assert row["prompt"] is CHAT and CHAT[1]["content"] == "u"
    assert begins(row, None) == CHAT and begins(row, None)[0] is not CHAT[0]
    assert begins({"prompt": "p"}, "q") == [{"role": "user", "content": "pq"}]
    # Without a prompt, the environment writes it.
    assert begins({}, "q") == [{"role": "user", "content": "q"}]


def test_content_blocks_are_texts_on_either_side():
    blocks = [{"type": "text", "text": "b"}]
    assert begins({"prompt": CHAT}, blocks)[-1]["content"] == "ub"
    prompt = [{"role": "user", "content": blocks}]
    assert begins({"prompt": prompt}, "c")[-1]["content"] == [
        *blocks,
        {"type": "text", "text": "c"},
    ]
    with pytest.raises(ValueError, match="type image"):
        begins({"prompt": CHAT}, [{"type": "image", "image": 0}])


def test_messages_replace_the_prompt_of_text_environments_only():
    other = [{"role": "user", "content": "other"}]
    assert begins({"prompt": CHAT}, other, may_replace=True) == other
    with pytest.raises(NonsenseError, match="expected a text, or None"):
        begins({"prompt": CHAT}, other)
    for wrong in (3, [], [{"role": "user"}, 4], [{"content": "no role"}]):
        with pytest.raises(NonsenseError, match="reset returned"):
            begins({"prompt": CHAT}, wrong, may_replace=True)


@pytest.mark.parametrize(
    "good", [1, 1.5, True, np.float32(0.5), np.array(2.0), None, -3.4e38]
)
def test_rewards_are_numbers_or_none(good):
    found = checked_reward(good, of="step")
    assert found == (None if good is None else float(good))


@pytest.mark.parametrize(
    "wrong",
    [np.nan, np.inf, -np.inf, 1e39, 10**400, "1", b"1", [1.0], np.ones(1), {}, 1j],
)
def test_anything_else_is_no_reward(wrong):
    with pytest.raises(NonsenseError, match="get_reward returned the reward"):
        checked_reward(wrong, of="get_reward")


def test_steps_have_messages_unless_they_are_the_last():
    assert checked_step(Step("o", 1)) == (
        [{"role": "user", "content": "o"}],
        1.0,
        False,
    )
    assert checked_step(Step(CHAT)) == (CHAT, 0.0, False)
    assert checked_step(Step("never shown", 2.0, True)) == ([], 2.0, True)
    for wrong in (("o", 1.0, False), "o", None):
        with pytest.raises(NonsenseError, match="expected Step"):
            checked_step(wrong)


def test_messages_are_copied_and_must_be_json():
    given = [{"role": "tool", "content": "c", "name": "t"}]
    found = checked_messages(given, of="step")
    assert found == given and found[0] is not given[0]
    with pytest.raises(NonsenseError, match="JSON cannot hold"):
        checked_messages([{"role": "user", "content": "c", "x": object()}], of="step")
