import dataclasses

import numpy as np
import pytest

from grpo_jax.config import LoraConfig, ObjectiveConfig, TrainConfig
from grpo_jax.planning import utilization
from grpo_jax.planning.devices import known_flops
from grpo_jax.planning.flops import forward_flops
from grpo_jax.planning.utilization import Utilization, _peak_rate

PROMPTS = np.array([9, 5])
LENGTHS = np.array([[4, 2], [3, 6]])
SECONDS = {
    "time/rollout": 4.0,
    "time/reward": 1.0,
    "time/score": 1.0,
    "time/update": 8.0,
    "time/step": 16.0,
}
PEAK = 1e6


@pytest.fixture
def shares(tiny_policy, meshes_of, monkeypatch):
    monkeypatch.setattr(utilization, "_peak_rate", lambda mesh, dtype: PEAK)

    def make(sampled=None, **changes):
        model, mesh = tiny_policy.model.config, meshes_of(1, 1, 1)
        config = TrainConfig(model="tiny", **changes)
        work = (PROMPTS, LENGTHS)
        return Utilization(model, config, mesh).metrics(sampled or work, work, SECONDS)

    return make


def test_shares_are_operations_over_seconds_and_peak(shares, tiny_policy):
    forward = forward_flops(tiny_policy.model.config, PROMPTS, LENGTHS).total
    unit = forward / PEAK
    objective = ObjectiveConfig(kl_coef=0.1)
    # Reference and old policy are scored; two passes of updates; score takes as long
    # as the rewards that run beside it.
    assert shares(objective=objective, updates_per_rollout=2) == pytest.approx(
        {
            "mfu/rollout": unit / 4,
            "mfu/score": 2 * unit / 2,
            "mfu/update": 2 * 3 * unit / 8,
            "mfu/step": 9 * unit / 16,
        }
    )


def test_what_was_sampled_and_left_out_counts_for_the_rollout(shares):
    objective = ObjectiveConfig(kl_coef=0.1)
    twice = np.tile(PROMPTS, 2), np.tile(LENGTHS, (2, 1))
    plain, more = shares(objective=objective), shares(twice, objective=objective)
    assert more["mfu/rollout"] == pytest.approx(2 * plain["mfu/rollout"])
    for name in ("mfu/score", "mfu/update"):
        assert more[name] == plain[name]
    # One share in five is the rollout's: forward, reference, and a gradient of three.
    assert more["mfu/step"] == pytest.approx(6 / 5 * plain["mfu/step"])


def test_without_a_scoring_pass_there_is_no_share_of_it(shares):
    names = {"mfu/rollout", "mfu/update", "mfu/step"}
    assert shares(objective=ObjectiveConfig(kl_coef=0.0)).keys() == names


def test_frozen_weights_have_no_gradient(shares):
    objective = ObjectiveConfig(kl_coef=0.1)
    whole, adapters = (
        shares(objective=objective, lora=LoraConfig(rank=rank)) for rank in (None, 4)
    )
    assert 2 / 3 < adapters["mfu/update"] / whole["mfu/update"] < 0.7


def test_scoring_after_rewards_is_timed_alone(shares):
    objective = ObjectiveConfig(kl_coef=0.1)
    beside = shares(objective=objective)
    after = shares(objective=dataclasses.replace(objective, resample_limit=2))
    assert after["mfu/score"] == pytest.approx(2 * beside["mfu/score"])


def test_known_devices_have_their_makers_rate_and_others_are_measured(meshes_of):
    assert known_flops("TPU v5 lite") == 197e12
    assert known_flops("NVIDIA H100 80GB HBM3") == 989e12
    # Slower than the module of the same name.
    assert known_flops("NVIDIA H100 PCIe") is None
    one, eight = (_peak_rate(meshes_of(1, n, 1), "float32") for n in (1, 8))
    # Eight devices of one CPU are still that CPU.
    assert one == eight > 1e8
