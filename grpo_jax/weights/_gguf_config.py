"""The `config.json` that is equivalent to the fields of a GGUF file.

Each field is taken out of the file's as it is read. What is left in the end must change
nothing, or the file is refused: a model with a field unread would be another model.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo_jax.models.families import FAMILIES
from grpo_jax.models.rope import RopeConfig, inverse_frequencies
from grpo_jax.weights._gguf_file import StoredTensor
from grpo_jax.weights._gguf_tokenizer import stop_ids

# Architecture of a file -> class of Hugging Face.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",  # and Olmo 3, which has windows
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "hunyuan-dense": "HunYuanDenseV1ForCausalLM",
}
# Those that have experts, in the MLP's place, and the keys of their numbers. Files of
# Mixtral are those of Llama with experts.
_MIXTURES = {
    "llama": ("MixtralForCausalLM", "num_local_experts"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "num_experts"),
}
# Architectures of which llama.cpp reorders the rows of queries and keys.
PAIRED_ROWS = frozenset({"llama", "granite", "smollm3"})
# Tensors with factors of rotary frequencies, which are part of the configuration.
_LLAMA3, _SHORT, _LONG = (
    f"rope_{name}.weight" for name in ("freqs", "factors_short", "factors_long")
)
ROPE_TENSORS = frozenset({_LLAMA3, _SHORT, _LONG})

# The number of layers of the 27B models. They scale attention by hidden size / heads
# instead of the head width, and their files do not say so.
_WIDE_GEMMA_LAYERS = {"gemma2": 46, "gemma3": 62}
_WINDOWED = frozenset({"gemma2", "gemma3", "olmo2", "phi3", "exaone4"})
_MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
# A bias that the files of a family may have, and a tensor that says so.
_BIASES = {
    "attention_bias": "blk.0.attn_q.bias",
    "attention_out_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_gate.bias",
}
# Fields that do not change what a model computes here: sizes that the tensors have too,
# bookkeeping, and the layout of tensors in the file that was converted.
_IGNORED = frozenset(
    """
    vocab_size tensor_data_layout pooling_type expert_used_count rope.scaling.finetuned
    """.split()
)
_KINDS = {True: "sliding_attention", False: "full_attention"}


def hf_config(
    fields: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, Any]:
    """Returns the `config.json` of a file's fields and its tensors by name.

    Raises:
        KeyError: a field that every model needs is missing.
        ValueError: the architecture, or a field that changes the model, is not
            supported.
    """
    name = fields.get("general.architecture")
    known = _ARCHITECTURES.keys() | _MIXTURES.keys()
    if name not in known:
        raise ValueError(
            f"architecture {name!r} is not supported in GGUF; supported are "
            f"{sorted(known)}"
        )
    own = {
        key.removeprefix(f"{name}."): _one_value(key, value)
        for key, value in fields.items()
        if key.startswith(f"{name}.")
    }
    windows = _windows(own) if name in _WINDOWED else {}
    architecture, experts = _architecture(name, own)
    if name == "olmo2":
        windowed = windows["sliding_window"] is not None
        architecture = "Olmo3ForCausalLM" if windowed else architecture
        windows = windows if windowed else {}
    heads, width = own.pop("attention.head_count"), own.pop("embedding_length")
    head_dim = own.pop("attention.key_length", width // heads)
    hf = {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].model_type,
        "vocab_size": stored["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": own.pop("feed_forward_length"),
        "num_hidden_layers": own.pop("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.pop("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": own.pop("context_length"),
        "rms_norm_eps": own.pop("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in stored,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(stop_ids(fields)) or None,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        **windows,
        **experts,
    }
    if name == "exaone4" and hf["sliding_window"] is None:
        hf["layer_types"] = ["full_attention"] * hf["num_hidden_layers"]
    defaults = FAMILIES[architecture].defaults
    hf |= {key: tensor in stored for key, tensor in _BIASES.items() if key in defaults}
    if name == "granite":
        hf |= _granite_options(own, head_dim)
    if name in _WIDE_GEMMA_LAYERS:
        wide = hf["num_hidden_layers"] == _WIDE_GEMMA_LAYERS[name]
        hf |= _gemma_options(own, width // heads if wide else head_dim)
    hf |= _rotary(own, hf, stored)
    _check_unread(name, own, head_dim)
    return hf


def _architecture(name: str, own: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class of Hugging Face, and the options of its experts if it has any."""
    count = own.pop("expert_count", 0)
    if not count and name in _ARCHITECTURES:
        return _ARCHITECTURES[name], {}
    if name not in _MIXTURES or not count:
        raise ValueError(f"{name} with expert_count={count} is not supported in GGUF")
    architecture, key = _MIXTURES[name]
    options = {key: count, "num_experts_per_tok": own.pop("expert_used_count")}
    if "moe_intermediate_size" in FAMILIES[architecture].defaults:
        # llama.cpp always divides the weights of a token's experts by their sum.
        width = own.pop("expert_feed_forward_length")
        options |= {"moe_intermediate_size": width, "norm_topk_prob": True}
    return architecture, options


