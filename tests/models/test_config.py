"""config.json to ModelConfig and back, in both spellings, and what is refused."""

import dataclasses

import pytest
import transformers

from grpo_jax.models._hf_config import read
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.rope import RopeConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def variant(architecture, model_type, **options):
    return {
        **LLAMA,
        "architectures": [architecture],
        "model_type": model_type,
        **options,
    }


QWEN2 = variant("Qwen2ForCausalLM", "qwen2")
QWEN3_MOE = variant(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
)
MIXTRAL = variant("MixtralForCausalLM", "mixtral")
OLMO3 = variant("Olmo3ForCausalLM", "olmo3")
PHI3 = variant("Phi3ForCausalLM", "phi3", max_position_embeddings=8192)
LONGROPE = {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 9.0]}
MINISTRAL3 = variant(
    "Ministral3ForCausalLM",
    "ministral3",
    rope_parameters={
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.1,
    },
)
MISTRAL3 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": MINISTRAL3,
    "vision_config": {"model_type": "pixtral"},
}
QWEN3_5 = variant("Qwen3_5ForCausalLM", "qwen3_5_text")
GEMMA2 = variant("Gemma2ForCausalLM", "gemma2")
GEMMA3 = variant("Gemma3ForCausalLM", "gemma3_text")


def test_to_hf_is_read_back_as_the_same_model(reference):
    config = ModelConfig.from_hf(reference.hf)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_transformers_reads_to_hf_back_as_the_same_model(reference):
    """Through the class of transformers, which writes the newer spelling."""
    config = ModelConfig.from_hf(reference.hf)
    hf = config.to_hf()
    theirs = transformers.CONFIG_MAPPING[hf["model_type"]].from_dict(hf).to_dict()
    assert "rope_parameters" in theirs
    assert ModelConfig.from_hf(theirs) == config
    # And it is the model that the reference was made with, not merely ours.
    for key in ("layer_types", "no_rope_layers"):
        assert theirs.get(key) == reference.hf.get(key), key
    rope = reference.hf["rope_parameters"]
    if "alpha" in rope:
        # HunYuan's base, written as stretched: alpha ** (h / (h - 2)) of heads of 8.
        stretched = rope["rope_theta"] * rope["alpha"] ** (8 / 6)
        rope = {"rope_type": "default", "rope_theta": stretched}
    assert theirs["rope_parameters"] | rope == theirs["rope_parameters"]


def test_run_options_are_kept_out_of_config_json():
    config = dataclasses.replace(
        ModelConfig.from_hf(LLAMA), dtype="bfloat16", remat="layer", lora_scale=2.0
    )
    assert config.to_hf() == ModelConfig.from_hf(LLAMA).to_hf()


def test_the_published_llama_3_2_file_is_read():
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        }
    )
    assert config.rope == (
        RopeConfig(
            theta=500000.0,
            kind="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )
    assert config.layer_rope == (0,) * 16
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.tie_embeddings
    assert config.num_kv_heads == 8
    assert config.attention_scale == 0.125  # 1 / sqrt(64)


def test_the_published_gemma_3_file_is_read():
    config = ModelConfig.from_hf(
        {
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 106],
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "initializer_range": 0.02,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "use_cache": True,
            "vocab_size": 262144,
        }
    )
    # Five local layers, then a global one, and so on.
    assert config.layer_window == (512, 512, 512, 512, 512, None) * 4 + (512, 512)
    assert config.layer_rope == (1, 1, 1, 1, 1, 0) * 4 + (1, 1)
    assert [rope.theta for rope in config.rope] == [1e6, 1e4]
    assert config.tie_embeddings
    assert config.embedding_scale == 1152**0.5


def test_both_spellings_of_rotary_settings_give_one_model():
    numbers = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = {"rope_theta": 7.0, "rope_scaling": {"type": "llama3", **numbers}}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **numbers}}
    config = ModelConfig.from_hf({**LLAMA, **old})
    assert config == ModelConfig.from_hf({**LLAMA, **new})
    # Without the trained length, the longest position stands in for it.
    assert config.rope[0].original_max_position_embeddings == 2048

    linear = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 9.0, "rope_local_base_freq": 5.0, "rope_scaling": linear}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_theta": 9.0, **linear},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
        }
    }
    config = ModelConfig.from_hf({**GEMMA3, **old})
    assert config == ModelConfig.from_hf({**GEMMA3, **new})
    assert config.rope == (
        RopeConfig(theta=9.0, kind="linear", factor=8.0),
        RopeConfig(theta=5.0),
    )


