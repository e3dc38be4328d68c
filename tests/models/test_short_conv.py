"""Short convolutions: hand-computed values, their keys, names, adapters and plans."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import MeshConfig
from grpo_jax.models._hf_conv import plain_keys
from grpo_jax.models._short_conv import (
    ConvConfig,
    ConvInputs,
    advance,
    answers_in_rows,
    empty_state,
)
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.models.lora import adaptable, init_lora, merge_lora
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.flops import prefill_flops
from grpo_jax.weights._gguf_config import hf_config

CONFIG = ConvConfig(layers=(True, False), channels=2, groups=1, kernel=3)
HF = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention", "conv"],
}


def inputs_of(channels):
    kernel = jnp.array([[100.0, 1.0], [10.0, 1.0], [1.0, 1.0]])[:, None]
    return ConvInputs(channels=jnp.asarray(channels)[:, :, None], kernel=kernel)


def test_the_newest_token_has_the_last_tap_and_padding_changes_no_state():
    tokens = np.array([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [9.0, 9.0]]])
    state = empty_state(CONFIG, 1, "float32")
    out, state = advance(inputs_of(tokens), state, jnp.array([3]), config=CONFIG)
    assert out[0, :3, 0].tolist() == [[1, 1], [12, 3], [123, 6]]
    assert state.recent[0, 0].tolist() == [[2, 2], [3, 3]]
    out, _ = advance(inputs_of(np.full((1, 1, 2), 4.0)), state, None, config=CONFIG)
    assert out[0, 0, 0].tolist() == [234, 9]


def test_sequences_of_one_row_start_from_its_state():
    state = empty_state(CONFIG, 1, "float32")
    _, state = advance(
        inputs_of([[[2.0, 2.0], [3.0, 3.0]]]), state, None, config=CONFIG
    )
    row = np.array([4.0, 5.0, 6.0, 7.0])[None, :, None].repeat(2, axis=2)
    index = jnp.array([[0, 1, 0, 1]])
    out = answers_in_rows(inputs_of(row), state, index, config=CONFIG)
    assert out[0, :, 0, 0].tolist() == [234, 345, 236, 367]


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        ({"intermediate_size": 12288}, 8192),
        ({"intermediate_size": 8192, "block_ff_dim": 12288}, 8192),
        ({"block_ff_dim": 6656}, 4608),
        ({"block_ff_dim": 6656, "block_auto_adjust_ff_dim": False}, 6656),
        ({"block_ff_dim": 30, "block_ffn_dim_multiplier": None}, 20),
        ({"block_ff_dim": 30, "block_multiple_of": 7}, 21),
    ],
)
def test_the_width_of_the_mlp_is_adjusted_once(keys, width):
    hf = {k: v for k, v in HF.items() if k != "intermediate_size"} | keys
    config = ModelConfig.from_hf(hf)
    assert config.intermediate_size == width
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_layers_may_be_named_by_their_index():
    hf = {**HF, "layer_types": None, "full_attn_idxs": [1]}
    assert ModelConfig.from_hf(hf) == ModelConfig.from_hf(HF)
    assert plain_keys({**HF, "tie_embedding": False})["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "wrong",
    [
        {"conv_bias": True},
        {"layer_types": ["conv", "linear_attention", "conv"]},
        {"layer_types": ["conv"] * 3},
        {"layer_types": None, "full_attn_idxs": [7]},
        {"layer_types": None, "full_attn_idxs": 2},
        {"layer_types": None, "full_attn_idxs": [[1]]},
        # As in transformers 5.24.
        {"layer_types": None, "full_attn_idxs": [True]},
        {"layer_types": None, "full_attn_idxs": [1.0]},
        {"block_ff_dim": None},
        {"block_auto_adjust_ff_dim": "false"},
        {"block_auto_adjust_ff_dim": None},
        {"block_ffn_dim_multiplier": True},
        {"tie_word_embeddings": "false"},
        {"conv_L_cache": 1},
        {"conv_L_cache": "3"},
        {"block_ff_dim": "wide"},
        {"block_multiple_of": 0},
        {"block_ffn_dim_multiplier": "1"},
        {"hidden_act": "gelu"},
    ],
)
def test_what_is_of_no_use_is_refused_by_its_key(wrong):
    with pytest.raises(ValueError, match=[*wrong][-1]):
        ModelConfig.from_hf({**HF, **wrong})


def test_merged_adapters_compute_what_they_did(conv):
    config = dataclasses.replace(conv.model.config, lora_scale=2.0)
    model, targets = Decoder(config), ("q", "up", "conv_bcx", "conv_o")
    assert {*targets} < {*adaptable(config)}
    adapters = init_lora(model, jax.random.key(1), rank=2, targets=targets)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    args = conv.prompts, conv.lengths
    run = jax.jit(lambda v: model.apply(v, *args, method=model.forward))
    adapted = run({"params": conv.params, "lora": adapters})
    merged = run({"params": merge_lora(conv.params, adapters, config)})
    np.testing.assert_allclose(merged, adapted, atol=5e-5)
    assert jnp.abs(adapted - run(conv.variables)).max() > 0.01


def test_devices_that_do_not_divide_its_channels_are_refused():
    model = Decoder(ModelConfig.from_hf({**HF, "hidden_size": 24}))
    shapes, axes = (of(model)["layers"]["conv"] for of in (abstract_params, param_axes))
    mesh = meshes.abstract_mesh(MeshConfig(fsdp=1, tensor=7), 7)
    with pytest.raises(ValueError, match=r"o/kernel .*24 cannot be split over tensor"):
        meshes.parameter_shardings(axes, shapes, mesh)


def test_plans_count_projections_and_states(conv):
    config = conv.model.config
    plain = dataclasses.replace(config, mixer=None)
    lengths = np.array([5])
    # Two layers have 4 D^2 weights each, instead of q and o, and k and v of half of it.
    fewer = (
        prefill_flops(plain, lengths).weights - prefill_flops(config, lengths).weights
    )
    assert fewer == 2 * 5 * 2 * (3 - 4) * 32**2
    assert config.mixer.state_bytes(2) == 2 * (2 * 2 * 32 + 4 * 2)
    assert config.mixer.of_device(2).state_bytes(2) == 2 * (2 * 2 * 16 + 4)


@pytest.mark.parametrize("name", ["lfm2", "lfm2moe", "qwen35", "mistral3"])
def test_files_of_llama_cpp_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"'{name}' is not supported in GGUF"):
        hf_config({"general.architecture": name}, {})