def _one_value(key: str, value: Any) -> Any:
    """Returns the value of a number that may be given once for each layer."""
    if key.endswith("sliding_window_pattern") or not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{key} differs from layer to layer, which is not supported")
    return value[0]


def _windows(own: dict[str, Any]) -> dict[str, Any]:
    window = own.pop("attention.sliding_window", None) or None
    options: dict[str, Any] = {"sliding_window": window}
    match own.pop("attention.sliding_window_pattern", None):
        case [*flags] if flags and window:
            options["layer_types"] = [_KINDS[bool(flag)] for flag in flags]
        case int(every) if every and window:
            options["sliding_window_pattern"] = every
    return options


def _granite_options(own: dict[str, Any], head_dim: int) -> dict[str, Any]:
    # llama.cpp takes this field of Granite as whether there is a rotation at all.
    if not own.pop("rope.scaling.finetuned", True):
        raise ValueError("granite.rope.scaling.finetuned=False is not supported")
    scales = {theirs: own.pop(key, 0) for key, theirs in _MULTIPLIERS.items()}
    usual = {"attention_multiplier": head_dim**-0.5}
    return {key: scale or usual.get(key, 1.0) for key, scale in scales.items()}


def _gemma_options(own: dict[str, Any], attention_width: int) -> dict[str, Any]:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    options = {key: own.pop(key, None) for key in caps}
    return options | {"query_pre_attn_scalar": attention_width}


def _check_unread(name: str, left: Mapping[str, Any], head_dim: int) -> None:
    """Refuses fields that change the model and that this module does not read.

    By convention a field that is false, zero or empty is not in use.
    """
    accepted = {
        "attention.causal": True,
        "attention.value_length": head_dim,
        "attention.key_length_swa": head_dim,
        "attention.value_length_swa": head_dim,
        "rope.dimension_count_swa": head_dim,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_ext_factor": 1.0,
    }
    unread = [
        f"{name}.{key}={value!r}"
        for key, value in left.items()
        if key not in _IGNORED
        and (not math.isclose(value, accepted[key]) if key in accepted else value)
    ]
    if unread:
        raise ValueError(f"not supported: {', '.join(unread)}")


