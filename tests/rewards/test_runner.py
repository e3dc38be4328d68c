"""Reward functions are called as TRL calls them, and what they return is checked."""

import asyncio
import functools
import logging
import math
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards.runner import RewardRunner

sys.path.append(str(Path(__file__).parent))
import reward_functions as fns

CHAT = [{"role": "user", "content": "2+2?"}]


def score(functions, completions, *, prompts=None, columns=None, **config):
    with RewardRunner(functions, RewardsConfig(**config)) as runner:
        return run(runner, completions, prompts=prompts, columns=columns)


def run(runner, completions, *, prompts=None, columns=None):
    return runner.score(
        prompts or ["p"] * len(completions),
        completions,
        columns or {},
        completion_ids=[np.array([7, 8])] * len(completions),
        step=5,
    )


def returning(values):
    def constant(completions, **kwargs):
        return values

    return constant


def test_steps_without_any_reward_are_told_once(caplog):
    with RewardRunner([returning([None, math.nan])], RewardsConfig()) as runner:
        for _ in range(2):
            assert np.isnan(run(runner, ["a", "b"]).total).all()
    assert [r.message for r in caplog.records] == [
        "step 5: no completion has a reward, so it teaches nothing; further such steps "
        "are not reported"
    ]


def test_an_evaluation_without_any_reward_is_none_of_the_steps(caplog):
    with RewardRunner([returning([None])], RewardsConfig()) as runner:
        for step in (0, 0, 3):
            runner.score(["p"], ["a"], {}, completion_ids=[[7]], step=step)
    first, second = [r.message for r in caplog.records]
    assert first.startswith("evaluation: no completion has a reward; further such eval")
    assert second.startswith(
        "step 3: no completion has a reward, so it teaches nothing"
    )


# --- TRL's convention ---


def test_reward_functions_written_for_trl_run_unchanged_on_messages():
    scores = score(
        [fns.accuracy_reward, fns.think_format_reward],
        ["4", "<think>2+2</think>4", "5", "4"],
        prompts=[CHAT] * 4,
        columns={"solution": ["4", "4", "4", "?"]},
    )
    np.testing.assert_array_equal(scores.rewards[0], [1.0, 0.0, 0.0, np.nan])
    np.testing.assert_array_equal(scores.rewards[1], [0.0, 1.0, 0.0, 0.0])
    assert scores.extra == {"solution": ["4", "4", "4", "?"]}