def test_the_attention_factor_of_yarn_is_that_of_its_scales():
    def factor(**options):
        yarn = {"rope_type": "yarn", "factor": 8.0, **options}
        return ModelConfig.from_hf({**LLAMA, "rope_scaling": yarn}).rope[0]

    # 0.1 ln 8 + 1 = 1.207944; of two scales, the quotient: (2 * 0.207944 + 1) / that.
    assert factor().attention_factor == pytest.approx(1.207944)
    both = factor(mscale=2.0, mscale_all_dim=1.0)
    assert both.attention_factor == pytest.approx(1.415888 / 1.207944)
    assert factor(mscale=2.0).attention_factor == pytest.approx(1.207944)
    assert factor(attention_factor=0.5, mscale=2.0).attention_factor == 0.5
    assert factor(factor=1.0).attention_factor == 1.0
    rope = factor()
    assert (rope.beta_fast, rope.beta_slow) == (32.0, 1.0)
    assert rope.original_max_position_embeddings == 2048  # the longest position


def test_longrope_ends_where_its_factors_would_change():
    config = ModelConfig.from_hf({**PHI3, "rope_scaling": LONGROPE})
    # sqrt(1 + ln 2 / ln 4096): the file stretches 4096 tokens, which Phi 3 assumes, to
    # 8192.
    assert config.rope[0].attention_factor == pytest.approx(1.040833)
    assert config.max_position_embeddings == 4096
    # The file keeps its own length.
    assert config.to_hf()["max_position_embeddings"] == 8192
    assert ModelConfig.from_hf(config.to_hf()) == config
    same = LONGROPE | {"long_factor": LONGROPE["short_factor"]}
    whole = ModelConfig.from_hf({**PHI3, "rope_scaling": same})
    assert whole.max_position_embeddings == 8192
    assert ModelConfig.from_hf(whole.to_hf()) == whole
    # An older name, and the length in its other place.
    older = LONGROPE | {"type": "su", "original_max_position_embeddings": 7}
    assert ModelConfig.from_hf({**PHI3, "rope_scaling": older}) == config
    with pytest.raises(ValueError, match="max_position_embeddings must be at most"):
        dataclasses.replace(config, max_position_embeddings=4097)


