"""The records of a rollout, for people to read."""

import numpy as np


def test_what_rewards_remember_hides_no_field_of_a_record(make_rollout):
    rollout = make_rollout([[0.0, 1.0]], extra={"reward": [["x", "y"]], "note": ["ab"]})
    records = rollout.records(7, np.zeros((1, 2)))
    assert [record["reward"] for record in records] == [0.0, 1.0]
    assert [record["note"] for record in records] == ["a", "b"]


def test_a_record_says_everything_of_its_completion(make_rollout):
    rollout = make_rollout([[0, 1], [2, 3]])
    advantages = np.array([[-1.0, 1.0], [-2.0, 2.0]])
    records = rollout.records(9, advantages)
    assert len(records) == 4
    assert records[2] == {
        "step": 9,
        "prompt": "p1",
        "completion": "1.0",
        "rewards": {"f": 4.0},
        "reward": 2.0,
        "advantage": -2.0,
        "length": 3,
        "finished": False,
        "x": "x1.0",
    }