def _rotary(
    own: dict[str, Any], hf: dict[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, Any]:
    """The rotary settings; every field whose name begins with `rope` is taken."""
    family = FAMILIES[hf["architectures"][0]]
    theta = own.pop("rope.freq_base", 10_000.0)
    options = {"rope_theta": theta}
    head_dim = hf["head_dim"]
    rotary = own.pop("rope.dimension_count", head_dim)
    if "partial_rotary_factor" in family.defaults:
        options["partial_rotary_factor"] = rotary / head_dim
    elif rotary != head_dim:
        raise ValueError(
            f"rotary embeddings of {rotary} of {head_dim} dimensions are not supported"
        )
    trained = own.pop("rope.scaling.original_context_length", None)
    if "original_max_position_embeddings" in family.defaults and trained:
        options["original_max_position_embeddings"] = trained
    scaling = _scaling(own, hf | options, stored, trained)
    if family.local_theta is None:
        return options | {"rope_scaling": scaling}
    local = own.pop("rope.freq_base_swa", None)
    if "rope_local_base_freq" in family.defaults:
        local = {} if local is None else {"rope_local_base_freq": local}
        return options | {"rope_scaling": scaling} | local
    full = scaling or {"rope_type": "default"}
    return {
        "rope_parameters": {
            "full_attention": {"rope_theta": theta, **full},
            "sliding_attention": {"rope_theta": local or theta, "rope_type": "default"},
        }
    }


def _scaling(
    own: dict[str, Any],
    hf: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    trained: int | None,
) -> dict[str, Any] | None:
    # A factor without a kind scales linearly, and so does the older of its two names.
    kind = own.pop("rope.scaling.type", None)
    older = own.pop("rope.scale_linear", None)
    factor = own.pop("rope.scaling.factor", older) or 1.0
    if _LLAMA3 in stored:
        return _llama3_scaling(hf, stored)
    if _SHORT in stored and _LONG in stored:
        lists = {"short_factor": _SHORT, "long_factor": _LONG}
        return {
            "rope_type": "longrope",
            "original_max_position_embeddings": trained,
            "attention_factor": own.pop("rope.scaling.attn_factor", 1.0),
            **{key: as_written(stored[name].values()) for key, name in lists.items()},
        }
    if kind == "none" or (factor == 1.0 and kind != "longrope"):
        return None
    if kind == "yarn":
        return _yarn_scaling(own, factor, trained)
    if kind not in (None, "linear"):
        raise ValueError(f"rotary scaling {kind!r} is not supported in GGUF")
    return {"rope_type": "linear", "factor": float(factor)}


def _yarn_scaling(
    own: dict[str, Any], factor: float, trained: int | None
) -> dict[str, Any]:
    """YaRN whose attention factor is that of its paper, 1 + 0.1 log(factor)."""
    attention = 1.0 + 0.1 * math.log(factor)
    given = own.pop("rope.scaling.yarn_attn_factor", attention)
    if not math.isclose(given, attention, rel_tol=1e-4):
        raise ValueError(
            f"rope.scaling.yarn_attn_factor={given} is not supported; only "
            f"{attention:.4f} is, which belongs to the factor {factor}"
        )
    keys = ("beta_fast", "beta_slow")
    betas = {key: own.pop(f"rope.scaling.yarn_{key}", None) for key in keys}
    return {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": trained,
        **betas,
    }


def _llama3_scaling(
    hf: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, Any]:
    """Llama 3.1, of which the file has the frequency divisors alone.

    The largest is the factor. The other settings are taken to be those of all Llama 3
    models, which must give the divisors back.
    """
    factors = stored[_LLAMA3].values()
    scaling = {
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, scaled = (
        inverse_frequencies(
            RopeConfig(theta=hf["rope_theta"], **options), head_dim=hf["head_dim"]
        )
        for options in ({}, {"kind": "llama3", **scaling})
    )
    if not np.allclose(plain / scaled, factors, rtol=1e-3):
        raise ValueError(f"{_LLAMA3} are not those of a Llama 3 model")
    return {"rope_type": "llama3", **scaling}


def as_written(numbers: Any) -> Any:
    """Returns numbers of float32 as they were written before they were stored.

    1e-5 is 9.999999747378752e-06 in float32, and means 1e-5.
    """
    if isinstance(numbers, float):
        return float(str(np.float32(numbers)))
    return [float(str(number)) for number in np.asarray(numbers, np.float32)]