def test_everything_arrives_by_keyword_and_under_trl_names():
    seen = {}

    def spy(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [0.0, 0.0]

    columns = {"answer": [1, 2], "completion": ["x", "y"], "prompt": ["q", "q"]}
    with RewardRunner([spy], RewardsConfig(), max_steps=9) as runner:
        run(runner, ["a", "b"], prompts=["p", "p"], columns=columns)
    assert seen.keys() == {
        "prompts",
        "completions",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "answer",
    }
    assert seen["prompts"] == ["p", "p"] and seen["completions"] == ["a", "b"]
    assert seen["completion_ids"] == [[7, 8], [7, 8]]
    assert type(seen["completion_ids"][0][0]) is int
    assert seen["answer"] == [1, 2]
    assert seen["trainer_state"].global_step == 5
    assert seen["trainer_state"].max_steps == 9


def test_a_function_without_kwargs_gets_only_what_it_names():
    def narrow(completions, answer, missing=0.5):
        return [missing + len(answer) for _ in completions]

    scores = score([narrow], ["a"], columns={"answer": ["x"], "other": ["y"]})
    assert scores.rewards.tolist() == [[1.5]]


def test_completions_are_wrapped_as_assistant_messages_for_chat_prompts():
    seen = []

    def spy(completions, **kwargs):
        seen.extend(completions)
        return [0.0]

    score([spy], ["hi"], prompts=[CHAT])
    assert seen == [[{"role": "assistant", "content": "hi"}]]


def test_a_function_cannot_spoil_the_lists_of_the_next():
    def greedy(prompts, completions, answer, **kwargs):
        rewards = [1.0] * len(completions)
        prompts.clear(), completions.clear(), answer.clear()
        return rewards

    scores = score([greedy, fns.length], ["ab", "c"], columns={"answer": [1, 2]})
    assert scores.rewards.tolist() == [[1.0, 1.0], [2.0, 1.0]]


def test_a_missing_column_is_named_before_any_call():
    def needy(completions, solution, **kwargs):
        raise AssertionError("must not be called")

    with RewardRunner([needy], RewardsConfig()) as runner:
        with pytest.raises(ValueError, match=r"'needy' needs solution.*answer"):
            runner.check_columns(["prompt", "answer"])
        with pytest.raises(ValueError, match="'needy' needs solution"):
            run(runner, ["a"])


def test_positional_only_functions_are_refused():
    def positional(completions, /):
        return [0.0]

    with pytest.raises(ValueError, match="'positional' has a positional-only"):
        RewardRunner([positional], RewardsConfig())


# --- async ---


def test_async_functions_run_together_and_mix_with_plain_ones():
    # Each waits for the other: one after another they would never finish.
    meeting = threading.Barrier(2)

    async def first(completions, **kwargs):
        await asyncio.to_thread(meeting.wait, 10.0)
        return [1.0]

    async def second(completions, **kwargs):
        await asyncio.to_thread(meeting.wait, 10.0)
        return [2.0]

    scores = score([first, fns.length, second], ["abc"])
    assert scores.rewards.tolist() == [[1.0], [3.0], [2.0]]


def test_async_functions_work_inside_a_running_loop():
    async def main():
        return score([fns.slow_length], ["abc"]).rewards.tolist()

    assert asyncio.run(main()) == [[3.0]]


def test_async_functions_stay_on_one_loop_between_batches():
    loops = []

    async def spy(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.0]

    with RewardRunner([spy], RewardsConfig()) as runner:
        run(runner, ["a"])
        run(runner, ["b"])
    assert loops[0] is loops[1]


# --- what is returned ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "returned 1 rewards; expected 2"),
        (np.ones(3), "returned 3 rewards; expected 2"),
        (1.0, "returned a float"),
        (np.float64(1.0), "returned a float64"),
        (np.array(1.0), "returned a single number"),
        (None, "returned a NoneType"),
        ({"a": 1, "b": 2}, "returned a dict"),
        ("ab", "returned a str"),
        (np.ones((2, 1)), "for completion 0"),
        ([1.0, "1.0"], "returned '1.0' for completion 1"),
        ([1.0, [1.0]], "for completion 1"),
        ([1.0, 1j], "for completion 1"),
        ([float("inf"), 0.0], "returned inf for completion 0"),
        ([0.0, -float("inf")], "returned -inf for completion 1"),
        ([0.0, 1e300], "returned 1e.300 for completion 1"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "drop"])
def test_bad_returns_are_errors_that_name_the_function(values, message, on_error):
    with pytest.raises(ValueError, match=f"'constant' {message}|'constant'.*{message}"):
        score([returning(values)], ["a", "b"], on_error=on_error)


def test_numbers_of_every_kind_are_rewards():
    kinds = [1, True, np.float32(0.5), np.bool_(True), np.array(2), None, float("nan")]
    scores = score([returning(kinds)], ["a"] * 7)
    np.testing.assert_array_equal(
        scores.rewards, [[1.0, 1.0, 0.5, 1.0, 2.0, np.nan, np.nan]]
    )
    assert scores.rewards.dtype == np.float64


def test_jax_arrays_are_rewards():
    import jax.numpy as jnp

    values = jnp.array([1.5, 0.25], dtype=jnp.bfloat16)
    assert score([returning(values)], ["a", "b"]).rewards.tolist() == [[1.5, 0.25]]


# --- weights, names, metrics ---


def test_a_completion_leaves_only_if_every_function_gave_none():
    scores = score(
        [returning([1.0, None, None]), returning([2.0, 3.0, None])],
        ["a", "b", "c"],
        weights=(0.5, 10.0),
    )
    # 0.5 * 1 + 10 * 2 = 20.5; None counts as 0: 10 * 3 = 30; no reward at all.
    np.testing.assert_array_equal(scores.total, [20.5, 30.0, np.nan])


def test_weights_default_to_one():
    scores = score([returning([1.0]), returning([2.0])], ["a"])
    assert scores.total.tolist() == [3.0]


def test_as_many_weights_as_functions():
    with pytest.raises(ValueError, match="weights has 1 entries for 2 reward"):
        RewardRunner([fns.length, fns.length], RewardsConfig(weights=(1.0,)))
    with pytest.raises(ValueError, match="at least one reward function"):
        RewardRunner([], RewardsConfig())


