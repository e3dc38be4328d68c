"""Gemma 4 is refused by the parts that are missing, before anything is loaded."""

import json

import pytest
import transformers

from grpo_jax.models import families
from grpo_jax.models.config import ModelConfig

ALWAYS = "a norm of values; a scalar of each layer; proportional rotary frequencies"
# Of google/gemma-4-E2B, by the file as several implementations repeat it: four windowed
# layers and a global one in turn, and 20 of 35 layers without keys of their own.
E2B = {
    "model_type": "gemma4_text",
    "hidden_size": 1536,
    "num_hidden_layers": 35,
    "intermediate_size": 6144,
    "num_attention_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "rms_norm_eps": 1e-6,
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "hidden_size_per_layer_input": 256,
    "sliding_window": 512,
    "max_position_embeddings": 131_072,
    "use_double_wide_mlp": True,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
}
WHOLE = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "text_config": E2B,
    "vision_config": {},
    "audio_config": {},
}


def refusal(hf):
    with pytest.raises(ValueError, match="Gemma 4 is not supported") as error:
        ModelConfig.from_hf(hf)
    return str(error.value)


def test_the_sentence_names_every_part_that_e2b_uses():
    expected = (
        f"config.json: Gemma 4 is not supported, because this decoder lacks: {ALWAYS}; "
        "heads of another size in global layers (head_dim=256, global_head_dim=512); "
        "an input of each layer from the token (hidden_size_per_layer_input=256); "
        "keys and values that layers share (num_kv_shared_layers=20); "
        "MLPs of two widths (use_double_wide_mlp=True) (see docs/models.md)"
    )
    assert refusal(WHOLE) == expected
    assert refusal(E2B) == expected
    assert refusal(E2B | {"architectures": ["Gemma4ForCausalLM"]}) == expected


def test_a_file_of_transformers_is_refused_by_its_own_spelling():
    written = transformers.Gemma4TextConfig(num_hidden_layers=6).to_dict()
    assert "global_head_dim" not in written, "the class writes per_layer_config"
    sentence = refusal(written)
    assert "heads that differ from layer to layer (per_layer_config)" in sentence
    assert "hidden_size_per_layer_input=256" in sentence


def test_the_experts_and_the_large_dense_model_are_refused():
    dense = {
        "model_type": "gemma4_text",
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 4,
        "use_bidirectional_attention": "vision",
    }
    sentence = refusal(dense)
    assert "attention_k_eq_v=True" in sentence
    assert "num_global_key_value_heads=4" in sentence
    assert "hidden_size_per_layer_input" not in sentence
    assert "bidirectional" not in sentence
    assert "enable_moe_block=True" in refusal(dense | {"enable_moe_block": True})
    both = dense | {"use_bidirectional_attention": "all"}
    assert "use_bidirectional_attention='all'" in refusal(both)


@pytest.mark.parametrize("model_type", ["gemma4_unified", "gemma4_unified_text"])
def test_its_other_classes_are_refused_too(model_type):
    assert ALWAYS in refusal({"model_type": model_type, "text_config": None})


def test_even_a_file_that_turns_every_part_off_is_refused():
    off = {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "global_head_dim": 256,
    }
    sentence = refusal(E2B | off)
    # Without layers that share keys, no MLP is wider.
    assert sentence.endswith(f"lacks: {ALWAYS} (see docs/models.md)")


def test_a_null_is_as_absent():
    absent = {key: value for key, value in E2B.items() if key != "global_head_dim"}
    sentence = refusal(E2B | {"global_head_dim": None})
    assert sentence == refusal(absent) and "global_head_dim=512" in sentence


@pytest.mark.parametrize(
    "key", ["global_head_dim", "num_global_key_value_heads", "per_layer_config"]
)
def test_heads_that_differ_are_refused_in_every_family(key):
    sizes = dict.fromkeys(families.REQUIRED_KEYS, 8)
    hf = {"model_type": "llama", **sizes, key: {"5": 512}}
    with pytest.raises(ValueError, match=f"{key}=.* is not supported"):
        ModelConfig.from_hf(hf)


def test_nothing_is_loaded_before(tmp_path):
    from grpo_jax.weights.pretrained import load_pretrained

    (tmp_path / "config.json").write_text(json.dumps(WHOLE))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ValueError, match="Gemma 4 is not supported"):
        load_pretrained(str(tmp_path))
