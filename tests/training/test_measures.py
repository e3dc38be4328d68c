"""A step's numbers are of all it sampled, however that was spread over processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.config import ObjectiveConfig, TrainConfig
from grpo_jax.planning import utilization
from grpo_jax.reporting.metrics import CompileCounter
from grpo_jax.rollout.dynamic_sampling import _join, _refill
from grpo_jax.rollout.rollout import Rollout
from grpo_jax.training._measures import Measures, slowest

SECONDS = {f"time/{n}": 2.0 for n in ("rollout", "reward", "score", "update", "step")}


def make_rollout(rng, prompts):
    """Random completions in pairs, a third of them without a reward."""
    shape = (prompts, 2)
    rewards = rng.choice([0.1, 0.7, 1.0 + 1e-9, 1.0, np.nan, np.nan], shape)
    lengths = rng.integers(1, 5, shape)
    failures = np.where(np.isnan(rewards), rng.integers(0, 3, shape), 0)
    return Rollout(
        rows=[{"prompt": "p"}] * prompts,
        prompts=np.ones((prompts, 3), int),
        prompt_lengths=rng.integers(1, 4, prompts),
        tokens=np.ones((*shape, 4), int),
        logp=np.zeros((*shape, 4)),
        lengths=lengths,
        finished=lengths < 4,
        mask=np.arange(4) < lengths[..., None],
        completions=[["c"] * 2] * prompts,
        keep=np.ones(prompts, bool),
        rewards=rewards,
        rewards_by_name={"f": rewards},
        failures_by_name={"f": failures},
        logged={"depth": rng.random(rng.integers(1, 4)).tolist()},
        seconds={"time/rollout": float(rng.random())},
    )


def share(rollout, number, count):
    """The part of one of several processes; what was logged lies on the first."""
    size = len(rollout.rows) // count
    rows = slice(number * size, (number + 1) * size)
    arrays = {n: v[rows] for n, v in vars(rollout).items() if isinstance(v, np.ndarray)}
    return Rollout(
        **arrays,
        rows=rollout.rows[rows],
        completions=rollout.completions[rows],
        rewards_by_name={"f": rollout.rewards_by_name["f"][rows]},
        failures_by_name={"f": rollout.failures_by_name["f"][rows]},
        logged=rollout.logged if number == 0 else {},
        seconds=rollout.seconds,
    )


@pytest.fixture(scope="module")
def measures(tiny_policy, meshes_of):
    made = {}
    for limit in (0, 2):
        config = TrainConfig(
            model="tiny", objective=ObjectiveConfig(resample_limit=limit)
        )
        mesh = meshes_of(1, 1, 1)
        made[limit] = Measures(tiny_policy.model.config, config, mesh, CompileCounter())
    return made


@pytest.fixture(scope="module", autouse=True)
def known_peak():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilization, "_peak_rate", lambda mesh, dtype: 1e9)
        yield


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([2, 4]), st.sampled_from([1, 3]))
def test_several_processes_say_what_one_says(
    measures, on_processes, seed, count, rounds
):
    rng = np.random.default_rng(seed)
    taken = [make_rollout(rng, 8) for _ in range(rounds)]
    sampled = _join(taken)
    kept = _refill(sampled, 8, short=True)
    expected = measures[2].of_step(sampled, kept, SECONDS)

    def act(number):
        own = _join([share(one, number, count) for one in taken])
        return measures[2].of_step(own, share(kept, number, count), SECONDS)

    for seen in on_processes(act, count):
        assert seen.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(seen[name], value, rtol=1e-12, err_msg=name)


def test_metrics_are_of_all_that_was_sampled_and_those_of_the_kept_say_so(measures):
    rng = np.random.default_rng(0)
    dull, good = make_rollout(rng, 2), make_rollout(rng, 2)
    dull.rewards[:], good.rewards[:] = 1.0, [[0.0, 3.0]] * 2
    dull.lengths[:], good.lengths[:] = 4, 1
    for one in (dull, good):
        one.mask[:] = np.arange(4) < one.lengths[..., None]
    sampled = _join([dull, good])
    metrics = measures[2].of_step(sampled, _refill(sampled, 2, short=False), SECONDS)
    # 2 x (1 + 1) and 2 x (0 + 3) over 8 completions.
    assert metrics["reward"] == 1.25 and metrics["kept/reward"] == 1.5
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["kept/frac_reward_zero_std"] == 0.0
    assert metrics["completions/mean_length"] == 2.5
    assert metrics["kept/completions/mean_length"] == 1.0
    assert metrics["tokens_per_second/rollout"] == (4 * 4 + 4 * 1) / 2.0


def test_what_functions_gave_is_of_the_same_completions_as_the_reward(measures):
    rng = np.random.default_rng(1)
    sampled = _join([make_rollout(rng, 4), make_rollout(rng, 4)])
    metrics = measures[2].of_step(sampled, _refill(sampled, 4, short=True), SECONDS)
    assert metrics["rewards/f/mean"] == pytest.approx(metrics["reward"])


def test_without_dynamic_sampling_nothing_is_kept_apart(measures):
    rollout = make_rollout(np.random.default_rng(2), 4)
    metrics = measures[0].of_step(rollout, rollout, SECONDS)
    assert not [name for name in metrics if name.startswith("kept/")]


def test_times_are_those_of_the_slowest_process(on_processes):
    times = [{"time/rollout": 1.0, "time/step": 5.0}, {"time/rollout": 2.0}]
    times[1]["time/step"] = 3.0
    seen = on_processes(lambda number: slowest(times[number]), 2)
    assert seen == [{"time/rollout": 2.0, "time/step": 5.0}] * 2


def test_lengths_count_what_the_policy_drew_and_speed_counts_all(measures):
    rollout = make_rollout(np.random.default_rng(3), 4)
    rollout.lengths[:], rollout.mask[:] = 4, [True, False, False, True]
    metrics = measures[0].of_step(rollout, rollout, SECONDS)
    assert metrics["completions/mean_length"] == 2.0
    assert metrics["tokens_per_second/rollout"] == 4 * 8 / 2.0