def test_a_share_of_each_head_rotates():
    hf = {**PHI3, "hidden_size": 32, "partial_rotary_factor": 0.75}
    config = ModelConfig.from_hf(hf)
    assert config.rotary_dim == 6  # of 32 / 4
    parameters = {"rope_type": "default", "partial_rotary_factor": 0.75}
    newer = {**PHI3, "hidden_size": 32, "rope_parameters": parameters}
    assert ModelConfig.from_hf(newer) == config
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_windowed_layers_of_olmo_3_rotate_unscaled():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    hf = {**OLMO3, "num_hidden_layers": 5, "sliding_window": 5, "rope_scaling": yarn}
    config = ModelConfig.from_hf(hf)
    assert config.layer_window == (5, 5, 5, None, 5)
    assert config.layer_rope == (1, 1, 1, 0, 1)
    assert [rope.kind for rope in config.rope] == ["yarn", "default"]
    assert config.to_hf()["rope_theta"] == 500_000.0
    # Two versions of transformers read another base in two ways.
    with pytest.raises(ValueError, match=r"rope_theta=10000\.0 of olmo3"):
        ModelConfig.from_hf({**hf, "rope_theta": 10_000.0})
    entries = {
        kind: {"rope_type": "default", "rope_theta": 10_000.0}
        for kind in ("full_attention", "sliding_attention")
    }
    config = ModelConfig.from_hf({**OLMO3, "rope_parameters": entries})
    assert config.to_hf()["rope_parameters"] == entries
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_a_multimodal_model_is_read_as_its_text_model():
    outer = {"dtype": "bfloat16", "image_token_index": 10, "eos_token_id": [2, 5]}
    config = ModelConfig.from_hf({**MISTRAL3, **outer})
    text = {**MINISTRAL3, "tie_word_embeddings": True, "eos_token_id": [2, 5]}
    assert config == ModelConfig.from_hf(text)
    assert config.architecture == "Ministral3ForCausalLM"
    named = {**MISTRAL3, "architectures": None}
    assert ModelConfig.from_hf(named).architecture == "Ministral3ForCausalLM"
    # What the whole says holds before what the text model says.
    untied = {**MISTRAL3["text_config"], "tie_word_embeddings": False}
    untied = {**MISTRAL3, "text_config": untied}
    assert not ModelConfig.from_hf(untied).tie_embeddings
    assert ModelConfig.from_hf({**untied, "tie_word_embeddings": True}).tie_embeddings


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        (LLAMA, (None, None, None)),
        (variant("MistralForCausalLM", "mistral", sliding_window=5), (5, 5, 5)),
        (variant("MistralForCausalLM", "mistral", sliding_window=None), (None,) * 3),
        # Mistral has no such switch.
        (
            variant(
                "MistralForCausalLM",
                "mistral",
                sliding_window=5,
                use_sliding_window=False,
            ),
            (5, 5, 5),
        ),
        # The window is stated but not in use.
        ({**QWEN2, "sliding_window": 5, "max_window_layers": 1}, (None,) * 3),
        (
            {
                **QWEN2,
                "use_sliding_window": True,
                "sliding_window": 5,
                "max_window_layers": 1,
            },
            (None, 5, 5),
        ),
        ({**GEMMA2, "sliding_window": 5}, (5, None, 5)),
        ({**GEMMA3, "sliding_window": 5, "sliding_window_pattern": 3}, (5, 5, None)),
        # What transformers writes under this name it does not read.
        ({**GEMMA3, "sliding_window": 5, "_sliding_window_pattern": 2}, (5, 5, 5)),
        (
            {
                **GEMMA3,
                "sliding_window": 5,
                "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
            },
            (None, None, 5),
        ),
    ],
)
def test_windows_are_per_layer(hf, expected):
    config = ModelConfig.from_hf(hf)
    assert config.layer_window == expected
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        (QWEN3_MOE, (6, 2, 20, False)),
        ({**QWEN3_MOE, "norm_topk_prob": True}, (6, 2, 20, True)),
        # The spelling of transformers 5.
        ({**QWEN3_MOE, "num_experts": None, "num_local_experts": 7}, (7, 2, 20, False)),
        (MIXTRAL, (8, 2, 24, True)),
        (
            {**MIXTRAL, "num_local_experts": 4, "num_experts_per_tok": 1},
            (4, 1, 24, True),
        ),
    ],
)
def test_experts_are_read_and_written_by_the_keys_of_each_family(hf, expected):
    hf = {key: value for key, value in hf.items() if value is not None}
    config = ModelConfig.from_hf(hf)
    assert config.experts is not None
    assert dataclasses.astuple(config.experts) == expected
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_a_one_in_no_rope_layers_means_that_the_layer_rotates():
    hf = variant("SmolLM3ForCausalLM", "smollm3")
    listed = ModelConfig.from_hf({**hf, "no_rope_layers": [1, 0, 1]})
    assert listed.layer_rope == (0, None, 0)
    every_third = ModelConfig.from_hf({**hf, "no_rope_layer_interval": 3})
    assert every_third.layer_rope == (0, 0, None)


def test_full_layers_of_exaone_rotate_only_in_a_model_without_windows():
    hf = variant("Exaone4ForCausalLM", "exaone4", num_hidden_layers=5)
    config = ModelConfig.from_hf({**hf, "sliding_window": 5})
    assert config.layer_window == (5, 5, 5, None, 5)
    assert config.layer_rope == (0, 0, 0, None, 0)
    listed = {**hf, "sliding_window_pattern": "LLG"}
    full = ["full_attention"] * 5
    whole = ModelConfig.from_hf({**listed, "layer_types": full, "sliding_window": None})
    assert whole.layer_rope == (0,) * 5 and whole.layer_window == (None,) * 5
    for one in (config, whole):
        assert ModelConfig.from_hf(one.to_hf()) == one
    with pytest.raises(ValueError, match="sliding_window_pattern must be .* got 'LLG'"):
        ModelConfig.from_hf(listed)


