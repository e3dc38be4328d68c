"""The best step by a metric stays, whatever is removed and however often it resumes."""

import dataclasses
import errno
import json
import math
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

from grpo_jax.checkpointing import _corruption
from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.checkpointing.retention import best_mode
from grpo_jax.config import CheckpointConfig, ObjectiveConfig, TrainConfig
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.tasks import load_task, task_from_rows
from grpo_jax.training import _rewarding
from grpo_jax.training import _run_dir as directories
from grpo_jax.training.restore import restore
from grpo_jax.training.state import make_train_state, state_items

SCORE = "eval/accuracy"
STATE = make_train_state({"w": jnp.ones(3)}, optax.sgd(0.1))


def open_checkpoints(path, **config):
    reports = []
    config = CheckpointConfig(**{"keep": 1, "keep_best": SCORE} | config)
    return Checkpoints(path, config, report=reports.append), reports


def save_all(checkpoints, values):
    """Steps 1, 2 and so on, with a value each."""
    for step, value in enumerate(values, start=1):
        checkpoints.save(
            step, state_items(STATE), {}, metrics={SCORE: value, "loss": -value}
        )


@pytest.mark.parametrize(
    ("values", "config", "kept"),
    [
        ([0.1, 0.5, 0.3, 0.2], {}, [2, 4]),
        ([0.1, 0.5, 0.3, 0.2], {"best_mode": "min"}, [1, 4]),
        ([0.1, 0.5, 0.3, 0.2], {"keep": 2, "keep_every": 3}, [2, 3, 4]),
        ([0.5, 0.5, 0.1], {}, [1, 3]),  # of equal ones the first
        ([math.nan, math.inf, 0.1, -math.inf, 0.0], {}, [3, 5]),
        ([math.nan, math.nan], {}, [2]),
        ([0.5, 0.1, 0.2], {"keep_best": None}, [3]),
        ([0.1, 0.2, 0.3], {}, [3]),  # the best is the newest
    ],
)
def test_the_best_step_is_kept_beside_the_others(tmp_path, values, config, kept):
    checkpoints, _ = open_checkpoints(tmp_path, **config)
    save_all(checkpoints, values)
    assert checkpoints.steps() == kept


@pytest.mark.parametrize(
    ("name", "better"),
    [
        *((n, max) for n in (SCORE, "eval/reward", "reward", "rewards/f/mean")),
        *((n, min) for n in ("loss", "kl")),
    ],
)
def test_what_is_better_follows_from_the_metric(tmp_path, name, better):
    checkpoints, _ = open_checkpoints(tmp_path, keep_best=name)
    values = [0.2, 0.1, 0.5, 0.3]
    for step, value in enumerate(values, start=1):
        checkpoints.save(step, state_items(STATE), {}, metrics={name: value})
    assert checkpoints.steps() == [1 + values.index(better(values)), 4]


@pytest.mark.parametrize("name", ["entropy", "tidiness", "rewards/f/std"])
def test_what_is_better_must_be_said_where_it_is_not_known(name):
    with pytest.raises(ValueError, match=f"best_mode is needed for .*{name}.*'min'"):
        best_mode(CheckpointConfig(keep_best=name))
    for mode in ("max", "min"):
        assert best_mode(CheckpointConfig(keep_best=name, best_mode=mode)) == mode


def test_a_resumed_run_knows_the_best_of_before(tmp_path):
    save_all(open_checkpoints(tmp_path)[0], [0.1, 0.9, 0.2])
    for step, value in ((4, 0.3), (5, 0.4), (6, 0.95), (7, 0.5)):
        checkpoints, _ = open_checkpoints(tmp_path)  # as after a kill
        checkpoints.save(step, state_items(STATE), {}, metrics={SCORE: value})
        checkpoints.close()
        best = 2 if step < 6 else 6
        assert checkpoints.steps() == sorted({best, step})
        assert checkpoints.restore(state_items(STATE), step="best")[0] == best
    assert checkpoints.restore(state_items(STATE))[0] == 7  # what resumes is the newest


def test_a_step_without_a_value_is_never_the_best_and_is_told_once(tmp_path):
    checkpoints, reports = open_checkpoints(tmp_path)
    checkpoints.save(1, state_items(STATE), {}, metrics={"loss": 1.0})
    checkpoints.save(2, state_items(STATE), {})
    with pytest.raises(ValueError, match=r"best.*'eval/accuracy'.*\[2\]"):
        checkpoints.restore_params("best")
    checkpoints.save(3, state_items(STATE), {}, metrics={SCORE: 0.1})
    checkpoints.save(4, state_items(STATE), {}, metrics={SCORE: math.nan})
    assert checkpoints.steps() == [3, 4]
    (report,) = reports
    assert "checkpoint 1 has no 'eval/accuracy'" in report


def test_a_step_whose_metadata_is_damaged_is_not_the_best(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path, keep=2)
    save_all(checkpoints, [0.9, 0.3])
    checkpoints.close()
    file = tmp_path / "1" / "meta" / "data.json"
    file.write_text(file.read_text().replace("0.9", "9.9"))
    checkpoints, _ = open_checkpoints(tmp_path, keep=2)
    for step in (3, 4):
        checkpoints.save(step, state_items(STATE), {}, metrics={SCORE: 0.1})
    assert checkpoints.steps() == [2, 3, 4]


