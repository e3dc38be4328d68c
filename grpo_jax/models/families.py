"""What each supported architecture is, as data: one row per Hugging Face class.

A row says which keys of `config.json` the architecture reads, what transformers assumes
for those that are absent, and the few facts that no key states. The tables below it
list the keys that change nothing here and those supported at one value only.
"""

from collections.abc import Mapping
from typing import Any

from grpo_jax.models._family import Family
from grpo_jax.models._lfm2 import LFM2

REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")

# Keys without effect on the function that the decoder computes: bookkeeping, training
# and generation settings, dropout, and layers that predict later tokens.
IGNORED_KEYS = frozenset(
    """
    architectures model_type _name_or_path name_or_path transformers_version
    torch_dtype dtype use_cache cache_implementation _attn_implementation
    attn_implementation _attn_implementation_autoset attention_dropout hidden_dropout
    resid_pdrop embd_pdrop residual_dropout initializer_range auto_map is_llama_config
    transformers.js_config unsloth_fixed unsloth_version id2label label2id num_labels
    problem_type task_specific_params finetuning_task torchscript return_dict
    output_attentions output_hidden_states chunk_size_feed_forward is_decoder
    max_length min_length do_sample temperature top_p top_k typical_p num_beams
    num_beam_groups num_return_sequences repetition_penalty length_penalty
    no_repeat_ngram_size early_stopping diversity_penalty max_window_size
    keys_to_ignore_at_inference use_bfloat16 prefix sep_token_id tokenizer_class
    decoder_start_token_id unk_token_id pruned_heads bad_words_ids pretraining_tp
    max_sequence_length seq_length model_max_length tokenizer_model_max_length
    tokenizer_padding_side pad_token neftune_noise_alpha gradient_checkpointing
    use_flash_attention use_flash_attention_2 _flash_attn_2_enabled
    _attn_implementation_internal mtp_num_hidden_layers mtp_use_dedicated_embeddings
    mamba_ssm_dtype
    """.split()
)

# Keys that change the model, and the one value at which this decoder is that model.
FIXED_KEYS: Mapping[str, Any] = {
    "partial_rotary_factor": 1.0,
    "decoder_sparse_step": 1,  # experts in every layer
    "is_causal": True,
    "sliding_window_pattern": 2,  # layers alternate; Gemma 3 alone reads another value
}


_SHARED = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "head_dim": None,
    "num_key_value_heads": None,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA_BIASES = {"attention_bias": False, "mlp_bias": False}
_QWEN_WINDOWS = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
# The loss that balances experts is of training by supervision.
_EXPERTS_IGNORED = frozenset({"router_aux_loss_coef"})
_GEMMA = {
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}

_OLMO = _SHARED | {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "eos_token_id": 50_279,
    "pad_token_id": 1,
}

