"""Models with memories beside attention: gradients, adapters, periods, sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models._hybrid import _period
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.models.lora import init_lora, merge_lora


def gradient(model, tiny, lora=None):
    """Of a fixed projection of the hidden states of `score`, in all variables."""
    weights = np.random.default_rng(1).standard_normal((3, 2, 5, 32))

    def loss(variables):
        args = tiny.prompts, tiny.lengths, tiny.completions
        hidden = model.apply(variables, *args, method=model.score)
        return jnp.sum(hidden * weights), hidden

    variables = tiny.variables if lora is None else {**tiny.variables, "lora": lora}
    return jax.jit(jax.grad(loss, has_aux=True))(variables)


@pytest.fixture(scope="module")
def plain_gradient(hybrid):
    return gradient(hybrid.model, hybrid)


def assert_close(one, other, tolerance=3e-5):
    for (path, a), b in zip(
        jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        scale = max(float(jnp.abs(b).max()), 1e-6)
        error = float(jnp.abs(a - b).max()) / scale
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"


def test_score_has_the_gradient_of_a_plain_pass(hybrid, plain_gradient):
    """Every sequence on its own, from its first token on, without a shared state."""
    model = hybrid.model
    weights = np.random.default_rng(1).standard_normal((3, 2, 5, 32))
    rows = np.zeros((3, 2, 11), np.int32)
    for i, length in enumerate(np.asarray(hybrid.lengths)):
        rows[i, :, :length] = np.asarray(hybrid.prompts)[i, None, :length]
        rows[i, :, length : length + 5] = np.asarray(hybrid.completions)[i]
    at = np.asarray(hybrid.lengths)[:, None] - 1 + np.arange(5)[None]
    at = jnp.asarray(np.repeat(at[:, None], 2, axis=1)[..., None])

    def loss(variables):
        tokens, lengths = rows.reshape(6, 11), jnp.full(6, 11)
        hidden = model.apply(variables, tokens, lengths, method=model.forward)
        hidden = jnp.take_along_axis(hidden.reshape(3, 2, 11, 32), at, axis=2)
        return jnp.sum(hidden * weights), hidden

    expected = jax.jit(jax.grad(loss, has_aux=True))(hybrid.variables)
    # The gradient of the convolution is a small difference: the two forms of the rule
    # differ by 2e-5 of it in the same pass.
    assert_close(plain_gradient, expected, tolerance=2e-4)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))


def test_recomputing_layers_changes_nothing_but_what_is_kept(hybrid, plain_gradient):
    config = dataclasses.replace(hybrid.model.config, remat="layer")
    assert_close(gradient(Decoder(config), hybrid), plain_gradient)

    def kept(model):
        args = hybrid.prompts, hybrid.lengths, hybrid.completions
        score = lambda v: model.apply(v, *args, method=model.score)  # noqa: E731
        pullback = jax.eval_shape(lambda v: jax.vjp(score, v)[1], hybrid.variables)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept(Decoder(config)) < kept(hybrid.model)


def test_merged_adapters_compute_what_they_did(hybrid):
    config = dataclasses.replace(hybrid.model.config, lora_scale=2.0)
    model = Decoder(config)
    targets = ("q", "o", "up", "delta_qkv", "delta_z", "delta_a", "delta_o")
    adapters = init_lora(model, jax.random.key(1), rank=2, targets=targets)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    grads, with_adapters = gradient(model, hybrid, adapters)
    merged = merge_lora(hybrid.params, adapters, config)
    one = dataclasses.replace(hybrid, params=merged)
    np.testing.assert_allclose(gradient(model, one)[1], with_adapters, atol=5e-5)
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(grads["lora"]))


def test_targets_that_a_model_does_not_have_are_refused(plain):
    with pytest.raises(ValueError, match="lora targets must be some of"):
        init_lora(plain.model, jax.random.key(0), rank=2, targets=("delta_qkv",))


def test_kinds_of_layers_repeat_after_a_period():
    assert _period((True, True, False) * 3) == 3
    assert _period((True, False, False, True)) == 4
    assert _period((True, False)) == 2


def test_slots_may_be_stacks_where_prompts_are_not(hybrid, in_layers):
    """As on a TPU: what separate layers wrote goes back into the stacks."""
    cache = hybrid.model.init_cache(2, 2, 3)
    again = cache.of_layers(*in_layers(cache).arrays)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    assert shapes(again) == shapes(cache)
    apart = in_layers(cache).of_layers(*in_layers(cache).arrays)
    assert isinstance(apart.keys, tuple) and isinstance(apart.state.memory, tuple)


def test_fresh_parameters_decay_as_those_of_the_models(hybrid):
    params = jax.jit(lambda key: init_params(hybrid.model, key))(jax.random.key(7))
    delta = params["layers"]["delta"]
    rates = jnp.exp(delta["log_rate"])
    assert rates.shape == (2, 4) and jnp.all((rates > 0.009) & (rates < 16.01))
    np.testing.assert_array_equal(delta["rate_bias"], 1.0)
    np.testing.assert_array_equal(delta["norm"]["scale"], 1.0)
    assert abs(float(delta["qkv"]["kernel"].std()) - 0.02) < 0.005
    # Each layer draws its own.
    assert jnp.abs(delta["qkv"]["kernel"][0] - delta["qkv"]["kernel"][1]).max() > 0.01