def test_a_best_step_that_cannot_be_read_just_now_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(_corruption, "PAUSES", ())
    before, _ = open_checkpoints(tmp_path)
    save_all(before, [0.9, 0.3])
    before.close()
    checkpoints, reports = open_checkpoints(tmp_path)  # as after a kill
    read = Path.read_text

    def away(path, **options):
        if "/1/meta" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return read(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", away)
        checkpoints.save(3, state_items(STATE), {}, metrics={SCORE: 0.1})
        assert checkpoints.steps() == [1, 2, 3]
    assert "old checkpoints stay until the next save" in reports[0]
    checkpoints.save(4, state_items(STATE), {}, metrics={SCORE: 0.1})
    assert checkpoints.steps() == [1, 4]


def test_a_step_that_is_saved_again_has_its_new_value(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path, keep=2)
    save_all(checkpoints, [0.1, 0.9])
    assert checkpoints.restore(state_items(STATE), step="best")[0] == 2
    checkpoints.save(2, state_items(STATE), {}, metrics={SCORE: 0.0})
    assert checkpoints.restore(state_items(STATE), step="best")[0] == 1


def test_a_run_is_opened_at_its_best_step(tiny_policy, tmp_path):
    config = CheckpointConfig(keep=1, keep_best="loss", best_mode="min")
    run = TrainConfig(model=str(tiny_policy.folder), checkpoint=config)
    directories.check_config(tmp_path, run)
    checkpoints = Checkpoints(tmp_path / "checkpoints", config)
    state = make_train_state(tiny_policy.params, optax.sgd(0.1))
    for step, loss in ((5, 2.0), (10, 1.0), (15, 3.0)):
        checkpoints.save(step, state_items(state), {}, metrics={"loss": loss})
    checkpoints.close()
    assert restore(tmp_path, "best").step == 10
    assert restore(tmp_path).step == 15


# Names


def plain(completions):
    return [0.0] * len(completions)


def logging(completions, log_metric):
    log_metric("tidiness", 1.0)
    return [0.0] * len(completions)


def make_runner(name, function=plain, mode=None):
    best = CheckpointConfig(keep_best=name, best_mode=mode)
    config = TrainConfig(checkpoint=best)
    rows = [{"prompt": "a"}]
    return _rewarding.make_runner(
        config, task_from_rows(rows, function, eval_rows=rows)
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eval/reword", "did you mean 'eval/reward'"),
        ("eval/accuracy", "is no metric of this run"),  # rows have no right answers
        ("rewards/plane/mean", "did you mean 'rewards/plain/mean'"),
        ("tidiness", "choose from eval/reward, reward, loss"),
    ],
)
def test_a_metric_that_the_run_will_not_have_is_refused(name, words):
    with pytest.raises(ValueError, match=words):
        make_runner(name)


def test_a_metric_of_nothing_that_the_run_does_is_refused():
    rows = [{"prompt": "a"}]
    without = {  # rewards that may log any name, but not these
        "kl": dataclasses.replace(ObjectiveConfig(), kl_coef=0.0),
        "eval/reward": ObjectiveConfig(),
    }
    for name, objective in without.items():
        config = TrainConfig(
            objective=objective, checkpoint=CheckpointConfig(keep_best=name)
        )
        with pytest.raises(ValueError, match=f"'{name}' is no metric of this run"):
            _rewarding.make_runner(config, task_from_rows(rows, logging))


def test_the_name_of_the_accuracy_on_the_console_is_not_that_of_the_metric():
    def correct(completions, **columns):  # may log any metric
        return [0.0] * len(completions)

    task = dataclasses.replace(load_task("arithmetic"), rewards=(correct,))
    config = TrainConfig(checkpoint=CheckpointConfig(keep_best="accuracy"))
    with pytest.raises(ValueError, match="did you mean 'eval/accuracy'"):
        _rewarding.make_runner(config, task)


def test_metrics_that_the_run_will_have_are_taken():
    for name in ("eval/reward", "reward", "rewards/plain/mean", "loss", "kl"):
        assert isinstance(make_runner(name), RewardRunner)
    assert isinstance(make_runner("tidiness", logging, "max"), RewardRunner)
    with pytest.raises(ValueError, match="checkpoint.best_mode is needed"):
        make_runner("tidiness", logging)


@pytest.mark.parametrize("none", ["eval_every", "eval_prompts"])
def test_a_metric_of_the_evaluation_needs_one(none):
    with pytest.raises(ValueError, match=f"{none} must be above 0 for checkpoint"):
        TrainConfig(**{none: 0}, checkpoint=CheckpointConfig(keep_best=SCORE))


def test_the_numbers_of_a_step_lie_beside_its_arrays(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path)
    checkpoints.save(
        1, state_items(STATE), {}, metrics={SCORE: 0.5, "kl": math.nan}, wait=True
    )
    meta = json.loads((tmp_path / "1" / "meta" / "data.json").read_text())
    assert meta["metrics"] == {SCORE: 0.5, "kl": None}
