"""Writes references/*.npz: tiny random models of every family, run by transformers.

Needs torch and transformers 5: `python tests/models/make_references.py`. Each file
holds `config` (config.json as text), `tokens` [B, S] right-padded with junk, `lengths`,
`logits` [B, S, V] of the real tokens, and the state dict under `weights/`. Weights are
float16 numbers, so that the files stay small and lose nothing. `balance.json` has the
loss that balances experts for the files of mixtures.
"""

import json
import pathlib
import tempfile

import numpy as np
import safetensors.torch
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "references"
LENGTHS = (14, 9, 1)
SHARED = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
CASES = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": LLAMA3_ROPE,
            "head_dim": 16,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "smollm2": ("Llama", {"rope_parameters": LINEAR_ROPE, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "eos_token_id": [7, 8],
        },
    ),
    "qwen3": (
        "Qwen3",
        {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 5,
            "sliding_window": 4,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "query_pre_attn_scalar": 12,
            "attention_bias": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention"] * 2
            + ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": LINEAR_ROPE,
            },
        },
    ),
    "smollm3": (
        "SmolLM3",
        {
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "mlp_bias": True,
            "pad_token_id": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 200.0},
        },
    ),
}


MIXTRAL = {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6}
QWEN3_MOE = {
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "attention_bias": True,
}
# Later than the others, so that theirs keep their seeds.
CASES |= {"mixtral": ("Mixtral", MIXTRAL), "qwen3_moe": ("Qwen3Moe", QWEN3_MOE)}
EXPERTS = ("mixtral", "qwen3_moe")

YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.3,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
CASES |= {
    "olmo2": ("Olmo2", {"attention_bias": True, "rms_norm_eps": 1e-2}),
    "olmo3": (
        "Olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": YARN_ROPE,
            },
        },
    ),
    # Fused weights, and six of eight dimensions that rotate.
    "phi3": (
        "Phi3",
        {
            "hidden_size": 32,
            "original_max_position_embeddings": 32,
            "sliding_window": 9,
            "pad_token_id": 3,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.25, 2.0],
                "long_factor": [1.0, 3.0, 5.0],
            },
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "logits_scaling": 5.0,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 8,
            "pad_token_id": 3,
            "rope_parameters": YARN_ROPE
            | {
                "original_max_position_embeddings": 5,
                "llama_4_scaling_beta": 0.7,
            },
        },
    ),
}

CASES |= {
    "exaone4": (
        "Exaone4",
        {
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "seed_oss": (
        "SeedOss",
        {"head_dim": 8, "attention_out_bias": True, "attention_bias": False},
    ),
    "glm4": ("Glm4", {"head_dim": 8, "pad_token_id": 3, "eos_token_id": [7, 8]}),
    "hunyuan": (
        "HunYuanDenseV1",
        {
            "head_dim": 8,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 100.0,
                "alpha": 7.0,
                "factor": 1.0,
                "mscale": 1.0,
            },
        },
    ),
}

QWEN3_5 = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.5,
    },
}
CASES |= {"qwen3_5": ("Qwen3_5Text", QWEN3_5)}
# MLPs of 20 features: two thirds of 24, rounded up.
LFM2 = {
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "block_multiple_of": 10,
}
CASES |= {"lfm2": ("Lfm2", LFM2)}


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Gives every parameter values of which none is trivially 0 or 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                value = parameter + 0.3 * noise
            elif parameter.ndim == 1:
                value = 0.5 * noise
            else:
                value = noise * (1.0 if "embed" in name else 0.3)
            parameter.copy_(value.half().float())


def stored_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the model's files, which for experts differ from its own."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return safetensors.torch.load_file(f"{folder}/model.safetensors")


def random_model(
    kind: str, options: dict, generator: torch.Generator
) -> transformers.PreTrainedModel:
    """A tiny model of a family."""
    config = getattr(transformers, f"{kind}Config")(**{**SHARED, **options})
    name = kind.removesuffix("Text") + "ForCausalLM"
    config.architectures = [name]
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval().float()
    randomize(model, generator)
    return model


def reference(kind: str, options: dict, seed: int) -> dict[str, np.ndarray]:
    """The content of one file."""
    generator = torch.Generator().manual_seed(seed)
    model = random_model(kind, options, generator)
    shape = (len(LENGTHS), max(LENGTHS))
    tokens = torch.randint(0, SHARED["vocab_size"], shape, generator=generator)
    logits = np.zeros((*shape, SHARED["vocab_size"]), np.float32)
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            logits[row, :length] = model(tokens[row : row + 1, :length]).logits[0]
    weights = {
        f"weights/{key}": value.half().numpy()
        for key, value in stored_weights(model).items()
    }
    return {
        "config": np.array(json.dumps(model.config.to_dict())),
        "tokens": tokens.numpy().astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "logits": logits,
        **weights,
    }


def balance(case: str, seed: int) -> float:
    """The loss that balances experts, over the real tokens of a file."""
    generator = torch.Generator().manual_seed(seed)
    model = random_model(*CASES[case], generator)
    shape = (len(LENGTHS), max(LENGTHS))
    tokens = torch.randint(0, SHARED["vocab_size"], shape, generator=generator)
    real = torch.arange(shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        found = model(tokens, attention_mask=real.long(), output_router_logits=True)
    return float(found.aux_loss)


def write_balance() -> None:
    """Writes references/balance.json: the loss of `balance` by the name of the file."""
    values = {case: balance(case, [*CASES].index(case)) for case in EXPERTS}
    (FOLDER / "balance.json").write_text(json.dumps(values))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    write_balance()
    for seed, (case, (kind, options)) in enumerate(CASES.items()):
        np.savez_compressed(FOLDER / f"{case}.npz", **reference(kind, options, seed))
