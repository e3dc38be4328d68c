"""Rewards of complete groups are those of a batch, and come while it is sampled."""

import dataclasses
import functools
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config import MeshConfig, RewardsConfig, SamplingConfig, TrainConfig
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout.collect import Collector
from grpo_jax.rollout.dynamic_sampling import resample
from grpo_jax.tasks import task_from_rows
from grpo_jax.tasks.base import per_completion

sys.path.append(str(Path(__file__).parents[1] / "rewards"))
import reward_functions as fns

ROWS = [{"prompt": f"{i}" * (1 + i % 3), "number": i} for i in range(6)]


def digits(completions, number, log_extra, log_metric, **_):
    """Rewards, missing ones and failures by the text, which is prompt and sample."""
    if any(text.startswith("3") for text in completions):
        raise KeyError("no threes")
    log_extra("doubled", [text * 2 for text in completions])
    log_metric("depth", float(np.mean([int(text) % 2 for text in completions])))
    return [
        None if text.endswith("2") else float(text) + own
        for text, own in zip(completions, number, strict=True)
    ]


def nothing(completions, **_):
    return [float("nan")] * len(completions)


async def ids_sum(completion_ids, trainer_state, **_):
    return [float(sum(ids) * trainer_state.global_step) for ids in completion_ids]


def by_sample(completions, number, **_):
    """Groups of even numbers differ in reward, those of odd ones do not."""
    last = [float(text[-1]) for text in completions]
    return [value if n % 2 == 0 else 1.0 for value, n in zip(last, number, strict=True)]


def marked(function):
    """A marked function of the same name, which leaves the given one as it is."""

    @per_completion
    @functools.wraps(function)
    def same(**keywords):
        return function(**keywords)

    return same


def marked_async(function):
    @per_completion
    @functools.wraps(function)
    async def same(**keywords):
        return await function(**keywords)

    return same


MANY = [digits, nothing, ids_sum]
MANY_MARKED = [marked(digits), marked(nothing), marked_async(ids_sum)]


class Backwards:
    """A sampler that ends groups from the last to the first, with a pause after each.

    After `pause` groups it waits for `go`.
    """

    def __init__(self, script, *, pause=None, go=None, error=None):
        self.script, self.pause, self.go, self.error = script, pause, go, error
        self.finished = threading.Event()

    def sample(self, prompts, *, ended, **options):
        sampled = self.script.sample(prompts, **options)
        count = len(sampled.lengths)
        for told, n in enumerate(reversed(range(count))):
            if told == self.pause:
                assert self.go.wait(fns.PATIENCE)
                if self.error is not None:
                    raise self.error
            if ended is not None:
                rows = zip(sampled.tokens[n], sampled.lengths[n], strict=True)
                ended(n, [row[:length].tolist() for row, length in rows])
        self.finished.set()
        return sampled


@pytest.fixture
def make(tiny_policy, fake_sampler):
    def collector(functions, *, wrap=Backwards, rows=ROWS, agreement=None, **rewards):
        task = task_from_rows(rows, functions)
        config = TrainConfig(
            model="tiny",
            prompts_per_step=4,
            group_size=3,
            max_new_tokens=5,
            seed=3,
            mesh=MeshConfig(fsdp=1),
            sampling=SamplingConfig(stop_ids=(1,)),
            rewards=RewardsConfig(**rewards),
        )
        script = fake_sampler(lambda number, sample: f"{number}{sample}")
        return Collector(
            wrap(script),
            tiny_policy.model.config,
            tiny_policy.tokenizer,
            task,
            RewardRunner(task.rewards, config.rewards),
            config,
            agreement=agreement,
        )

    return collector


def collect(collector, *, step=2, position=0):
    rollout = collector.sample(step=step, position=position)
    return collector.reward(rollout, step=step)


def assert_same(one, other):
    # What functions log is averaged; how many values the mean is of does not matter.
    means = [{k: np.mean(v) for k, v in x.logged.items()} for x in (one, other)]
    assert means[0] == pytest.approx(means[1], rel=1e-12)
    one, other = (dataclasses.replace(x, seconds={}, logged={}) for x in (one, other))
    np.testing.assert_equal(vars(one), vars(other))


