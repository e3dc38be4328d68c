"""The table of parameters and tensors."""

import dataclasses
import re

import numpy as np
import pytest

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params
from grpo_jax.weights._names import (
    check_tensors,
    parameter_table,
    parameter_tensors,
    read_parameter,
)

PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "partial_rotary_factor": 0.5,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 5,
}
QWEN3_5 = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


@dataclasses.dataclass
class ArrayTensor:
    values: np.ndarray
    file: str = "a.safetensors"

    @property
    def shape(self):
        return self.values.shape

    def read(self, index):
        return self.values[index]


@pytest.fixture(scope="module")
def table(untied):
    return parameter_table(untied.config)


@pytest.fixture
def tensors(untied):
    pairs = parameter_tensors(untied.config, untied.params)
    return {name: ArrayTensor(values) for name, values in pairs}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
        },
        MIXTRAL,
        {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
        PHI3,
        QWEN3_5,
    ],
    ids=["plain", "tied", "biases", "gemma3", "mixtral", "olmo2", "phi3", "qwen3_5"],
)
def test_the_table_has_exactly_the_parameters_of_the_decoder(options, tools):
    config = ModelConfig.from_hf({**tools.HF, **options})
    shapes = tools.flatten(abstract_params(Decoder(config)))
    table = {row.path: row.shape for row in parameter_table(config)}
    assert table == {path: leaf.shape for path, leaf in shapes.items()}


def test_every_tensor_is_named_once_in_both_formats(table):
    for names in (
        [name for row in table for name in row.names],
        [name for row in table for name in row.gguf_names],
    ):
        assert len(names) == len(set(names))


@pytest.mark.parametrize("rows", [1 << 14, 5])  # read at once
@pytest.mark.parametrize("options", [{"attention_bias": True}, MIXTRAL, PHI3, QWEN3_5])
def test_a_part_of_a_parameter_is_that_part_of_the_whole(
    options, rows, tools, monkeypatch
):
    monkeypatch.setattr("grpo_jax.weights._names._ROWS", rows)
    config = ModelConfig.from_hf({**tools.HF, **options})
    params = tools.random_params(config)
    pairs = parameter_tensors(config, params)
    tensors = {name: ArrayTensor(values) for name, values in pairs}
    whole = tools.flatten(params)
    for row in parameter_table(config):
        part = tuple(slice(n // 2, max(n - 1, n // 2 + 1)) for n in row.shape)
        values = read_parameter(row, tensors, part, dtype=np.dtype(np.float32))
        np.testing.assert_array_equal(values, np.asarray(whole[row.path])[part])


def test_projections_of_one_tensor_are_its_rows(tools):
    config = ModelConfig.from_hf({**tools.HF, **PHI3})
    params = tools.random_params(config)
    tensors = dict(parameter_tensors(config, params))
    flat = tools.flatten(params)
    for name, paths in (
        ("self_attn.qkv_proj", ("attn/q", "attn/k", "attn/v")),
        ("mlp.gate_up_proj", ("mlp/gate", "mlp/up")),
    ):
        parts = [flat[f"layers/{path}/kernel"][1].T for path in paths]
        whole = tensors[f"model.layers.1.{name}.weight"]
        assert whole.flags.c_contiguous
        np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert not [
        name
        for name in tensors
        if "q_proj" in name or "_up_proj" not in name and "up_proj" in name
    ]


def test_exported_tensors_are_contiguous(untied):
    for name, values in parameter_tensors(untied.config, untied.params):
        assert values.flags.c_contiguous, name


def test_one_error_lists_every_problem_with_its_file(table, tensors):
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.bias"]
    tensors["model.extra"] = ArrayTensor(np.zeros(1), "b.safetensors")
    tensors["lm_head.weight"] = ArrayTensor(np.zeros((47, 64)), "c.safetensors")
    with pytest.raises(ValueError) as error:
        check_tensors(table, tensors, source="some/folder")
    message = str(error.value)
    assert message.startswith(
        "cannot load some/folder: 2 missing (model.layers.1.mlp.up_proj.bias; "
        "model.norm.weight), 1 unexpected (model.extra in b.safetensors), 1 misshaped "
        "(lm_head.weight: [47, 64] in c.safetensors, the configuration needs [48, 64])"
    )


def test_a_repeated_tied_head_and_rotary_buffers_are_accepted(tied):
    pairs = parameter_tensors(tied.config, tied.params)
    tensors = {name: ArrayTensor(values) for name, values in pairs}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[buffer] = ArrayTensor(np.zeros(8))
    check_tensors(parameter_table(tied.config), tensors, source="x")


def test_params_of_another_configuration_are_not_exported(untied, tied):
    expected = re.escape("lm_head/kernel: given None, the configuration needs (64, 48)")
    with pytest.raises(ValueError, match=expected):
        list(parameter_tensors(untied.config, tied.params))
