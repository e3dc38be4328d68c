"""The isolated worker outlives what it runs, and what it runs does not end the run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import grpo_jax
from grpo_jax.config import RewardsConfig
from grpo_jax.rewards.runner import RewardRunner

sys.path.append(str(Path(__file__).parent))
import reward_functions as fns

# Lets child interpreters find the package where it is not installed.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(grpo_jax.__file__).parents[1])}


def run(runner, completions, **columns):
    return runner.score(
        ["p"] * len(completions),
        completions,
        columns,
        completion_ids=[[1]] * len(completions),
        step=1,
    )


def test_isolated_rewards_equal_those_computed_here():
    functions = [fns.length, fns.slow_length, fns.Bonus(0.5)]
    texts = ["a", "bb", "ccc"]
    with RewardRunner(functions, RewardsConfig()) as runner:
        here = run(runner, texts)
    with RewardRunner(functions, RewardsConfig(isolate=True)) as runner:
        there = run(runner, texts)
    np.testing.assert_array_equal(here.rewards, there.rewards)
    assert fns.metrics(here) == fns.metrics(there)


def test_the_worker_is_another_process_kept_between_batches_without_jax():
    functions = [fns.process_id, fns.jax_state, fns.alarmed]
    with RewardRunner(functions, RewardsConfig(isolate=True)) as runner:
        first, second = run(runner, ["a"]), run(runner, ["b"])
    assert first.rewards[0, 0] == second.rewards[0, 0] != os.getpid()
    # On its main thread, where signals can be caught.
    assert first.rewards[1, 0] == 1.0 == first.rewards[2, 0]
    assert "PATH" in os.environ and os.environ.get("JAX_PLATFORMS") == "cpu"


@pytest.mark.parametrize(
    ("bad", "metric"),
    [("exit", "error_rate"), ("memory", "error_rate"), ("hang", "timeout_rate")],
)
def test_a_crash_costs_only_the_offender_its_reward(bad, metric, caplog):
    def check(limit):
        caplog.clear()
        # on_error is "raise", which is about exceptions: a lost worker is survived.
        config = RewardsConfig(isolate=True, timeout_seconds=limit)
        with RewardRunner([fns.misbehave, fns.length], config) as runner:
            scores = run(runner, ["good", bad, "good", "good"])
            healthy = run(runner, ["good", "good"])
        np.testing.assert_array_equal(scores.rewards[0], [1.0, np.nan, 1.0, 1.0])
        np.testing.assert_array_equal(scores.total[[0, 2, 3]], [5.0, 5.0, 5.0])
        assert scores.total[1] == len(bad)  # the other function's reward is kept
        assert fns.metrics(scores)[f"rewards/misbehave/{metric}"] == 0.25
        assert fns.metrics(scores)["rewards/misbehave/none_rate"] == 0.0
        assert scores.extra["seen"] == ["GOOD", None, "GOOD", "GOOD"]
        np.testing.assert_array_equal(healthy.total, [5.0, 5.0])
        (record,) = caplog.records
        assert repr(bad) in record.getMessage()

    if bad == "hang":
        fns.at_some_limit(check, 1.0)
    else:
        check(None)


def test_a_batch_of_nothing_but_hangs_ends_and_the_next_is_scored():
    def check(limit):
        config = RewardsConfig(isolate=True, timeout_seconds=limit)
        with RewardRunner([fns.misbehave], config) as runner:
            scores = run(runner, ["hang"] * 16)
            healthy = run(runner, ["good"])
        assert np.isnan(scores.total).all()
        assert fns.metrics(scores)["rewards/misbehave/timeout_rate"] == 1.0
        assert healthy.total.tolist() == [1.0]

    fns.at_some_limit(check, 0.5)


def test_exceptions_in_the_worker_are_raised_on_with_their_traceback():
    with RewardRunner([fns.misbehave], RewardsConfig(isolate=True)) as runner:
        with pytest.raises(RuntimeError, match="'misbehave' failed") as caught:
            run(runner, ["good", "raise"])
        assert run(runner, ["good"]).total.tolist() == [1.0]
    assert "KeyError: 'no such answer'" in str(caught.value)


def test_exceptions_in_the_worker_are_dropped_one_by_one():
    config = RewardsConfig(isolate=True, on_error="drop")
    with RewardRunner([fns.misbehave], config) as runner:
        scores = run(runner, ["raise", "good", "sys.exit"])
    np.testing.assert_array_equal(scores.total, [np.nan, 1.0, np.nan])
    assert fns.metrics(scores)["rewards/misbehave/error_rate"] == pytest.approx(2 / 3)


def test_bad_returns_in_the_worker_are_errors_too():
    with RewardRunner([fns.wrong_count], RewardsConfig(isolate=True)) as runner:
        with pytest.raises(ValueError, match="'wrong_count' returned 1 rewards"):
            run(runner, ["a", "b"])


def test_functions_that_cannot_be_imported_are_refused_at_construction():
    def inner(completions, **kwargs):
        return [0.0]

    with pytest.raises(ValueError, match=r"'inner' cannot be isolated.*top level"):
        RewardRunner([inner], RewardsConfig(isolate=True))
    with pytest.raises(ValueError, match="cannot be isolated"):
        RewardRunner([lambda completions: [0.0]], RewardsConfig(isolate=True))


def test_a_worker_killed_between_batches_is_replaced():
    with RewardRunner([fns.process_id], RewardsConfig(isolate=True)) as runner:
        first = int(run(runner, ["a", "b"]).rewards[0, 0])
        os.kill(first, 9)
        time.sleep(0.1)
        second = run(runner, ["a", "b"]).rewards[0]
    assert not np.isnan(second).any() and int(second[0]) != first


def test_the_worker_ends_with_its_parent_even_in_the_middle_of_a_call(tmp_path):
    pid_file = tmp_path / "pid"
    script = tmp_path / "parent.py"
    script.write_text(f"""
import os, pathlib, time
from grpo_jax.config import RewardsConfig
from grpo_jax.rewards.runner import RewardRunner

def hang(completions, **kwargs):
    pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))
    time.sleep(3600)

if __name__ == "__main__":
    runner = RewardRunner([hang], RewardsConfig(isolate=True))
    runner.score(["p"], ["c"], {{}}, completion_ids=[[1]], step=1)
""")
    parent = subprocess.Popen([sys.executable, str(script)], env=ENVIRONMENT)
    try:
        _wait_until(lambda: pid_file.exists() and pid_file.read_text())
        worker = int(pid_file.read_text())
    finally:
        parent.kill()
        parent.wait()
    _wait_until(lambda: not _alive(worker))


def test_importing_worker_and_tasks_loads_neither_jax_nor_heavy_libraries():
    code = (
        "import sys, grpo_jax.rewards._subprocess, grpo_jax.tasks\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'transformers', 'datasets', 'torch',"
        " 'reasoning_gym', 'sympy'}\n"
        "sys.exit(str(sorted(heavy & set(sys.modules)) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert not done.stderr.strip(), done.stderr


def _alive(pid):
    # A child that nobody waits for stays as a zombie, which is dead all the same.
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait_until(holds):
    end = time.monotonic() + fns.PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
