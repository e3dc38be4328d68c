"""Reward functions of a run are checked against its rows before anything starts."""

import dataclasses

import pytest

from grpo_jax.config import TrainConfig
from grpo_jax.tasks import load_task, task_from_rows
from grpo_jax.training._rewarding import make_runner


def needs_answer(completions, answer, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("changes", "refused"), [({}, True), ({"eval_every": 0}, False)]
)
def test_held_out_rows_have_the_columns_that_rewards_need(changes, refused):
    rows = [{"prompt": "a", "answer": "b"}]
    task = task_from_rows(rows, needs_answer, eval_rows=[{"prompt": "a", "Answer": 1}])
    config = TrainConfig(model="tiny", **changes)
    if not refused:
        make_runner(config, task).close()
        return
    with pytest.raises(ValueError, match="needs answer, which the held-out rows do"):
        make_runner(config, task)


def test_held_out_rows_that_are_judged_by_comparing_need_no_columns_of_rewards():
    task = dataclasses.replace(load_task("arithmetic"), rewards=(needs_answer,))
    make_runner(TrainConfig(), task).close()
