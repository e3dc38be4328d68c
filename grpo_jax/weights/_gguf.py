"""GGUF files: weights, configuration and tokenizer of a model in one file.

Tensors are dequantized to float32, in the layout of Hugging Face files. llama.cpp
changes two kinds of tensors on conversion, and this module changes them back. It
reorders the rows of Llama's query and key projections, because its rotary embedding
pairs neighbors. And it stores the norms of Gemma as the whole multiplier, 1 + w.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.families import FAMILIES
from grpo_jax.models.rope import RopeConfig, inverse_frequencies
from grpo_jax.weights._gguf_file import StoredTensor, read_file
from grpo_jax.weights._gguf_tokenizer import stop_ids
from grpo_jax.weights._names import Tensor, parameter_table

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
# The number of layers of the 27B models. They scale attention by hidden size / heads
# instead of the head width, and their files do not say so.
_WIDE_GEMMA_LAYERS = {"gemma2": 46, "gemma3": 62}
_ROPE_FACTORS = "rope_freqs.weight"

# Fields that do not change what a model computes here: sizes that the tensors have too,
# bookkeeping, and the layout of tensors in the file that was converted.
_IGNORED = frozenset(
    """
    vocab_size tensor_data_layout pooling_type expert_used_count
    rope.scaling.finetuned rope.scaling.original_context_length
    """.split()
)
_READ = frozenset(
    """
    context_length embedding_length block_count feed_forward_length expert_count
    attention.head_count attention.head_count_kv attention.key_length
    attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base
    rope.scaling.type rope.scaling.factor rope.scale_linear
    """.split()
)
_READ_OF_GEMMA = _READ.union(
    """
    attention.sliding_window attention.sliding_window_pattern rope.freq_base_swa
    attn_logit_softcapping final_logit_softcapping
    """.split()
)


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """The content of a GGUF file; tensors have their Hugging Face names."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    fields: Mapping[str, Any]  # metadata by key


