"""Where the files of an architecture name a tensor otherwise than most."""

# Architecture -> the router, the list of experts, and gate, up and down in each. These
# are the tensors of files; transformers 5 joins those of experts when it reads them.
EXPERT_NAMES = {
    "MixtralForCausalLM": (
        "block_sparse_moe.gate",
        "block_sparse_moe.experts",
        ("w1", "w3", "w2"),
    ),
    "Qwen3MoeForCausalLM": (
        "mlp.gate",
        "mlp.experts",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}

# Architecture -> the file's tensor, and the projections whose rows it has one after the
# other.
FUSED = {
    "Phi3ForCausalLM": {
        "self_attn.qkv_proj": ("attn/q", "attn/k", "attn/v"),
        "mlp.gate_up_proj": ("mlp/gate", "mlp/up"),
    },
    "Glm4ForCausalLM": {"mlp.gate_up_proj": ("mlp/gate", "mlp/up")},
}
# Their names in GGUF files.
FUSED_GGUF = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
# Architecture -> its own names of norms and projections, by those of the other
# architectures. The second table is about GGUF files.
NAMES = {
    "Glm4ForCausalLM": {
        "pre_feedforward_layernorm": "post_attention_layernorm",
        "post_attention_layernorm": "post_self_attn_layernorm",
        "post_feedforward_layernorm": "post_mlp_layernorm",
    },
    "HunYuanDenseV1ForCausalLM": {
        "self_attn.q_norm": "self_attn.query_layernorm",
        "self_attn.k_norm": "self_attn.key_layernorm",
    },
    "Lfm2ForCausalLM": {
        "input_layernorm": "operator_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
        "self_attn.o_proj": "self_attn.out_proj",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "model.norm": "model.embedding_norm",
    },
}
GGUF_NORMS = {"SeedOssForCausalLM": {"ffn_norm": "post_attention_norm"}}