def test_names_come_from_functions_partials_and_objects_and_are_distinct():
    functions = [
        fns.length,
        functools.partial(fns.length, scale=2),
        fns.Bonus(1.0),
        fns.Bonus(2.0),
        functools.partial(functools.partial(fns.slow_length)),
    ]
    with RewardRunner(functions, RewardsConfig()) as runner:
        assert runner.names == ("length", "length_2", "Bonus", "Bonus_2", "slow_length")
        rewards = run(runner, ["abc"]).rewards
    assert rewards[:, 0].tolist() == [3.0, 3.0, 1.0, 2.0, 3.0]


def test_metrics_of_a_function():
    metrics = fns.metrics(score([returning([1.0, 3.0, None, float("nan")])], ["a"] * 4))
    # mean (1 + 3) / 2; deviation sqrt(((1-2)^2 + (3-2)^2) / (2 - 1)) = sqrt(2)
    assert metrics == pytest.approx(
        {
            "rewards/constant/mean": 2.0,
            "rewards/constant/std": 2.0**0.5,
            "rewards/constant/none_rate": 0.5,
            "rewards/constant/error_rate": 0.0,
            "rewards/constant/timeout_rate": 0.0,
        }
    )


def test_metrics_hold_no_nan_when_no_completion_has_a_reward():
    scores = score([returning([None, None])], ["a", "b"])
    assert "rewards/constant/mean" not in fns.metrics(scores)
    assert fns.metrics(scores)["rewards/constant/none_rate"] == 1.0
    assert np.isnan(scores.total).all()


def test_what_functions_log_is_averaged_and_returned():
    def logs(completions, log_metric, log_extra):
        log_metric("depth", 1)
        log_metric("depth", 2.0)
        log_extra("parsed", [text + "!" for text in completions])
        return [0.0] * len(completions)

    scores = score([logs], ["a", "b"])
    assert fns.metrics(scores)["depth"] == 1.5
    assert scores.extra == {"parsed": ["a!", "b!"]}


def test_columns_of_the_same_name_are_stored_by_function_and_metrics_averaged():
    def short(completions, log_extra, log_metric):
        log_extra("parsed", ["s"] * len(completions))
        log_extra("own", [0] * len(completions))
        log_metric("size", 1.0)
        return [0.0] * len(completions)

    def long(completions, log_extra, log_metric):
        log_extra("parsed", ["l"] * len(completions))
        log_metric("size", 3.0)
        return [0.0] * len(completions)

    scores = score([short, long], ["a", "b"])
    assert scores.extra == {
        "short/parsed": ["s", "s"],
        "own": [0, 0],
        "long/parsed": ["l", "l"],
    }
    assert scores.logged == {"size": [1.0, 3.0]}


def test_extra_columns_of_the_wrong_length_are_errors():
    def logs(completions, log_extra):
        log_extra("parsed", ["only one"])
        return [0.0, 0.0]

    with pytest.raises(ValueError, match=r"'logs'.*'parsed'.*1 values for 2"):
        score([logs], ["a", "b"])


def test_lengths_of_the_batch_are_checked():
    with pytest.raises(ValueError, match="column 'answer' has 1 entries for 2"):
        score([fns.length], ["a", "b"], columns={"answer": [1]})
    with pytest.raises(ValueError, match="prompts has 1 entries for 2"):
        score([fns.length], ["a", "b"], prompts=["p"])
    with pytest.raises(ValueError, match="at least one completion"):
        score([fns.length], [])


# --- failures in this process ---


@pytest.mark.parametrize("bad", ["raise", "sys.exit"])
@pytest.mark.parametrize("timeout", [None, fns.PATIENCE])
def test_an_exception_is_raised_on_with_the_name_and_the_cause(bad, timeout):
    with pytest.raises(RuntimeError, match="'misbehave' failed") as caught:
        score([fns.misbehave], ["good", bad], timeout_seconds=timeout)
    expected = KeyError if bad == "raise" else SystemExit
    assert isinstance(caught.value.__cause__, expected)


def test_an_exception_in_an_async_function_is_raised_on():
    async def broken(completions, **kwargs):
        raise TimeoutError("the judge did not answer")

    # The function's own TimeoutError is an error, not a time limit of ours.
    with pytest.raises(RuntimeError, match="the judge did not answer"):
        score([broken], ["a"], timeout_seconds=fns.PATIENCE)