class Silent(Backwards):
    """A sampler that tells of no group."""

    def sample(self, prompts, *, ended, **options):
        return super().sample(prompts, ended=None, **options)


def counting(function, calls):
    def counted(**keywords):
        calls.append(len(keywords["completions"]))
        return function(**keywords)

    return counted


@pytest.mark.parametrize("position", [0, 4, 8])
@pytest.mark.parametrize("rewards", [{}, {"timeout_seconds": fns.PATIENCE}])
def test_rewards_and_logs_are_those_of_a_whole_batch(make, position, rewards):
    options = {"on_error": "drop", "weights": (1.0, 2.0, 0.5), **rewards}
    calls = []
    early = [per_completion(counting(digits, calls)), *MANY_MARKED[1:]]
    early[0].__name__ = "digits"
    one = collect(make(MANY, **options), position=position)
    other = collect(make(early, **options), position=position)
    assert calls[0] == 3
    assert_same(one, other)
    failed = one.failures_by_name["digits"].any(axis=1).tolist()
    assert failed == [position + n == 3 for n in range(4)]


def test_functions_see_of_a_group_what_they_see_of_it_in_a_batch(make):
    def reward(log_extra, log_metric, trainer_state, **keywords):
        steps.add(trainer_state.global_step)
        seen.append(keywords)
        return [0.0] * len(keywords["prompts"])

    seen, steps = [], set()
    collect(make([reward]))
    collect(make([marked(reward)]))
    whole, *groups = seen
    assert set(whole) == {"prompts", "completions", "completion_ids", "number"}
    assert len(groups) == 4 and steps == {2}
    for name, values in whole.items():
        assert sum((group[name] for group in reversed(groups)), []) == values


def test_a_group_is_rewarded_before_the_sampler_has_ended(make):
    called = threading.Event()
    finished = []

    @per_completion
    def reward(completions, **_):
        finished.append(collector._sampler.finished.is_set())
        called.set()
        return [float(text) for text in completions]

    # The sampler goes on after its first group only when that has been rewarded.
    collector = make([reward], wrap=lambda s: Backwards(s, pause=1, go=called))
    rollout = collect(collector)
    assert len(finished) == 4 and not finished[0]
    assert rollout.rewards[0].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("others", [[], [marked(nothing)]])
def test_a_function_that_may_compare_groups_is_called_once_with_all(make, others):
    calls = []

    def rank(completions, **_):
        calls.append(list(completions))
        return np.argsort(np.argsort([int(text) for text in completions]))

    rollout = collect(make([rank, *others]))
    assert len(calls) == 1
    assert calls[0] == sum(rollout.completions, [])
    assert rollout.rewards.ravel().tolist() == list(range(12))


def test_a_sampler_that_tells_of_no_group_has_all_rewarded_at_the_end(make):
    calls = []
    function = per_completion(counting(digits, calls))
    one = collect(make([function], wrap=Silent, on_error="drop"), position=4)
    assert calls == [12]
    function = per_completion(counting(digits, calls))
    assert_same(one, collect(make([function], on_error="drop"), position=4))


def test_an_exception_ends_the_step_with_the_words_it_has_in_a_whole_batch(make):
    def fails(completions, **_):
        return [1.0 / (text != "31") for text in completions]

    told = []
    for mark in (lambda function: function, per_completion):
        collector = make([mark(fails)])
        rollout = collector.sample(step=2, position=0)  # which does not fail
        with pytest.raises(RuntimeError, match="'fails' failed: ") as raised:
            collector.reward(rollout, step=2)
        told.append(str(raised.value))
    assert told[0] == told[1]


def test_after_a_failure_that_ends_the_run_no_further_group_is_rewarded(make):
    calls = []

    @per_completion
    def reward(completions, **_):
        calls.append(completions)
        return ["x"] * len(completions)

    collector = make([reward])
    rollout = collector.sample(step=2, position=0)
    # The last group of four ended first; its completions are 9 to 11 of the batch.
    with pytest.raises(ValueError, match="returned 'x' for completion 9;"):
        collector.reward(rollout, step=2)
    assert len(calls) == 1


