"""The row of `families` for LFM2, whose class shares few keys with the others."""

from grpo_jax.models._family import Family

# Of its publisher's own code; the class reads none of them.
_IGNORED = frozenset(
    """
    block_dim block_mlp_init_scale block_norm_eps block_out_init_scale block_use_swiglu
    block_use_xavier_init conv_dim conv_dim_out conv_use_xavier_init model_name
    num_heads use_pos_enc
    """.split()
)

LFM2 = Family(
    model_type="lfm2",
    defaults={
        "norm_eps": 1e-5,
        "head_dim": None,
        "max_position_embeddings": 128_000,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "conv_L_cache": 3,
        "layer_types": None,
        "block_auto_adjust_ff_dim": True,
    },
    default_theta=1_000_000.0,
    qk_norm="head",
    output_bias=None,
    # The class has one activation, and no key of it.
    fixed={"conv_bias": False, "hidden_act": "silu"},
    ignored=_IGNORED,
)
