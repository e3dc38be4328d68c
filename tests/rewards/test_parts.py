"""A batch that is scored part by part has the scores of a batch scored at once."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards._convention import Failure, Outcome
from grpo_jax.rewards._parts import joined
from grpo_jax.rewards.metrics import reduce_metrics
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.tasks.base import per_completion

sys.path.append(str(Path(__file__).parent))
import reward_functions as fns

GROUP = 4
LATE = Failure(kind="timeout", cause="timeout", details="late")


@per_completion
def value(completions, log_extra, log_metric, worth, **_):
    """The number that a completion is, or what else it says."""
    if "raise" in completions:
        raise KeyError("no such answer")
    log_extra("seen", [text.upper() for text in completions])
    given = {"none": None, "nan": float("nan")}
    values = [
        given[text] if text in given else int(text) * own
        for text, own in zip(completions, worth, strict=True)
    ]
    log_metric("depth", float(np.mean([len(text) for text in completions])))
    return values


@per_completion
def short(completions, log_extra, log_metric, **_):
    if any("none" in text for text in completions):
        raise RuntimeError("none")
    log_extra("seen", [len(text) for text in completions])
    for size in (1, 2):
        log_metric("size", float(np.mean([len(t) <= size for t in completions])))
    return [float(len(text) < 3) for text in completions]


@per_completion
async def patient(completions, **kwargs):
    return await fns.slow_length(completions, **kwargs)


@functools.cache
def runner(on_error, isolate=False):
    functions = [value, short, patient]
    if isolate:
        functions = [fns.length, fns.slow_length, fns.misbehave]
    config = RewardsConfig(on_error=on_error, isolate=isolate, weights=(1.0, 0.5, 0.25))
    return RewardRunner(functions, config, max_steps=9)


def part(runner, texts, *, first=0):
    worth = [first + number for number in range(len(texts))]
    return runner.score_part(
        ["p"] * len(texts),
        texts,
        {"worth": worth},
        completion_ids=[[number] for number in worth],
        step=3,
        first=first,
    )


def whole_and_joined(runner, texts, *, size=GROUP):
    parts = [
        part(runner, texts[first : first + size], first=first)
        for first in range(0, len(texts), size)
    ]
    return runner.join([part(runner, texts)], step=3), runner.join(parts, step=3)


def assert_same(one, other):
    for name in ("rewards", "total", "failures"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.names == other.names and one.extra == other.extra
    metrics = [
        reduce_metrics(
            dict(zip(scores.names, scores.rewards, strict=True)),
            dict(zip(scores.names, scores.failures, strict=True)),
            [scores.logged],
        )
        for scores in (one, other)
    ]
    assert metrics[0].keys() == metrics[1].keys()
    for name, number in metrics[0].items():
        assert metrics[1][name] == pytest.approx(number, rel=1e-12), name


TEXTS = st.sampled_from(["7", "12", "345", "5", "none", "nan", "raise"])


@given(st.lists(st.lists(TEXTS, min_size=GROUP, max_size=GROUP), min_size=1))
@settings(deadline=None, max_examples=60)
def test_parts_have_the_scores_of_the_whole(groups):
    one, other = whole_and_joined(runner("drop"), sum(groups, []))
    assert_same(one, other)


def test_what_is_logged_of_good_completions_is_a_mean_over_all():
    one, other = whole_and_joined(runner("raise"), ["7", "12", "345", "8"] * 3)
    assert_same(one, other)
    assert set(one.extra) == {"value/seen", "short/seen"}
    assert one.logged == {"depth": [1.75], "size": [0.5, 0.75]} == other.logged


@pytest.mark.slow
def test_parts_are_scored_in_a_worker_process_too():
    texts = ["a", "raise", "exit", "bb", "c", "d", "e", "memory"]
    isolated = runner("drop", isolate=True)
    one, other = whole_and_joined(isolated, texts)
    isolated.close()
    assert_same(one, other)
    assert one.failures[2].tolist() == [0, 1, 1, 0, 0, 0, 0, 1]


def test_a_metric_weighs_completions_and_not_parts_after_a_failure():
    parts = [
        Outcome(rewards=np.ones(2), metrics={"m": [1.0]}),
        Outcome(rewards=np.ones(2), metrics={"m": [0.0]}, failed={1: LATE}),
    ]
    # Called one by one, three completions would have logged 1, 1 and 0.
    assert sorted(joined(parts).metrics["m"]) == [0.0, 1.0, 1.0]
    assert joined(parts).failed == {3: LATE}


def test_a_column_is_filled_where_a_part_did_not_log_it():
    parts = [
        Outcome(rewards=np.ones(2)),
        Outcome(rewards=np.ones(1), extra={"x": ["a"]}, metrics={"m": [2.0]}),
    ]
    assert joined(parts).extra == {"x": [None, None, "a"]}
    assert joined(parts).metrics == {"m": [2.0]}
    assert joined(parts[1:]) is parts[1]


def wrong(completions, **_):
    return ["x" if text == "bad" else 1.0 for text in completions]


def fails(completions, **_):
    return [1.0 / (text != "bad") for text in completions]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (wrong, ValueError, "'wrong' returned 'x' for completion 5;"),
        (fails, RuntimeError, "(?s)'fails' failed: .*division by zero.*on_error"),
    ],
)
def test_an_error_in_a_part_has_the_words_it_has_in_the_whole(function, error, message):
    strict = RewardRunner([function], RewardsConfig())
    with pytest.raises(error, match=message) as of_whole:
        part(strict, ["a", "b", "c", "d", "e", "bad"])
    with pytest.raises(error) as of_part:
        part(strict, ["e", "bad"], first=4)
    assert str(of_part.value) == str(of_whole.value)
