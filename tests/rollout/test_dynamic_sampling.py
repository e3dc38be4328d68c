"""Groups are chosen whole, joined without loss, and told apart by their rewards."""

import numpy as np
import pytest

from grpo_jax.rewards.metrics import has_signal
from grpo_jax.rollout.dynamic_sampling import _join, _refill

NAN = np.nan


def test_a_group_informs_when_its_rewards_differ():
    rewards = [[1, 1], [0, 1], [NAN, 1], [NAN, NAN], [0.1, 0.1], [-1, 1]]
    expected = [False, True, False, False, False, True]
    assert has_signal(np.array(rewards)).tolist() == expected


def test_rewards_that_are_equal_but_round_apart_in_a_deviation_do_not_inform():
    # 0.1 summed thrice is not 0.3: the deviation of equal rewards need not be 0.
    rewards = np.full((1, 3), 0.1)
    assert not has_signal(rewards)[0]


def test_groups_are_picked_whole_and_in_the_order_they_were_sampled(make_rollout):
    first = make_rollout([[1, 1], [0, 1], [2, 2]])
    second = make_rollout([[0, 3], [5, 5], [1, 2]], start=3)
    picked = _refill(_join([first, second]), 3, short=False)
    assert [row["prompt"] for row in picked.rows] == ["p1", "p3", "p5"]
    assert picked.completions == [["1.0", "1.1"], ["3.0", "3.1"], ["5.0", "5.1"]]
    assert picked.extra["x"] == [["x1.0", "x1.1"], ["x3.0", "x3.1"], ["x5.0", "x5.1"]]
    np.testing.assert_array_equal(picked.tokens[:, 0, 0], [1, 3, 5])
    np.testing.assert_array_equal(picked.prompts[:, 0], [51, 53, 55])
    np.testing.assert_array_equal(picked.logp[:, 1, 2], [-1, -3, -5])
    np.testing.assert_array_equal(picked.rewards, [[0, 1], [0, 3], [1, 2]])
    np.testing.assert_array_equal(picked.rewards_by_name["f"][2], [2, 4])
    np.testing.assert_array_equal(picked.failures_by_name["f"][:, 0], [1, 3, 5])
    assert picked.keep.all() and picked.mask.all()


def test_too_few_groups_ask_for_more(make_rollout):
    assert _refill(make_rollout([[1, 1], [0, 1]]), 2, short=False) is None


def test_what_is_missing_is_filled_with_groups_that_do_not_count(make_rollout):
    picked = _refill(make_rollout([[1, 1], [0, 1], [2, 2]]), 3, short=True)
    assert [row["prompt"] for row in picked.rows] == ["p1", "p0", "p2"]
    assert picked.keep.tolist() == [True, False, False]


def test_joining_pads_to_the_widest(make_rollout):
    joined = _join([make_rollout([[0, 1]]), make_rollout([[0, 1]], start=7, width=5)])
    np.testing.assert_array_equal(joined.tokens[0, 0], [0, 0, 0, 0, 0])
    np.testing.assert_array_equal(joined.tokens[1, 0], [7] * 5)
    np.testing.assert_array_equal(joined.mask.sum(axis=-1), [[3, 3], [5, 5]])
    wide = _join([make_rollout([[0, 1]], prompt_width=6), make_rollout([[0, 1]])])
    assert wide.prompts.shape == (2, 6) and wide.prompt_lengths.tolist() == [6, 4]


def test_joining_sums_times_and_keeps_every_value_of_the_rest(make_rollout):
    joined = _join([make_rollout([[0, 1]]), make_rollout([[0, 1]], start=4)])
    assert joined.seconds == {"time/reward": 2.0}
    assert joined.logged == {"depth": [0.0, 4.0]}
    np.testing.assert_array_equal(joined.rewards_by_name["f"], [[0, 2], [0, 2]])
    np.testing.assert_array_equal(joined.failures_by_name["f"], [[0, 0], [4, 4]])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_joining_keeps_what_was_logged_in_some_rollouts_only(make_rollout, order):
    full = make_rollout([[0, 1]])
    bare = make_rollout([[NAN, NAN]], extra={}, logged={})
    joined = _join([(full, bare)[number] for number in order])
    assert joined.logged == {"depth": [0.0]}
    columns = (["x0.0", "x0.1"], [None, None])
    assert joined.extra["x"] == [columns[order[0]], columns[order[1]]]
