"""Adapters: nothing at first, what training makes of them, and gone after a merge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.decoder import Decoder
from grpo_jax.models.lora import init_lora, lora_axes, merge_lora

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def adapted(full):
    config = dataclasses.replace(full.model.config, lora_scale=2.0)
    return dataclasses.replace(full, model=Decoder(config))


@pytest.fixture(scope="module")
def score(adapted):
    model = adapted.model
    inputs = (adapted.prompts, adapted.lengths, adapted.completions)
    return jax.jit(
        lambda variables: model.apply(variables, *inputs, method=model.score)
    )


def trained(adapters):
    random = np.random.default_rng(5)
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape).astype("float32"),
        adapters,
    )


def test_fresh_adapters_change_nothing(adapted, score):
    adapters = init_lora(adapted.model, jax.random.key(1), rank=2, targets=TARGETS)
    base = score(adapted.variables)
    # Up to the order of rounding, for it is another program.
    with_adapters = score({**adapted.variables, "lora": adapters})
    np.testing.assert_allclose(with_adapters, base, atol=1e-5)


def test_merged_parameters_compute_what_adapters_did(adapted, score):
    fresh = init_lora(adapted.model, jax.random.key(1), rank=2, targets=TARGETS)
    adapters = trained(fresh)
    with_adapters = score({**adapted.variables, "lora": adapters})
    merged = merge_lora(adapted.params, adapters, adapted.model.config)
    np.testing.assert_allclose(score({"params": merged}), with_adapters, atol=5e-5)
    assert jnp.abs(with_adapters - score(adapted.variables)).max() > 0.1
    # The base is untouched.
    kernel = adapted.params["layers"]["attn"]["q"]["kernel"]
    assert jnp.abs(kernel - merged["layers"]["attn"]["q"]["kernel"]).max() > 0.01


def test_only_targets_get_adapters_with_their_shapes_and_axes(adapted):
    adapters = init_lora(
        adapted.model, jax.random.key(1), rank=3, targets=("k", "down")
    )
    shapes = jax.tree.map(jnp.shape, adapters)
    axes = lora_axes(adapted.model, adapters)
    assert shapes == {
        "layers": {
            "attn": {"k": {"a": (3, 32, 3), "b": (3, 3, 16)}},
            "mlp": {"down": {"a": (3, 48, 3), "b": (3, 3, 32)}},
        }
    }
    assert axes == {
        "layers": {
            "attn": {
                "k": {"a": ("layers", "embed", None), "b": ("layers", None, "kv_heads")}
            },
            "mlp": {
                "down": {"a": ("layers", "mlp", None), "b": ("layers", None, "embed")}
            },
        }
    }


def test_the_draw_of_a_target_does_not_depend_on_the_others(adapted):
    key = jax.random.key(1)
    one = init_lora(adapted.model, key, rank=2, targets=("up",))
    many = init_lora(adapted.model, key, rank=2, targets=("q", "up"))
    up = one["layers"]["mlp"]["up"]["a"]
    np.testing.assert_array_equal(up, many["layers"]["mlp"]["up"]["a"])
    # Uniform in +-1/sqrt(32) = +-0.177, standard deviation 0.177 / sqrt(3) = 0.102.
    assert float(jnp.abs(up).max()) <= 32**-0.5
    assert abs(float(up.std()) - 0.102) < 0.02


def test_adapters_without_a_scale_are_refused(full):
    adapters = init_lora(full.model, jax.random.key(1), rank=2, targets=("q",))
    with pytest.raises(ValueError, match="lora_scale is None"):
        inputs = (full.prompts, full.lengths)
        variables = {**full.variables, "lora": adapters}
        full.model.apply(variables, *inputs, method=full.model.forward)
    with pytest.raises(ValueError, match="lora_scale is None"):
        merge_lora(full.params, adapters, full.model.config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "targets": ("q", "embed")}, "embed"),
        ({"rank": 2, "targets": ()}, "must be some of"),
        ({"rank": 0, "targets": ("q",)}, "rank must be at least 1"),
    ],
)
def test_impossible_adapters_are_refused(full, options, message):
    with pytest.raises(ValueError, match=message):
        init_lora(full.model, jax.random.key(1), **options)