@dataclasses.dataclass(frozen=True)
class _GgufTensor:
    """A tensor of a memory-mapped GGUF file."""

    data: StoredTensor
    file: str
    rotary_heads: int | None  # heads whose rows are in rotary pairs
    shifted: bool  # a norm that is stored as 1 + w

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        # Heads are reordered whole; of other matrices only the rows asked for are read.
        part = self.rotary_heads is None and len(self.shape) == 2
        try:
            values = self.data.values(index[0]) if part else self.data.values()
        except NotImplementedError as error:
            raise ValueError(
                f"{self.data.name} in {self.file} has type {self.data.kind}, which "
                "cannot be dequantized; use a file in F16, BF16, F32, Q8_0 or Q4_K_M"
            ) from error
        if part:
            return values[:, index[1]]
        if self.rotary_heads is not None:
            # Rows (pair, first or second) of a head become (first or second, pair).
            pairs = values.reshape(self.rotary_heads, -1, 2, *values.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if self.shifted:
            values = values - np.float32(1.0)
        return values[index]


def open_gguf(path: pathlib.Path) -> GgufModel:
    """Returns the model of a GGUF file, with its tensors unread.

    Raises:
        ValueError: naming the file. It is truncated or no GGUF file, a part of a split
            model, or of an architecture or kind that is not supported.
    """
    fields, stored = _read_file(path)
    if fields.get("split.count", 0) > 1:
        raise ValueError(
            f"{path} is one part of {fields['split.count']}; join them with "
            "llama-gguf-split --merge"
        )
    try:
        config = ModelConfig.from_hf(_hf_config(fields, stored))
    except KeyError as error:
        raise ValueError(f"cannot load {path}: it has no {error}") from error
    except ValueError as error:
        raise ValueError(f"cannot load {path}: {error}") from error
    hf_names = {
        gguf_name: name
        for row in parameter_table(config)
        for gguf_name, name in zip(row.gguf_names, row.names, strict=True)
    }
    rotary = {}
    if fields["general.architecture"] == "llama":
        rotary = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    tensors: dict[str, Tensor] = {
        hf_names.get(name, name): _GgufTensor(
            data=tensor,
            file=str(path),
            rotary_heads=rotary.get(name.split(".")[-2]) if "." in name else None,
            shifted=bool(config.norm_offset) and name.endswith("norm.weight"),
        )
        for name, tensor in stored.items()
        if name != _ROPE_FACTORS
    }
    return GgufModel(config=config, tensors=tensors, fields=fields)


def _read_file(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The fields of a file, and its tensors by name, unread."""
    try:
        fields, stored = read_file(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a complete GGUF file ({error}); download or copy it again"
        ) from error
    # Numbers are stored in float32: 1e-5 means that, not 9.999999747378752e-06.
    fields |= {
        name: float(str(np.float32(value)))
        for name, value in fields.items()
        if isinstance(value, float)
    }
    return fields, stored


def _hf_config(fields: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json that is equivalent to the fields."""
    name = fields.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"architecture {name!r} is not supported in GGUF; supported are "
            f"{sorted(_ARCHITECTURES)}"
        )
    own = {
        key.removeprefix(f"{name}."): _one_value(key, value)
        for key, value in fields.items()
        if key.startswith(f"{name}.")
    }
    if own.get("expert_count"):
        raise ValueError("mixtures of experts are not supported")
    heads, width = own["attention.head_count"], own["embedding_length"]
    head_dim = own.get("attention.key_length", width // heads)
    hf = {
        "architectures": [_ARCHITECTURES[name]],
        "model_type": FAMILIES[_ARCHITECTURES[name]].model_type,
        "vocab_size": stored["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": own["attention.layer_norm_rms_epsilon"],
        "rope_theta": own.get("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in stored,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(stop_ids(fields)) or None,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    rotary = own.get("rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise ValueError(
            f"rotary embeddings of {rotary} of {head_dim} dimensions are not supported"
        )
    hf["rope_scaling"] = _rope_scaling(own, hf, stored)
    if name == "llama":
        hf["attention_bias"] = "blk.0.attn_q.bias" in stored
        hf["mlp_bias"] = "blk.0.ffn_gate.bias" in stored
    gemma = name in _WIDE_GEMMA_LAYERS
    if gemma:
        wide = own["block_count"] == _WIDE_GEMMA_LAYERS[name]
        hf |= _gemma_options(own, width // heads if wide else head_dim)
    _check_unread(name, own, _READ_OF_GEMMA if gemma else _READ, head_dim)
    return hf


def _one_value(key: str, value: Any) -> Any:
    """Returns the value of a number that may be given once for each layer."""
    if key.endswith("sliding_window_pattern") or not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{key} differs from layer to layer, which is not supported")
    return value[0]


def _check_unread(
    name: str, own: Mapping[str, Any], read: frozenset[str], head_dim: int
) -> None:
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
    }
    unread = [
        f"{name}.{key}={value!r}"
        for key, value in own.items()
        if key not in read | _IGNORED
        and (not math.isclose(value, accepted[key]) if key in accepted else value)
    ]
    if unread:
        raise ValueError(f"not supported: {', '.join(unread)}")


def _gemma_options(own: Mapping[str, Any], attention_width: int) -> dict[str, Any]:
    options = {
        "query_pre_attn_scalar": attention_width,
        "sliding_window": own.get("attention.sliding_window"),
        "attn_logit_softcapping": own.get("attn_logit_softcapping"),
        "final_logit_softcapping": own.get("final_logit_softcapping"),
    }
    if (local := own.get("rope.freq_base_swa")) is not None:
        options["rope_local_base_freq"] = local
    match own.get("attention.sliding_window_pattern"):
        case [*flags] if flags:
            kinds = {True: "sliding_attention", False: "full_attention"}
            options["layer_types"] = [kinds[bool(flag)] for flag in flags]
        case int(every) if every:
            options["sliding_window_pattern"] = every
    return options


def _rope_scaling(
    own: Mapping[str, Any], hf: Mapping[str, Any], stored: Mapping[str, Any]
) -> dict[str, Any] | None:
    if _ROPE_FACTORS in stored:
        # Llama 3.1, of which the file has the frequency divisors alone. The largest is
        # the factor. The other settings are taken to be those of all Llama 3 models,
        # which must give the divisors back.
        factors = stored[_ROPE_FACTORS].values()
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
            raise ValueError(f"{_ROPE_FACTORS} are not those of a Llama 3 model")
        return {"rope_type": "llama3", **scaling}
    # A factor without a kind scales linearly, and so does the older of its two names.
    kind = own.get("rope.scaling.type", "linear")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear")) or 1.0
    if kind == "none" or factor == 1.0:
        return None
    if kind != "linear":
        raise ValueError(f"rotary scaling {kind!r} is not supported in GGUF")
    return {"rope_type": "linear", "factor": float(factor)}