def test_layers_without_attention_are_read_from_either_key():
    listed = {**QWEN3_5, "layer_types": ["linear_attention"] * 2 + ["full_attention"]}
    every = {**QWEN3_5, "full_attention_interval": 3}
    for hf in (listed, every, {**every, "layer_types": None}):
        config = ModelConfig.from_hf(hf)
        assert config.mixer.layers == (True, True, False)
        assert (config.mixer.key_heads, config.mixer.value_heads) == (16, 32)
        assert config.attention_layers == 1 and config.attention_gate
        assert ModelConfig.from_hf(config.to_hf()) == config
    assert config.rotary_fraction == 0.25
    # Of text all three places in an image are the position.
    rope = {"rope_theta": 5.0, "mrope_section": [1, 1, 0], "mrope_interleaved": True}
    assert ModelConfig.from_hf({**every, "rope_parameters": rope}).rope[0].theta == 5.0


def test_biases_follow_the_family():
    qwen2 = ModelConfig.from_hf(QWEN2)
    assert (qwen2.attention_bias, qwen2.output_bias) == (True, False)
    llama = ModelConfig.from_hf({**LLAMA, "attention_bias": True})
    assert (llama.attention_bias, llama.output_bias) == (True, True)
    seed_oss = variant("SeedOssForCausalLM", "seed_oss", attention_bias=False)
    config = ModelConfig.from_hf({**seed_oss, "attention_out_bias": True})
    assert (config.attention_bias, config.output_bias) == (False, True)
    assert ModelConfig.from_hf(config.to_hf()) == config
    glm4 = ModelConfig.from_hf(variant("Glm4ForCausalLM", "glm4"))
    assert (glm4.attention_bias, glm4.output_bias) == (True, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPTNeoForCausalLM"]}, "GPTNeoForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"hidden_act": None}, "hidden_act=None"),
        ({"is_causal": False}, "is_causal=False"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"residual_multiplier": 0.2}, "residual_multiplier=0.2"),
        ({"sliding_window": 5}, "sliding_window=5"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' needs a positive factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "must be a number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "positive factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
            "beta_fast",
        ),
        (
            {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "one flat entry",
        ),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"hidden_size": 12}, "head_dim must be even"),
    ],
)
def test_what_the_decoder_does_not_honor_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**LLAMA, **change})


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (
            {**GEMMA3, "use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        ({**GEMMA2, "sliding_window_pattern": 3}, "sliding_window_pattern=3"),
        ({**GEMMA3, "attn_logit_softcapping": 2.0}, "attn_logit_softcapping=2.0"),
        ({**QWEN3_MOE, "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({**QWEN3_MOE, "mlp_only_layers": [0]}, "mlp_only_layers=\\[0\\]"),
        ({**QWEN3_MOE, "output_router_logits": True}, "output_router_logits=True"),
        ({**QWEN3_MOE, "num_experts_per_tok": 9}, "per_token=9"),
        (
            {**QWEN3_MOE, "shared_expert_intermediate_size": 8},
            "shared_expert_intermediate_size=8",
        ),
        ({**MIXTRAL, "router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        (
            {**GEMMA3, "rope_parameters": {"rope_theta": 5.0}},
            "one entry per layer type",
        ),
        ({**GEMMA3, "layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ({**OLMO3, "sliding_window": None}, "sliding_window is not set"),
        ({**PHI3, "full_attn_mod": 2}, "full_attn_mod=2"),
        ({**PHI3, "rope_scaling": {"type": "longrope"}}, "positive short_factor"),
        (
            {**PHI3, "rope_scaling": LONGROPE | {"long_factor": [1.0]}},
            "must have 2 entries",
        ),
        (
            {
                **PHI3,
                "rope_scaling": LONGROPE,
                "original_max_position_embeddings": 1,
            },
            "must be more than 1",
        ),
        ({**PHI3, "partial_rotary_factor": 0.8}, "rotate an even number"),
        ({**PHI3, "partial_rotary_factor": 1.5}, r"in \(0, 1\]"),
        (
            {**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}},
            "truncate=False",
        ),
        (
            {**LLAMA, "rope_scaling": MINISTRAL3["rope_parameters"]},
            "does not use .'llama_4_scaling_beta'",
        ),
        (
            {**MINISTRAL3, "rope_parameters": {"rope_type": "default"}},
            "needs llama_4_scaling_beta",
        ),
        ({**MINISTRAL3, "rope_parameters": None}, "needs llama_4_scaling_beta"),
        (variant("GraniteForCausalLM", "granite", logits_scaling=None), "a number"),
        (variant("GraniteForCausalLM", "granite", logits_scaling=0), "logit_divisor"),
        ({**MISTRAL3, "text_config": None}, "text_config must be an object"),
        ({**MISTRAL3, "text_config": QWEN2}, "model_type 'qwen2', which is not"),
        ({**MISTRAL3, "model_type": "gemma3"}, "expected 'mistral3'"),
        ({**MISTRAL3, "quantization_config": {"bits": 8}}, "quantization_config"),
        ({**MISTRAL3, "audio_config": {"layers": 8}}, "audio_config"),
        ({**LLAMA, "text_config": LLAMA}, "text_config="),
        ({**QWEN3_5, "full_attention_interval": 0}, "full_attention_interval must be"),
        ({**QWEN3_5, "layer_types": ["linear_attention"] * 3}, "a layer of each kind"),
        (
            {**QWEN3_5, "layer_types": ["sliding_attention"] * 3},
            "layer_types must have",
        ),
        ({**QWEN3_5, "linear_num_value_heads": 24}, "multiple of key_heads 16"),
        ({**QWEN3_5, "linear_key_head_dim": 0}, "linear_key_head_dim must be a pos"),
        ({**QWEN3_5, "attn_output_gate": False}, "attn_output_gate=False"),
        ({**QWEN3_5, "output_gate_type": "sigmoid"}, "output_gate_type='sigmoid'"),
        ({**QWEN3_5, "mlp_only_layers": [1]}, "mlp_only_layers="),
        ({**LLAMA, "linear_num_key_heads": 2}, "linear_num_key_heads=2"),
        ({**GEMMA3, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ({**QWEN2, "layer_types": ["sliding_attention"] * 3}, "sliding_window"),
        (
            variant("SmolLM3ForCausalLM", "smollm3", no_rope_layers=[1, 0]),
            "no_rope_layers has 2 entries",
        ),
    ],
)
def test_what_other_families_cannot_do_is_refused_by_name(hf, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf)


def test_all_missing_and_unsupported_keys_are_named_at_once():
    hf = {**LLAMA, "logits_scaling": 2.0, "embedding_multiplier": 3.0}
    del hf["vocab_size"]
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(hf)
    for name in ("vocab_size", "logits_scaling", "embedding_multiplier"):
        assert name in str(error.value)


def test_keys_that_change_nothing_are_accepted():
    harmless = {
        "attention_dropout": 0.1,
        "use_cache": False,
        "torch_dtype": "bfloat16",
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4"},
        "quantization_config": None,
        "some_future_switch": False,
    }
    assert ModelConfig.from_hf({**LLAMA, **harmless}) == ModelConfig.from_hf(LLAMA)


def test_a_field_that_config_json_cannot_express_is_refused_by_name():
    config = dataclasses.replace(ModelConfig.from_hf(LLAMA), qk_norm="head")
    with pytest.raises(ValueError, match="qk_norm='head'"):
        config.to_hf()
    two_windows = dataclasses.replace(
        ModelConfig.from_hf(GEMMA2), layer_window=(3, 4, None)
    )
    with pytest.raises(ValueError, match="layer_window"):
        two_windows.to_hf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"remat": "all"}, "remat must be one of"),
        ({"layer_rope": (0,)}, "layer_rope needs num_layers=3"),
        ({"layer_rope": (0, 1, 0)}, "layer_rope must index"),
        ({"layer_window": (None, 0, None)}, "layer_window must be positive"),
        ({"lora_scale": 0.0}, "lora_scale must be positive"),
        ({"num_layers": 0}, "num_layers must be positive"),
        ({"qk_norm": True}, "qk_norm must be one of"),
        ({"post_norm": True, "sandwich_norm": True}, "exclude each other"),
        ({"residual_scale": 0.0}, "residual_scale must be positive"),
    ],
)
def test_invalid_fields_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ModelConfig.from_hf(LLAMA), **change)


def test_reading_does_not_change_the_file():
    hf = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}
    before = repr(hf)
    read(hf)
    assert repr(hf) == before
