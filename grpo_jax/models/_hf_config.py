"""Reading and writing Hugging Face `config.json` as the fields of a ModelConfig.

Rotary settings are read in `_hf_rope`. A field that the decoder does not support is an
error that names it. A field that no implementation reads is ignored.
"""

from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.models import families
from grpo_jax.models._hf_checks import check_keys, check_names, check_values
from grpo_jax.models._hf_conv import plain_keys
from grpo_jax.models._hf_gemma4 import refuse_gemma4
from grpo_jax.models._hf_mixers import attention_types, read_mixer, write_mixer
from grpo_jax.models._hf_rope import FULL, SLIDING, read_rope, write_rope
from grpo_jax.models._hf_wrappers import text_of
from grpo_jax.models._routing import ExpertsConfig
from grpo_jax.models.families import FAMILIES, Family

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
# Written under the same name as the field holds.
_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "pad_token_id",
)
_OTHER_NAME = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
}
# Written under another name, and 1 where the family has no such key.
_MULTIPLIERS = {
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_divisor",
}
_FIELDS = {name: name for name in _SAME_NAME} | _OTHER_NAME


def read(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the ModelConfig that a parsed `config.json` describes.

    Raises:
        ValueError: unknown architecture, missing keys, or an unsupported option.
    """
    check_names(hf)
    refuse_gemma4(hf)
    hf = text_of(hf)
    architecture = _architecture(hf)
    family = FAMILIES[architecture]
    hf = _one_name_each(hf, family.aliases)
    hf = plain_keys(hf) if "conv_L_cache" in family.defaults else hf
    check_keys(hf, family)
    # What is left of other families is not in use, whatever its type.
    keys = {*families.REQUIRED_KEYS, *families.ROPE_KEYS, *family.defaults}
    values = {**family.defaults, **{key: hf[key] for key in keys & hf.keys()}}
    check_values(values)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values["head_dim"] or width // heads
    if not head_dim:
        raise ValueError(
            f"config.json: hidden_size {width} is less than num_attention_heads "
            f"{heads}; heads of another size need head_dim"
        )
    bias = bool(values.get("attention_bias"))
    fields = {field: values.get(key) for key, field in _FIELDS.items()}
    fields |= {field: values.get(key, 1.0) for key, field in _MULTIPLIERS.items()}
    return fields | {
        "architecture": architecture,
        # LFM2 alone has a name of its own.
        "norm_eps": values.get("rms_norm_eps", values.get("norm_eps")),
        "num_kv_heads": values["num_key_value_heads"] or heads,
        "head_dim": head_dim,
        "attention_bias": bias or family.qkv_bias,
        "output_bias": bool(values.get(family.output_bias or "")),
        "mlp_bias": bool(values.get("mlp_bias")),
        "qk_norm": family.qk_norm,
        "sandwich_norm": family.sandwich_norm,
        "post_norm": family.post_norm,
        "norm_offset": family.norm_offset,
        "rotary_neighbors": family.rotary_neighbors,
        "activation": _activation(values, family),
        "attention_scale": values.get(
            "attention_multiplier",
            values.get("query_pre_attn_scalar", head_dim) ** -0.5,
        ),
        "embedding_scale": width**0.5
        if family.scaled_embedding
        else values.get("embedding_multiplier", 1.0),
        "eos_token_ids": _token_ids(values["eos_token_id"]),
        "experts": _experts(values),
        "mixer": read_mixer(values),
        "attention_gate": family.attention_gate,
        **_layers(attention_types(values), family),
    }


def _one_name_each(hf: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Returns keys without their other names, one of which may be null."""
    plain = dict(hf)
    for alias, name in aliases.items():
        if alias not in plain:
            continue
        one, other = plain.pop(alias), plain.get(name)
        if None not in (one, other) and one != other:
            raise ValueError(
                f"config.json: {alias}={one!r} and {name}={other!r} are two names of "
                "one key and differ"
            )
        plain[name] = other if one is None else one
    return plain


def write(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `config.json` of a ModelConfig's fields, in transformers 4 spelling.

    Only fields for which the architecture has a key are written. The caller reads the
    result back and compares.
    """
    architecture = fields["architecture"]
    if architecture not in FAMILIES:
        raise ValueError(_unknown_architecture(architecture))
    family = FAMILIES[architecture]
    known = (*families.REQUIRED_KEYS, *family.defaults)
    eos = fields["eos_token_ids"]
    values = {
        **{key: fields[field] for key, field in (_FIELDS | _MULTIPLIERS).items()},
        "attention_out_bias": fields["output_bias"],
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "query_pre_attn_scalar": round(fields["attention_scale"] ** -2),
        "attention_multiplier": fields["attention_scale"],
        "embedding_multiplier": fields["embedding_scale"],
        **_write_windows(fields, family),
        "norm_eps": fields["norm_eps"],
        "block_auto_adjust_ff_dim": False,
        **_write_experts(fields["experts"]),
        **write_mixer(fields["mixer"]),
    }
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    values["hidden_act"] = activations[fields["activation"]]
    values["hidden_activation"] = values["hidden_act"]
    values["no_rope_layers"] = [int(i is not None) for i in fields["layer_rope"]]
    hf = {key: values[key] for key in known if key in values}
    hf |= write_rope(fields, family)
    return {"architectures": [architecture], "model_type": family.model_type, **hf}


def _architecture(hf: Mapping[str, Any]) -> str:
    by_type = {family.model_type: name for name, family in FAMILIES.items()}
    model_type = str(hf.get("model_type"))
    named = hf.get("architectures") or [by_type.get(model_type, model_type)]
    if len(named) != 1 or named[0] not in FAMILIES:
        raise ValueError(_unknown_architecture(named[0] if len(named) == 1 else named))
    expected = FAMILIES[named[0]].model_type
    if model_type != expected:
        raise ValueError(
            f"model_type {model_type!r} does not belong to architecture {named[0]}; "
            f"expected {expected!r}"
        )
    return named[0]


def _unknown_architecture(name: object) -> str:
    return f"architecture {name!r} is not supported; expected one of {sorted(FAMILIES)}"


def _activation(values: Mapping[str, Any], family: Family) -> str:
    gemma = "hidden_activation" in family.defaults
    key = "hidden_activation" if gemma else "hidden_act"
    # Gemma files may hold an explicit null, which stands for the tanh approximation.
    name = (
        "gelu_pytorch_tanh"
        if gemma and values[key] is None
        else values.get(key, "silu")
    )
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"config.json: {key}={name!r} is not supported; expected one of "
            f"{sorted(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _window(values: Mapping[str, Any], family: Family) -> int | None:
    # Mistral and Gemma have no switch, and do not look for one.
    switched = "use_sliding_window" in family.defaults
    in_use = values["use_sliding_window"] if switched else True
    return values.get("sliding_window") if in_use else None


def _experts(values: Mapping[str, Any]) -> ExpertsConfig | None:
    if "num_experts_per_tok" not in values:
        return None
    of_all = "num_experts" if "num_experts" in values else "num_local_experts"
    own_width = "moe_intermediate_size" in values
    width = "moe_intermediate_size" if own_width else "intermediate_size"
    try:
        return ExpertsConfig(
            count=values[of_all],
            per_token=values["num_experts_per_tok"],
            width=values[width],
            # Mixtral has no such key: its weights always sum to 1.
            normalized=values.get("norm_topk_prob", True),
        )
    except ValueError as error:
        raise ValueError(
            f"config.json: {of_all}, num_experts_per_tok and {width}: {error}"
        ) from error


def _write_experts(experts: ExpertsConfig | None) -> dict[str, Any]:
    if experts is None:
        return {}
    return {
        "num_experts": experts.count,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.normalized,
    }


def _layers(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of a ModelConfig about positions and about single layers."""
    window, positions = _window(values, family), read_rope(values, family)
    layer_types = _layer_types(values, window, family)
    windows = {FULL: None, SLIDING: window}
    settings = {FULL: 0, SLIDING: len(positions["rope"]) - 1}
    rotates = _rotates(values)
    if family.only_windows_rotate and window is not None:
        rotates = [kind == SLIDING for kind in layer_types]
    rotated = zip(layer_types, rotates, strict=True)
    return {
        **positions,
        "layer_rope": tuple(settings[t] if rotates else None for t, rotates in rotated),
        "layer_window": tuple(windows[t] for t in layer_types),
    }


# Whether layer i has a window, for each value of `Family.windows`.
_HAS_WINDOW: Mapping[str, Callable[[int, Mapping[str, Any]], bool]] = {
    "none": lambda i, values: False,
    "all": lambda i, values: True,
    "late": lambda i, values: i >= values["max_window_layers"],
    "alternating": lambda i, values: i % 2 == 0,
    "patterned": lambda i, values: (i + 1) % values["sliding_window_pattern"] != 0,
    "of_four": lambda i, values: (i + 1) % 4 != 0,
    "unrotated": lambda i, values: not _rotates(values)[i],
}


def _layer_types(
    values: Mapping[str, Any], window: int | None, family: Family
) -> list[str]:
    num_layers, given = values["num_hidden_layers"], values.get("layer_types")
    if given is None:
        pattern = values.get("sliding_window_pattern", 1)
        if not isinstance(pattern, int) or pattern < 1:
            raise ValueError(
                "config.json: without layer_types, sliding_window_pattern must be a "
                f"positive whole number, got {pattern!r}"
            )
        # Some classes window their layers even where the file has no window.
        always = family.windows in ("alternating", "patterned", "of_four")
        in_use = window is not None or always
        has_window = _HAS_WINDOW[family.windows if in_use else "none"]
        kinds = (FULL, SLIDING)
        given = [kinds[has_window(i, values)] for i in range(num_layers)]
    if set(given) - {FULL, SLIDING} or len(given) != num_layers:
        raise ValueError(
            f"config.json: layer_types must have {num_layers} entries, each "
            f"{FULL!r} or {SLIDING!r}; got {given}"
        )
    if window is None and SLIDING in given:
        raise ValueError(
            f"layer_types names {SLIDING!r}, but sliding_window is not set (or "
            "use_sliding_window is false)"
        )
    return list(given)


def _rotates(values: Mapping[str, Any]) -> list[bool]:
    num_layers = values["num_hidden_layers"]
    flags = values.get("no_rope_layers")
    if flags is None and "no_rope_layer_interval" in values:
        every = values["no_rope_layer_interval"]
        flags = [(i + 1) % every != 0 for i in range(num_layers)]
    # Despite its name, an entry of 1 in no_rope_layers means that the layer rotates.
    flags = [True] * num_layers if flags is None else [bool(flag) for flag in flags]
    if len(flags) < num_layers:
        raise ValueError(
            f"config.json: no_rope_layers has {len(flags)} entries for {num_layers} "
            "layers"
        )
    return flags[:num_layers]


def _write_windows(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    windows = fields["layer_window"]
    layer_types = [FULL if window is None else SLIDING for window in windows]
    window = max((w for w in windows if w is not None), default=None)
    in_none = family.windows == "all" or family.only_windows_rotate
    late = next((i for i, w in enumerate(windows) if w is not None), len(windows))
    return {
        "use_sliding_window": window is not None,
        # Gemma's class builds the windowed mask even where no layer uses it.
        "sliding_window": window
        or (None if in_none else family.defaults.get("sliding_window")),
        "max_window_layers": late,
        "layer_types": layer_types,
    }
