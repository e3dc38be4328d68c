"""Several updates per rollout, and the reference policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import ObjectiveConfig, OptimizerConfig
from grpo_jax.objective import standardized_advantages
from grpo_jax.rollout.rollout import Rollout
from grpo_jax.training.learner import Learner
from grpo_jax.training.step import policy_logprobs, score_batch

REWARDS = np.array([[0.0, 1, 2, 3], [1, 1, 1, 1], [0, 0, 0, 5], [-1, 1, 0, 0]])


def make_rollout(batch, **changes):
    lengths = np.asarray(batch.mask.sum(axis=-1))
    fields = {
        "rows": [{"prompt": "x"}] * len(lengths),
        "prompts": np.asarray(batch.prompts),
        "prompt_lengths": np.asarray(batch.prompt_lengths),
        "tokens": np.asarray(batch.completions),
        "logp": np.asarray(batch.sampler_logp),
        "lengths": lengths,
        "finished": lengths < 5,
        "mask": np.asarray(batch.mask),
        "completions": [["y"] * lengths.shape[1]] * len(lengths),
        "keep": np.ones(len(lengths), bool),
        "rewards": REWARDS,
    }
    return Rollout(**(fields | changes))


@pytest.fixture
def make_learner(bigram, tools, meshes_of):
    model, params = bigram

    def make(**changes):
        changes = {"optimizer": OptimizerConfig(learning_rate=0.05)} | changes
        config = tools.make_config(**changes)
        return Learner(model, params(), config, meshes_of(1, 1, 1))

    return make


@pytest.fixture
def rollout(tools):
    return make_rollout(tools.make_batch())


def one_step(learner, rollout):
    batch = learner.with_advantages(learner.score(rollout), rollout)
    return batch, learner.update(batch)


def test_the_first_kl_is_zero_and_later_ones_are_not(make_learner, rollout):
    learner = make_learner()
    kl = [one_step(learner, rollout)[1]["kl"] for _ in range(3)]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[2] > kl[1] > 1e-5


def test_a_refreshed_reference_is_the_policy_and_stays_where_it_was(
    make_learner, rollout
):
    learner = make_learner()
    one_step(learner, rollout)
    learner.refresh_reference()
    frozen = jax.tree.map(np.asarray, learner.reference_on_devices()["params"])
    assert one_step(learner, rollout)[1]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert one_step(learner, rollout)[1]["kl"] > 1e-5
    # Its arrays are its own: the state's were donated to the updates.
    for one, other in zip(
        jax.tree.leaves(learner.reference_on_devices()["params"]),
        jax.tree.leaves(frozen),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_without_a_penalty_no_reference_is_held(make_learner, rollout):
    learner = make_learner(objective=ObjectiveConfig(kl_coef=0.0))
    assert not learner.has_reference
    batch, metrics = one_step(learner, rollout)
    assert batch.ref_logp is None and "kl" not in metrics
    learner.refresh_reference()
    assert not learner.has_reference


def test_a_single_update_is_on_policy(make_learner, rollout):
    batch, metrics = one_step(make_learner(), rollout)
    assert batch.old_logp is None
    assert metrics["importance_ratio/mean"] == pytest.approx(1.0, abs=1e-6)


def test_old_log_probs_are_those_of_the_policy_that_met_the_rollout(
    make_learner, rollout, bigram
):
    model, params = bigram
    learner = make_learner(updates_per_rollout=3, minibatches=2)
    batch = learner.with_advantages(learner.score(rollout), rollout)
    expected = policy_logprobs(
        model,
        {"params": params()},
        rollout.prompts,
        rollout.prompt_lengths,
        jnp.asarray(rollout.tokens),
        temperature=0.9,
    ).logp
    np.testing.assert_allclose(batch.old_logp, expected, rtol=1e-5)
    ratios, taken = [], []
    step = learner._step

    def spy(state, part, base):
        taken.append(np.asarray(part.old_logp))
        state, metrics = step(state, part, base)
        ratios.append(float(metrics["importance_ratio/mean"]))
        return state, metrics

    learner._step = spy
    metrics = learner.update(batch)
    # Minibatches take every second prompt; each pass sees the same old log-probs.
    for number, part in enumerate(taken):
        np.testing.assert_array_equal(part, batch.old_logp[number % 2 :: 2])
    assert ratios[0] == pytest.approx(1.0, abs=1e-6)
    assert all(abs(ratio - 1.0) > 1e-4 for ratio in ratios[1:])
    assert metrics["importance_ratio/mean"] == pytest.approx(np.mean(ratios))
    assert int(learner.state_on_devices().step) == 6


def test_the_rate_told_is_that_of_the_last_update(make_learner, rollout):
    optimizer = OptimizerConfig(learning_rate=0.1, schedule="linear")
    learner = make_learner(optimizer=optimizer, steps=2, updates_per_rollout=2)
    # Rates of the four updates: 0.1, 0.075, 0.05, 0.025.
    rates = [one_step(learner, rollout)[1]["learning_rate"] for _ in range(2)]
    np.testing.assert_allclose(rates, [0.075, 0.025], rtol=1e-5)


def test_the_difference_to_the_sampler_is_that_of_the_first_update(
    make_learner, rollout, bigram
):
    model, params = bigram
    own = policy_logprobs(
        model,
        {"params": params()},
        rollout.prompts,
        rollout.prompt_lengths,
        jnp.asarray(rollout.tokens),
        temperature=0.9,
    ).logp
    exact = dataclasses.replace(rollout, logp=np.asarray(own))
    learner = make_learner(updates_per_rollout=3)
    _, metrics = one_step(learner, exact)
    assert metrics["sampler_logp_diff/max"] < 1e-5


@pytest.mark.parametrize(("updates", "minibatches"), [(2, 1), (1, 2)])
def test_the_difference_to_the_sampler_is_seen_wherever_it_is(
    updates, minibatches, make_learner, rollout, bigram
):
    model, params = bigram
    learner = make_learner(updates_per_rollout=updates, minibatches=minibatches)
    config = learner._config
    scored = score_batch(model, config, {"params": params()}, learner.score(rollout))
    for prompt in range(2):  # each in a minibatch of its own, if there are two
        logp = np.array(scored)
        logp[prompt, 1, 0] -= 5.0
        learner = make_learner(updates_per_rollout=updates, minibatches=minibatches)
        _, metrics = one_step(learner, dataclasses.replace(rollout, logp=logp))
        assert metrics["sampler_logp_diff/max"] == pytest.approx(5.0, rel=1e-4)


@pytest.mark.parametrize("size", [16, 8, 4, 2])
def test_scores_do_not_depend_on_the_microbatch(size, bigram, tools):
    model, params = bigram
    batch, variables = tools.make_batch(), {"params": params()}
    whole = score_batch(model, tools.make_config(), variables, batch)
    config = tools.make_config(microbatch_size=size)
    parts = score_batch(model, config, variables, batch)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_groups_that_do_not_count_do_not_enter_the_batch_s_deviation(
    make_learner, rollout
):
    objective = ObjectiveConfig(advantage="standardized", std_over="batch")
    learner = make_learner(objective=objective)
    counts = np.array([True, False, True, True])
    partial = dataclasses.replace(rollout, keep=counts)
    batch = learner.with_advantages(learner.score(partial), partial)
    expected = standardized_advantages(jnp.asarray(REWARDS[counts]), std_over="batch")
    np.testing.assert_allclose(batch.advantages[counts], expected, rtol=1e-5)
    np.testing.assert_array_equal(batch.advantages[1], 0.0)
    assert not batch.mask[1].any()


@pytest.fixture(scope="module")
def ragged(tools):
    """A rollout of which most places of the longest rows are empty."""
    batch = tools.make_batch(length=25, vocab=256)
    lengths = np.random.default_rng(1).integers(1, 9, batch.mask.shape[:2])
    lengths[1, 2] = 25
    mask = np.arange(25) < lengths[..., None]
    keep = np.array([True, True, False, True])
    return make_rollout(batch.replace(mask=mask), keep=keep)


def test_shared_rows_change_neither_scores_nor_updates(
    ragged, tiny_policy, tools, meshes_of, assert_close
):
    found = {}
    for packing in ("auto", "off"):
        config = tools.make_config(
            packing=packing, minibatches=2, max_new_tokens=25, microbatch_size=4
        )
        params = jax.tree.map(jnp.copy, tiny_policy.params)
        learner = Learner(tiny_policy.model, params, config, meshes_of(1, 1, 1))
        batch, metrics = one_step(learner, ragged)
        assert (batch.packing is None) == (packing == "off")
        scores = [jnp.where(batch.mask, x, 0) for x in (batch.old_logp, batch.ref_logp)]
        found[packing] = scores, metrics
        # The loss of a first update is a sum of advantages, which is 0.
        # So is the divergence from a policy that has hardly moved, but for rounding.
        for name in ("loss", "policy_loss", "kl"):
            assert metrics.pop(name) == pytest.approx(0.0, abs=1e-4)
        del metrics["time/update"]
    assert_close(found["auto"], found["off"], rtol=5e-5)


def test_completions_of_equal_length_have_a_row_each(tiny_policy, tools, meshes_of):
    batch = tools.make_batch(length=25, vocab=256)
    full = make_rollout(batch.replace(mask=jnp.ones_like(batch.mask)))
    config = tools.make_config(max_new_tokens=25)
    learner = Learner(tiny_policy.model, tiny_policy.params, config, meshes_of(1, 1, 1))
    assert learner.score(full).packing is None


def test_a_model_without_shared_rows_has_microbatches_of_like_length(
    make_learner, tools
):
    batch = tools.make_batch(length=64)
    lengths = np.random.default_rng(1).integers(1, 20, batch.mask.shape[:2])
    lengths[1, 2], lengths[3, 0] = 64, 40
    ragged = make_rollout(batch.replace(mask=np.arange(64) < lengths[..., None]))
    found = {}
    for packing in ("auto", "off"):
        learner = make_learner(packing=packing, max_new_tokens=64, microbatch_size=2)
        batch, metrics = one_step(learner, ragged)
        assert batch.packing is None
        assert (batch.like_lengths is None) == (packing == "off")
        scores = jnp.where(batch.mask, batch.ref_logp, 0)
        found[packing] = scores, batch.advantages, metrics.pop("kl"), learner.params
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6),
        *found.values(),
    )