@pytest.mark.parametrize("timeout", [None, fns.PATIENCE])
def test_drop_costs_only_the_offenders_their_reward(timeout, caplog):
    completions = ["good", "raise", "good", "raise"]
    with RewardRunner(
        [fns.misbehave, fns.length],
        RewardsConfig(on_error="drop", timeout_seconds=timeout),
    ) as runner:
        scores = run(runner, completions)
        run(runner, completions)
    np.testing.assert_array_equal(scores.rewards[0], [1.0, np.nan, 1.0, np.nan])
    np.testing.assert_array_equal(scores.total, [5.0, 5.0, 5.0, 5.0])
    assert fns.metrics(scores)["rewards/misbehave/error_rate"] == 0.5
    assert fns.metrics(scores)["rewards/misbehave/none_rate"] == 0.0
    assert fns.metrics(scores)["calls"] == 1.0
    assert scores.extra == {"seen": ["GOOD", None, "GOOD", None]}
    # Logged once, with the traceback and the completion that caused it.
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "KeyError" in record.getMessage() and "'raise'" in record.getMessage()


@pytest.mark.parametrize(
    ("bad", "told"), [(0, False), (8, False), (9, True), (10, True)]
)
def test_a_function_that_fails_on_nearly_all_is_told_at_every_step(bad, told, caplog):
    completions = ["raise"] * bad + ["good"] * (10 - bad)
    with RewardRunner([fns.misbehave], RewardsConfig(on_error="drop")) as runner:
        for _ in range(3):
            run(runner, completions)
    lines = [r.message for r in caplog.records if "first failure of each" in r.message]
    expected = f"step 5: reward function 'misbehave' failed on {bad} of 10 completions "
    assert len(lines) == (3 if told else 0)
    assert all(line.startswith(f"{expected}({bad} KeyError)") for line in lines)


def on_the_main_thread(completions, **_):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return [1.0] * len(completions)


async def on_the_main_thread_async(completions, **_):
    return on_the_main_thread(completions)


@pytest.mark.parametrize("on_error", ["raise", "drop"])
@pytest.mark.parametrize(
    ("function", "timeout"),
    [(on_the_main_thread, fns.PATIENCE), (on_the_main_thread_async, None)],
)
def test_what_needs_the_main_thread_is_shown_the_way(
    function, timeout, on_error, caplog
):
    config = {"timeout_seconds": timeout, "on_error": on_error}
    try:
        score([function], ["a"], **config)
        told = caplog.text
    except RuntimeError as error:
        told = str(error)
    assert "main thread works with rewards.isolate" in told
    # Any other failure is not of that kind.
    caplog.clear()
    score([fns.misbehave], ["raise"], timeout_seconds=timeout, on_error="drop")
    assert "isolate" not in caplog.text


def test_a_plain_function_over_time_is_raised_or_dropped():
    release = threading.Event()

    def stuck(completions, **kwargs):
        release.wait(fns.PATIENCE)
        return [1.0, 1.0]

    def drops_the_stuck_alone(limit):
        config = {"timeout_seconds": limit, "on_error": "drop"}
        scores = score([stuck, fns.length], ["a", "b"], **config)
        np.testing.assert_array_equal(scores.rewards, [[np.nan, np.nan], [1.0, 1.0]])
        assert fns.metrics(scores)["rewards/stuck/timeout_rate"] == 1.0
        assert fns.metrics(scores)["rewards/stuck/error_rate"] == 0.0

    try:
        with pytest.raises(RuntimeError, match="'stuck' failed: No answer within 0.1"):
            score([stuck], ["a", "b"], timeout_seconds=0.1)
        fns.at_some_limit(drops_the_stuck_alone, 0.1)
    finally:
        release.set()


def test_an_async_function_over_time_is_cancelled():
    cancelled = threading.Event()

    async def stuck(completions, **kwargs):
        try:
            await asyncio.sleep(fns.PATIENCE)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(RuntimeError, match="'stuck' failed: No answer within 0.1"):
        score([stuck], ["a"], timeout_seconds=0.1)
    assert cancelled.wait(fns.PATIENCE)


def test_an_async_function_that_blocks_the_loop_does_not_block_the_next_batch():
    release = threading.Event()

    async def sometimes(completions, **kwargs):
        if completions == ["block"]:
            release.wait(fns.PATIENCE)
        return [1.0]

    def scores_the_next(limit):
        config = RewardsConfig(timeout_seconds=limit, on_error="drop")
        with RewardRunner([sometimes], config) as runner:
            assert np.isnan(run(runner, ["block"]).total[0])
            assert run(runner, ["fine"]).total.tolist() == [1.0]

    try:
        fns.at_some_limit(scores_the_next, 0.5)
    finally:
        release.set()