def test_ctrl_c_in_a_function_reaches_the_main_thread(make):
    @per_completion
    def reward(**_):
        raise KeyboardInterrupt

    collector = make([reward])
    rollout = collector.sample(step=2, position=0)
    with pytest.raises(KeyboardInterrupt):
        collector.reward(rollout, step=2)


def test_a_rollout_is_not_rewarded_by_what_was_said_of_another(make):
    collector = make([marked(digits)], on_error="drop")
    first = collector.sample(step=2, position=4)
    collector.sample(step=2, position=8)
    assert_same(
        collector.reward(first, step=2),
        collect(make([digits], on_error="drop"), position=4),
    )
    # Also where the texts are the same: rows are compared, too.
    first = collector.sample(step=2, position=4)
    again = dataclasses.replace(first, rows=[{"prompt": "", "number": 50}] * 4)
    collector.sample(step=2, position=4)
    rewards = collector.reward(again, step=2).rewards
    assert rewards[0, 0] == 40.0 + 50.0


def test_replaced_groups_have_the_rewards_of_whole_batches(make):
    pairs = [
        resample(make([function]), Agreement(), step=1, position=0, limit=4)
        for function in (by_sample, marked(by_sample))
    ]
    assert len(pairs[0][1].rows) > 4
    for one, other in zip(*pairs, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_have_their_shares_rewarded_early(make, on_processes, count):
    whole = collect(make([digits], on_error="drop"))
    parts = on_processes(
        lambda _: collect(make([marked(digits)], on_error="drop")), count
    )
    for name in ("rewards", "lengths"):
        joined = np.concatenate([vars(part)[name] for part in parts])
        np.testing.assert_array_equal(joined, vars(whole)[name])


def test_a_process_whose_function_fails_stops_the_others(make, on_processes):
    def act(index):
        agreement = Agreement()
        collector = make([marked(digits)], agreement=agreement)
        rollout = collector.sample(step=2, position=0)
        try:
            with agreement.phase("rewards"):
                collector.reward(rollout, step=2)
        except RuntimeError as error:
            return str(error)

    # The group of the prompt 3, on which it fails, is in the share of process 1.
    first, second = on_processes(act, 2)
    assert first.startswith("process 1 of 2 failed in 'rewards'")
    assert "no threes" in second


def test_groups_of_an_abandoned_step_are_not_rewarded(make):
    calls, release, started = [], threading.Event(), threading.Event()

    @per_completion
    def reward(completions, **_):
        calls.append(completions)
        started.set()
        assert release.wait(fns.PATIENCE)
        return [0.0] * len(completions)

    def failing(script):
        return Backwards(script, pause=2, go=started, error=OSError("lost"))

    collector = make([reward], wrap=failing)
    with pytest.raises(OSError, match="lost"):
        collector.sample(step=2, position=0)
    timer = threading.Timer(0.1, release.set)
    timer.start()
    collector.close()  # waits for the call that is under way
    timer.join()
    assert len(calls) == 1
    collector.close()


@pytest.mark.slow
def test_isolated_functions_are_called_early_and_survived(make, tiny_policy):
    texts = ["a", "exit", "raise", "bb", "c", "memory"]
    functions = [fns.length, fns.misbehave]
    for function in functions:
        per_completion(function)
    collector = make(functions, isolate=True, on_error="drop")
    script = collector._sampler.script
    script.script = lambda number, sample: texts[(3 * number + sample) % 6]
    collector._config = dataclasses.replace(collector._config, max_new_tokens=8)
    rollout = collect(collector)
    collector.close()
    assert rollout.failures_by_name["misbehave"].tolist() == [[0, 1, 1], [0, 0, 1]] * 2
    assert rollout.rewards.tolist()[:1] == [[2.0, 4.0, 5.0]]
    assert rollout.logged["calls"] == [1.0] * 6