# Of its publisher's other models; the class reads none of them.
_HUNYUAN_IGNORED = frozenset(
    """
    attention_head_dim cla_share_factor dense_list eod_token_id im_end_id im_newline_id
    im_start_id mask_init_id org_vocab_size pad_id pool_type text_end_id text_start_id
    """.split()
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        defaults=_SHARED
        | _LLAMA_BIASES
        | {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        # This class alone has the key: its older form sums projections in parts.
        fixed={"pretraining_tp": 1},
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        defaults=_SHARED
        | {
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        windows="all",
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        defaults=_SHARED
        | _QWEN_WINDOWS
        | {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
        windows="late",
        qkv_bias=True,
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        defaults=_SHARED
        | _QWEN_WINDOWS
        | {
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "attention_bias": False,
        },
        windows="late",
        qk_norm="head",
    ),
    "MixtralForCausalLM": Family(
        model_type="mixtral",
        defaults=_SHARED
        | {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        default_theta=1_000_000.0,
        windows="all",
        ignored=_EXPERTS_IGNORED,
        aliases={"num_experts": "num_local_experts"},
    ),
    "Qwen3MoeForCausalLM": Family(
        model_type="qwen3_moe",
        defaults=_SHARED
        | {
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        # The class assumes the sizes of one model, which no other file means.
        required=("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        windows="all",
        qk_norm="head",
        # Unlike in Qwen3, a window in use is one of all layers.
        ignored=_EXPERTS_IGNORED | {"max_window_layers"},
        aliases={"num_local_experts": "num_experts"},
    ),
    "Gemma2ForCausalLM": Family(
        model_type="gemma2",
        defaults=_GEMMA
        | {
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        windows="alternating",
        sandwich_norm=True,
        norm_offset=1.0,
        scaled_embedding=True,
        ignored=frozenset({"hidden_act"}),
    ),
    "Gemma3ForCausalLM": Family(
        model_type="gemma3_text",
        defaults=_GEMMA
        | {
            "max_position_embeddings": 131_072,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "rope_local_base_freq": 10_000.0,
        },
        default_theta=1_000_000.0,
        local_theta=10_000.0,
        windows="patterned",
        qk_norm="head",
        sandwich_norm=True,
        norm_offset=1.0,
        scaled_embedding=True,
        # The class writes its pattern under the second name, and never reads it there.
        ignored=frozenset({"hidden_act", "_sliding_window_pattern"}),
    ),
    "SmolLM3ForCausalLM": Family(
        model_type="smollm3",
        defaults=_SHARED
        | _LLAMA_BIASES
        | {
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "pad_token_id": 128_004,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
        },
        default_theta=2_000_000.0,
        windows="unrotated",
        ignored=frozenset({"max_window_layers"}),
    ),
    "Olmo2ForCausalLM": Family(
        model_type="olmo2",
        defaults=_OLMO,
        qk_norm="width",
        post_norm=True,
    ),
    "Olmo3ForCausalLM": Family(
        model_type="olmo3",
        defaults=_OLMO | {"sliding_window": 4096, "layer_types": None},
        default_theta=500_000.0,
        local_theta=500_000.0,
        windows="of_four",
        qk_norm="width",
        post_norm=True,
    ),
    "Phi3ForCausalLM": Family(
        model_type="phi3",
        defaults=_SHARED
        | {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 32_000,
            "pad_token_id": 32_000,
        },
        windows="all",
        # Of its publisher's own code: attention of all layers to all tokens, and
        # positions that are not interpolated.
        fixed={"full_attn_mod": 1, "interpolate_factor": 1},
    ),
    "GraniteForCausalLM": Family(
        model_type="granite",
        defaults=_SHARED
        | _LLAMA_BIASES
        | {
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "Ministral3ForCausalLM": Family(
        model_type="ministral3",
        defaults=_SHARED
        | {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262_144,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 11,
        },
        # The class assumes the settings of one model, which no other file means.
        required=("rope_parameters",),
        windows="all",
        scaled_queries=True,
    ),
    "Exaone4ForCausalLM": Family(
        model_type="exaone4",
        defaults=_SHARED
        | {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "num_key_value_heads": 32,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        windows="patterned",
        only_windows_rotate=True,
        qk_norm="head",
        post_norm=True,
    ),
    "SeedOssForCausalLM": Family(
        model_type="seed_oss",
        defaults=_SHARED
        | {
            "max_position_embeddings": 524_288,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        output_bias="attention_out_bias",
    ),
    "Glm4ForCausalLM": Family(
        model_type="glm4",
        defaults=_SHARED
        | {
            "rms_norm_eps": 0.00000015625,
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "eos_token_id": [151_329, 151_336, 151_338],
            "pad_token_id": 151_329,
        },
        output_bias=None,
        sandwich_norm=True,
        rotary_neighbors=True,
    ),
    "HunYuanDenseV1ForCausalLM": Family(
        model_type="hunyuan_v1_dense",
        defaults=_SHARED
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        | {"attention_bias": False},
        qk_norm="rotated",
        stretched_base=True,
        fixed={"use_qk_norm": True, "use_rotary_pos_emb": True, "norm_type": "rms"},
        ignored=_HUNYUAN_IGNORED,
    ),
    "Qwen3_5ForCausalLM": Family(
        model_type="qwen3_5_text",
        defaults=_SHARED
        | {
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "attention_bias": False,
            "partial_rotary_factor": 0.25,
            "linear_conv_kernel_dim": 4,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
        }
        | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 128)
        | {"layer_types": None, "full_attention_interval": 4},
        qk_norm="head",
        norm_offset=1.0,
        attention_gate=True,
        fixed={"attn_output_gate": True, "output_gate_type": "swish"},
        ignored_rope=frozenset({"mrope_section", "mrope_interleaved"}),
    ),
    "Lfm2ForCausalLM": LFM2,
}
