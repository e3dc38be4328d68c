"""Functions in this process: who is late, fails or blocks loses, and nobody else."""

import asyncio
import concurrent.futures
import itertools
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards import _in_process as local_calls
from grpo_jax.rewards.runner import RewardRunner

sys.path.append(str(Path(__file__).parent))
import reward_functions as fns

GOOD = ("fast", "slow")


def ones(completions):
    return [1.0] * len(completions)


def plain_functions(release):
    """One of each kind; what blocks goes on until the release."""

    def fast(completions, **_):
        return ones(completions)

    def slow(completions, **_):
        release.wait(0.01)
        return ones(completions)

    def blocking(completions, **_):
        release.wait()
        return ones(completions)

    def raising(completions, **_):
        raise KeyError("no such answer")

    return [fast, slow, blocking, raising]


def async_functions(release):
    """The same, and one that waits for ever, and one that is cancelled."""

    async def fast_async(completions, **_):
        return ones(completions)

    async def slow_async(completions, **_):
        for _ in range(3):
            await asyncio.sleep(0.01)
        return ones(completions)

    async def blocking_async(completions, **_):
        release.wait()
        return ones(completions)

    async def waiting_async(completions, **_):
        await asyncio.Event().wait()

    async def raising_async(completions, **_):
        raise KeyError("no such answer")

    async def cancelled_async(completions, **_):
        raise asyncio.CancelledError

    gone = [waiting_async, cancelled_async]
    return [fast_async, slow_async, blocking_async, raising_async, *gone]


def rewarded(pair, on_error, limit):
    """Which of two functions gave every completion its reward; or who was blamed."""
    config = RewardsConfig(timeout_seconds=limit, on_error=on_error)
    with RewardRunner(pair, config) as runner:
        try:
            scores = runner.score(
                ["p", "p"], ["a", "b"], {}, completion_ids=[[1], [1]], step=1
            )
        except RuntimeError as error:
            return str(error).split("'")[1]
    return [bool((given == 1.0).all()) for given in scores.rewards]


@pytest.mark.parametrize("on_error", ["drop", "raise"])
def test_of_every_pair_in_either_order_the_offender_alone_loses(on_error, monkeypatch):
    monkeypatch.setattr(local_calls, "_GRACE_SECONDS", 0.2)
    release = threading.Event()
    functions = plain_functions(release) + async_functions(release)
    pairs = list(itertools.product(functions, repeat=2))

    def check(limit):
        # Side by side, since most of the time is spent waiting.
        with concurrent.futures.ThreadPoolExecutor(len(pairs)) as pool:
            given = pool.map(lambda pair: rewarded(pair, on_error, limit), pairs)
            for pair, seen in zip(pairs, list(given), strict=True):
                check_pair(pair, seen, on_error)

    try:
        fns.at_some_limit(check, 0.5)
    finally:
        release.set()


def check_pair(pair, seen, on_error):
    good = [function.__name__.removesuffix("_async") in GOOD for function in pair]
    if on_error == "drop" or all(good):
        assert seen == good, pair
    else:
        blamed = {f.__name__ for f, g in zip(pair, good, strict=True) if not g}
        assert seen.removesuffix("_2") in blamed, pair


def test_functions_share_a_loop_and_keep_it_when_none_of_them_blocks():
    loops = []

    async def first(completions, **_):
        loops.append(asyncio.get_running_loop())
        return ones(completions)

    async def second(completions, **_):
        loops.append(asyncio.get_running_loop())
        return ones(completions)

    with RewardRunner(
        [first, second], RewardsConfig(timeout_seconds=fns.PATIENCE)
    ) as runner:
        for _ in range(2):
            scores = runner.score(["p"], ["a"], {}, completion_ids=[[1]], step=1)
            np.testing.assert_array_equal(scores.total, [2.0])
    assert len(set(map(id, loops))) == 1 and len(loops) == 4
