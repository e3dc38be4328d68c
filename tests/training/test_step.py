"""The step: the same numbers however the work is cut, and none that is not finite."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from grpo_jax.config import PRESETS, ObjectiveConfig, OptimizerConfig
from grpo_jax.models.decoder import abstract_params, param_axes
from grpo_jax.models.packing import pack
from grpo_jax.objective import (
    chunked_logprobs,
    group_softmax_weights,
    weighted_likelihood_loss,
)
from grpo_jax.parallel import mesh as meshes
from grpo_jax.training import _like_lengths
from grpo_jax.training._like_lengths import like_lengths
from grpo_jax.training._microbatches import microbatches
from grpo_jax.training.advantages import advantages_from_rewards
from grpo_jax.training.compiled import compile_train_step
from grpo_jax.training.state import make_train_state
from grpo_jax.training.step import (
    make_train_step,
    policy_logprobs,
    score_batch,
)

# Keeps the gradient as it is in its state.
GRADIENT = optax.trace(decay=0.0)
EVERYTHING = {
    "kl_coef": 0.1,
    "entropy_coef": 0.05,
    "dual_clip": 3.0,
    "sampler_correction_cap": 1.5,
}


def gradient_of(model, params, batch, config):
    """The gradient of a step and its metrics."""
    step = make_train_step(model, GRADIENT, config)
    state, metrics = jax.jit(step)(make_train_state(params, GRADIENT), batch)
    return state.opt_state.trace, metrics


@pytest.mark.parametrize(
    ("mode", "level", "sizes"),
    [
        ("sequence_mean", "token", (8, 4, 2)),
        ("sequence_sum", "sequence", (2,)),
        ("token_mean", "token", (2,)),
        ("fixed_length", "sequence", (4,)),
    ],
)
def test_microbatches_change_nothing(mode, level, sizes, bigram, tools, assert_close):
    # Two groups, one group, half of a group; rows have different lengths.
    model, params = bigram
    objective = ObjectiveConfig(aggregation=mode, ratio_level=level, **EVERYTHING)
    batch = tools.make_batch()
    whole = gradient_of(model, params(), batch, tools.make_config(objective=objective))
    for size in sizes:
        config = tools.make_config(objective=objective, microbatch_size=size)
        assert_close(gradient_of(model, params(), batch, config), whole)


def test_microbatches_of_the_decoder_change_nothing(tiny_policy, tools, assert_close):
    batch = tools.make_batch(vocab=256)
    given = [
        gradient_of(
            tiny_policy.model,
            tiny_policy.params,
            batch,
            tools.make_config(microbatch_size=size),
        )
        for size in (None, 2)
    ]
    assert_close(given[1], given[0], rtol=5e-5)


@pytest.mark.parametrize("size", [None, 16, 8, 4, 2, 1])
def test_microbatches_hold_each_completion_once_with_its_prompt(size, tools):
    batch = tools.make_batch()
    # What is in a completion tells its prompt and its place in the group.
    numbers = 10 * jnp.arange(4)[:, None] + jnp.arange(4)[None]
    batch = batch.replace(
        prompt_lengths=jnp.arange(4), advantages=numbers.astype(jnp.float32)
    )
    parts, _ = microbatches(batch, size)
    count, rows, group = parts.advantages.shape
    assert count * rows * group == 16 and rows * group == min(size or 16, 16)
    assert sorted(parts.advantages.reshape(-1).tolist()) == sorted(
        numbers.reshape(-1).tolist()
    )
    prompt = np.asarray(parts.advantages) // 10
    expected = np.broadcast_to(parts.prompt_lengths[..., None], prompt.shape)
    np.testing.assert_array_equal(prompt, expected)


def test_a_microbatch_takes_every_so_many_th_prompt(tools):
    # So that each lies on all devices of a mesh, as the batch does.
    batch = tools.make_batch().replace(prompt_lengths=jnp.arange(4))
    np.testing.assert_array_equal(
        microbatches(batch, 8)[0].prompt_lengths, [[0, 2], [1, 3]]
    )


def test_the_step_is_the_same_without_jit(bigram, tools, assert_close):
    model, params = bigram
    config = tools.make_config(microbatch_size=8)
    step = make_train_step(model, GRADIENT, config)
    plain = step(make_train_state(params(), GRADIENT), tools.make_batch())
    jitted = jax.jit(step)(make_train_state(params(), GRADIENT), tools.make_batch())
    assert_close(plain, jitted)


@pytest.mark.parametrize("size", [None, 2])
def test_pmap_is_jit(size, bigram, tools, assert_close, meshes_of):
    model, params = bigram
    config = tools.make_config(prompts_per_step=8, microbatch_size=size)
    step = make_train_step(model, GRADIENT, config)
    batch = tools.make_batch(prompts=8)
    mapped = compile_train_step(step, meshes_of(8, 1, 1), mode="pmap")
    state, metrics = mapped(make_train_state(params(), GRADIENT), batch)
    expected = jax.jit(step)(make_train_state(params(), GRADIENT), batch)
    assert_close((state, metrics), expected)
    # What it returns is the next step's input.
    again, _ = mapped(state, batch)
    assert int(again.step) == 2


def packed(batch, size=None, shards=1):
    """The batch with the rows that the learner would take."""
    how = {"microbatch_size": size, "shards": shards}
    rows = pack(np.asarray(batch.mask), batch.prompts.shape[1], **how)
    assert rows.source.size < 0.9 * batch.mask.size
    return batch.replace(packing=jax.tree.map(jnp.asarray, rows))


def sorted_by_length(batch, size, shards=1):
    """The batch with microbatches of like length."""
    how = {"minibatches": 1, "microbatch_size": size, "shards": shards}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_like_lengths, "_SHORTEST", 8)
        order, share = like_lengths(
            np.asarray(batch.mask), batch.prompts.shape[1], **how
        )
    assert share < 0.9
    return batch.replace(like_lengths=jax.tree.map(jnp.asarray, order))


FORMS = {
    "own rows": lambda batch, size, shards=1: batch,
    "shared rows": packed,
    "like lengths": sorted_by_length,
}


def adam_state(policy, mesh, tx):
    axes, shapes = param_axes(policy.model), abstract_params(policy.model)
    shardings = meshes.parameter_shardings(axes, shapes, mesh)
    # Through NumPy: the state is donated, the parameters of the tests must stay.
    params = jax.tree.map(np.asarray, policy.params)
    return make_train_state(jax.device_put(params, shardings), tx)


@functools.cache
def decoder_step(model, tx, config):
    return make_train_step(model, tx, config)


TX = optax.adam(1e-3)


@pytest.fixture(scope="module")
def on_one_device(tiny_policy, tools, meshes_of):
    """The state and metrics after a step on one device."""
    return step_on(meshes_of(1, 1, 1), tiny_policy, tools)[:2]


def step_on(mesh, policy, tools, form="own rows"):
    config = tools.make_config(prompts_per_step=8, microbatch_size=16)
    batch = tools.make_batch(prompts=8, length=21, vocab=256)
    # One long completion in a group of each device, not always in the same microbatch.
    long = np.isin(np.arange(8)[:, None] % 4, (0, 3)) & (np.arange(4) == 1)
    most = np.where(long, 21, 7)[..., None]
    batch = batch.replace(mask=batch.mask & (np.arange(21) < most))
    batch = FORMS[form](batch, 16, shards=meshes.batch_shards(mesh))
    step = compile_train_step(decoder_step(policy.model, TX, config), mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
        state = adam_state(policy, mesh, TX)
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        given = meshes.to_mesh(mesh, jax.tree.map(np.asarray, batch))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a donation that is not used
            new, metrics = step(state, given)
            jax.block_until_ready(new)
        copied = jax.tree.map(jnp.copy, new)
        with jax.no_tracing():
            step(copied, given)
        donated = [leaf.is_deleted() for leaf in jax.tree.leaves(state)]
    return new, metrics, before, donated


@pytest.mark.parametrize("form", FORMS)
def test_a_mesh_changes_nothing(
    form, tiny_policy, tools, on_one_device, assert_close, meshes_of
):
    mesh = meshes_of(2, 2, 2)
    state, metrics, shardings, donated = step_on(mesh, tiny_policy, tools, form)
    expected_state, expected_metrics = on_one_device
    assert_close(metrics, expected_metrics, rtol=1e-4)
    # Adam's first moments are the gradients, scaled; its update forgets their size.
    assert_close(state.opt_state[0].mu, expected_state.opt_state[0].mu, rtol=1e-4)
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
        for leaf, param in zip(
            jax.tree.leaves(moment), jax.tree.leaves(state.params), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)
    assert all(donated)


def test_a_second_batch_of_the_same_shape_compiles_nothing(bigram, tools, meshes_of):
    model, params = bigram
    step = make_train_step(model, TX, tools.make_config())
    compiled = compile_train_step(step, meshes_of(1, 1, 1))
    state, _ = compiled(make_train_state(params(), TX), tools.make_batch())
    second = tools.make_batch(seed=1)
    with jax.no_tracing():
        state, _ = compiled(state, second)
    assert int(state.step) == 2


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("advantages", np.nan),
        ("advantages", np.inf),
        ("advantages", -np.inf),
        ("old_logp", np.nan),
        ("ref_logp", np.nan),
        ("ref_logp", -np.inf),
    ],
)
def test_numbers_that_are_not_finite_leave_every_bit_of_the_state(
    field, bad, bigram, tools
):
    model, params = bigram
    step, start = not_finite_step(model), make_train_state(params(), TX)
    start, metrics = step(start, tools.make_batch())
    assert metrics["update_skipped"] == 0.0 and int(start.step) == 1
    batch = tools.make_batch()
    where = (1, 1) if field == "advantages" else (1, 1, 0)
    assert batch.mask[1, 1, 0]
    batch = batch.replace(**{field: vars(batch)[field].at[where].set(bad)})
    state, metrics = step(start, batch)
    assert metrics["update_skipped"] == 1.0
    for one, other in zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_an_infinite_ratio_is_bounded(bad, bigram, tools):
    model, params = bigram
    batch = tools.make_batch()
    batch = batch.replace(old_logp=batch.old_logp.at[1, 1, 0].set(bad))
    state, metrics = not_finite_step(model)(make_train_state(params(), TX), batch)
    assert metrics["update_skipped"] == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@functools.cache
def not_finite_step(model):
    from grpo_jax.config import TrainConfig

    config = TrainConfig(
        model="tiny", prompts_per_step=4, group_size=4, max_new_tokens=7
    )
    return jax.jit(make_train_step(model, TX, config))


def test_what_is_masked_may_hold_anything(bigram, tools, assert_close):
    model, params = bigram
    batch = tools.make_batch()
    poison = lambda values: jnp.where(batch.mask, values, jnp.nan)  # noqa: E731
    names = ("old_logp", "ref_logp", "sampler_logp")
    poisoned = batch.replace(**{name: poison(vars(batch)[name]) for name in names})
    step = not_finite_step(model)
    state = make_train_state(params(), TX)
    assert_close(step(state, poisoned), step(state, batch))


def test_a_batch_without_tokens_has_no_gradient(bigram, tools):
    model, params = bigram
    batch = tools.make_batch()
    batch = batch.replace(mask=jnp.zeros_like(batch.mask))
    state, metrics = not_finite_step(model)(make_train_state(params(), TX), batch)
    assert metrics["loss"] == 0.0 and metrics["grad_norm"] == 0.0
    assert metrics["update_skipped"] == 0.0
    for one, other in zip(
        jax.tree.leaves(params()), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_without_old_logp_the_step_is_that_of_the_policy_s_own(
    bigram, tools, assert_close
):
    model, params = bigram
    config = tools.make_config()
    batch = tools.make_batch()
    own = policy_logprobs(
        model,
        {"params": params()},
        batch.prompts,
        batch.prompt_lengths,
        batch.completions,
        temperature=config.sampling.temperature,
    ).logp
    implicit = gradient_of(model, params(), batch.replace(old_logp=None), config)
    explicit = gradient_of(model, params(), batch.replace(old_logp=own), config)
    assert_close(implicit, explicit)
    assert implicit[1]["importance_ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    assert implicit[1]["clip_ratio/region_mean"] == 0.0


def test_the_difference_to_the_sampler_is_its_largest_over_counted_tokens(
    bigram, tools
):
    model, params = bigram
    config = tools.make_config(microbatch_size=4)
    batch = tools.make_batch()
    own = policy_logprobs(
        model,
        {"params": params()},
        batch.prompts,
        batch.prompt_lengths,
        batch.completions,
        temperature=0.9,
    ).logp
    far = jnp.where(batch.mask, own, own + 9.0).at[2, 1, 0].add(0.25)
    _, metrics = gradient_of(model, params(), batch.replace(sampler_logp=far), config)
    assert metrics["sampler_logp_diff/max"] == pytest.approx(0.25, abs=1e-5)


def test_the_likelihood_preset_is_the_weighted_likelihood_loss(
    bigram, tools, assert_close
):
    model, params = bigram
    objective = ObjectiveConfig.preset("likelihood")
    config = tools.make_config(objective=objective)
    batch = tools.make_batch()
    # Every completion has a token, as sampled ones do: then G N sequences weigh
    # G times what N prompts do.
    batch = batch.replace(mask=batch.mask.at[0, 0, 0].set(True))
    rewards = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), jnp.float32)
    valid = jnp.ones((4, 4), bool).at[1, :2].set(False)  # two without a reward
    weights = group_softmax_weights(rewards, valid=valid)

    def simple(params):
        hidden = model.apply(
            {"params": params},
            batch.prompts,
            batch.prompt_lengths,
            batch.completions,
            method=model.score,
        )
        scored = chunked_logprobs(
            hidden, params["out"], batch.completions, temperature=0.9
        )
        return weighted_likelihood_loss(scored.logp, batch.mask, weights).value()

    advantages = advantages_from_rewards(rewards, valid, objective)
    np.testing.assert_allclose(advantages, 4 * weights, rtol=1e-5)
    batch = batch.replace(advantages=advantages, old_logp=None, ref_logp=None)
    gradient, metrics = gradient_of(model, params(), batch, config)
    value, expected = jax.value_and_grad(simple)(params())
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert_close(gradient, expected)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_step_with_finite_numbers(name, bigram, tools):
    model, params = bigram
    objective = ObjectiveConfig.preset(name)
    rewards = jnp.array([[0.0, 1, 2, 3], [1, 1, 1, 1], [0, 0, 0, 5], [-1, 1, 0, 0]])
    valid = jnp.ones((4, 4), bool).at[3, 0].set(False)
    advantages = advantages_from_rewards(rewards, valid, objective)
    assert np.isfinite(advantages).all()
    assert advantages[3, 0] == 0.0
    if objective.surrogate != "likelihood" or objective.advantage != "softmax":
        np.testing.assert_array_equal(advantages[1], 0.0)
        np.testing.assert_allclose(advantages.sum(axis=1), 0.0, atol=1e-5)
    batch = tools.make_batch().replace(advantages=advantages)
    if objective.kl_coef == 0:
        batch = batch.replace(ref_logp=None)
    config = tools.make_config(objective=objective)
    gradient, metrics = gradient_of(model, params(), batch, config)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["update_skipped"] == 0.0 and metrics["grad_norm"] > 0.0
    assert ("kl" in metrics) == (objective.kl_coef != 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_gradients_are_clipped_but_reported_whole(bigram, tools):
    from grpo_jax.training.optimizer import make_optimizer

    model, params = bigram
    batch = tools.make_batch()
    _, expected = gradient_of(model, params(), batch, tools.make_config())
    tx = make_optimizer(OptimizerConfig(max_grad_norm=1e-3), total_updates=5)
    step = make_train_step(model, tx, tools.make_config())
    _, metrics = jax.jit(step)(make_train_state(params(), tx), batch)
    assert metrics["grad_norm"] == pytest.approx(float(expected["grad_norm"]), rel=1e-5)
    assert metrics["grad_norm"] > 1e-3


def test_a_wrong_mode_and_a_wrong_count_are_refused(bigram, tools, meshes_of):
    model, params = bigram
    step = make_train_step(model, GRADIENT, tools.make_config())
    with pytest.raises(ValueError, match="mode must be 'jit' or 'pmap', got 'x'"):
        compile_train_step(step, meshes_of(1, 1, 1), mode="x")
    mapped = compile_train_step(step, meshes_of(8, 1, 1), mode="pmap")
    with pytest.raises(ValueError, match="4 prompts cannot be split over 8.* use 8"):
        mapped(make_train_state(params(), GRADIENT), tools.make_batch())


@pytest.fixture(scope="module")
def ragged(tools):
    """Lengths that leave rows mostly empty, and given tokens in one of them."""
    batch = tools.make_batch(length=25, vocab=256)
    lengths = np.random.default_rng(1).integers(1, 9, batch.mask.shape[:2])
    lengths[1, 2], lengths[0, 0], lengths[3] = 25, 0, 0
    mask = np.arange(25) < lengths[..., None]
    mask[1, 2, 4:9] = False
    return batch.replace(mask=jnp.asarray(mask))


@pytest.fixture(scope="module")
def of_own_rows(tiny_policy, tools, ragged):
    objective = ObjectiveConfig(**EVERYTHING)
    config = tools.make_config(max_new_tokens=25, objective=objective)
    return gradient_of(tiny_policy.model, tiny_policy.params, ragged, config)


@pytest.mark.parametrize("size", [None, 8, 2])
def test_shared_rows_change_nothing(
    size, tiny_policy, tools, ragged, of_own_rows, assert_close
):
    objective = ObjectiveConfig(**EVERYTHING)
    config = tools.make_config(
        max_new_tokens=25, objective=objective, microbatch_size=size
    )
    batch = packed(ragged, size)
    found = gradient_of(tiny_policy.model, tiny_policy.params, batch, config)
    assert_close(found, of_own_rows, rtol=5e-5)


@pytest.mark.parametrize(("prompts", "size"), [(4, 8), (4, 2), (1, 2)])
def test_microbatches_of_like_length_change_nothing(
    prompts, size, bigram, tools, ragged, assert_close
):
    model, params = bigram
    objective = ObjectiveConfig(**EVERYTHING)
    config = tools.make_config(
        max_new_tokens=25, objective=objective, microbatch_size=size
    )
    # Of one prompt all completions are scored at once, though they are sorted.
    batch = jax.tree.map(lambda leaf: leaf[1 : 1 + prompts], ragged)
    if prompts > 1:
        batch = ragged
    batch = batch.replace(completions=batch.completions % 16)
    expected = gradient_of(model, params(), batch, config)
    batch = sorted_by_length(batch, size)
    assert_close(gradient_of(model, params(), batch, config), expected)
    scores = score_batch(model, config, {"params": params()}, batch)
    whole = score_batch(
        model, config, {"params": params()}, batch.replace(like_lengths=None)
    )
    assert_close(*(jnp.where(batch.mask, x, 0.0) for x in (scores, whole)))
    if prompts == 1:
        return
    # What no microbatch computes is 0.
    assert float(jnp.abs(jnp.where(batch.mask, 0.0, scores)).sum()) < float(
        jnp.abs(jnp.where(batch.mask, 0.0, whole)).sum()
    )
