"""Checks of a parsed `config.json`: keys not honored here, values of no use."""

import functools
import logging
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

from grpo_jax.models import families
from grpo_jax.models.families import FAMILIES, Family


@functools.cache
def foreign_keys() -> frozenset[str]:
    """Keys by which architectures other than those here change their model.

    One of them in the file of a supported architecture says that the file belongs to
    another implementation. A key that no list here has changes nothing anywhere.
    """
    file = resources.files("grpo_jax") / "assets" / "foreign_keys.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    return frozenset(" ".join(x for x in lines if not x.startswith("#")).split())


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_tokens(value: Any) -> bool:
    ids = value if isinstance(value, list | tuple) else [value]
    return all(index is None or _is_whole(index) for index in ids)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_list(value: Any) -> bool:
    lists = isinstance(value, list | tuple)
    return value is None or (lists and all(isinstance(x, str | int) for x in value))


def _is_rope(value: Any) -> bool:
    """Whether this is one rotary setting, or one for each type of layer."""
    if not value:
        return True
    if not isinstance(value, Mapping):
        return False
    kinds = [value.get(key) for key in ("full_attention", "sliding_attention")]
    settings = [value, *(kind for kind in kinds if kind is not None)]
    return all(
        isinstance(setting, Mapping)
        and isinstance(setting.get("rope_type", setting.get("type", "")), str | None)
        for setting in settings
    )


# Keys, a test of their values, and what a value must be.
_TYPES = (
    (
        (
            *families.REQUIRED_KEYS,
            *("max_position_embeddings", "num_experts", "num_local_experts"),
            *("num_experts_per_tok", "moe_intermediate_size"),
            *("linear_conv_kernel_dim", "linear_num_key_heads"),
            *("linear_num_value_heads", "linear_key_head_dim"),
            *("linear_value_head_dim", "conv_L_cache"),
        ),
        _is_size,
        "a positive whole number",
    ),
    (
        ("num_key_value_heads", "head_dim"),
        lambda value: value is None or _is_size(value),
        "a positive whole number",
    ),
    (
        (
            *(
                "rms_norm_eps",
                "norm_eps",
                "embedding_multiplier",
                "residual_multiplier",
            ),
            *("attention_multiplier", "logits_scaling", "partial_rotary_factor"),
        ),
        _is_number,
        "a number",
    ),
    (
        (
            *("rope_theta", "rope_local_base_freq", "attn_logit_softcapping"),
            *("final_logit_softcapping", "original_max_position_embeddings"),
        ),
        lambda value: value is None or _is_number(value),
        "a number",
    ),
    (
        ("query_pre_attn_scalar", "no_rope_layer_interval"),
        lambda value: _is_number(value) and value > 0,
        "a positive number",
    ),
    (("max_window_layers",), _is_whole, "a whole number"),
    (
        ("sliding_window",),
        lambda value: value is None or _is_whole(value),
        "a whole number",
    ),
    (
        (
            *("tie_word_embeddings", "attention_bias", "attention_out_bias"),
            *("mlp_bias", "use_sliding_window", "norm_topk_prob"),
        ),
        # A text that says "false" would be true.
        lambda value: value in (None, 0, 1) and isinstance(value, int | None),
        "true or false",
    ),
    (("layer_types", "no_rope_layers"), _is_list, "a list of names or flags"),
    (
        ("hidden_act", "hidden_activation"),
        lambda value: value is None or isinstance(value, str),
        "a name",
    ),
    (("rope_scaling", "rope_parameters"), _is_rope, "an object"),
    (("bos_token_id", "eos_token_id", "pad_token_id"), _is_tokens, "a token id"),
)

_LOG = logging.getLogger(__name__)


def check_names(hf: Mapping[str, Any]) -> None:
    """Raises ValueError unless `architectures`, if any, is a list of names."""
    names = hf.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"config.json: architectures must be a list of names, got {names!r}"
        )


def check_keys(hf: Mapping[str, Any], family: Family) -> None:
    """Refuses what changes the model, or may: a key that some implementation reads.

    Raises:
        ValueError: naming every such key, and every one that is missing.
    """
    required = (*families.REQUIRED_KEYS, *family.required)
    fixed = {**families.FIXED_KEYS, **family.fixed}
    read_keys = {*families.REQUIRED_KEYS, *families.ROPE_KEYS, *family.defaults}
    known = {*read_keys, *families.IGNORED_KEYS, *family.ignored, *fixed}
    # An unknown key that is null, false, zero or empty is taken as "not in use".
    unknown = sorted(key for key in set(hf) - known if hf[key])
    known_somewhere = foreign_keys().union(*(f.defaults for f in FAMILIES.values()))
    # Code that comes with the files may read any key.
    may_be_read = unknown if hf.get("auto_map") else known_somewhere & {*unknown}
    problems = [
        *(f"missing {key}" for key in required if key not in hf),
        *(
            f"{key}={hf[key]!r} is not supported (only {fixed[key]!r} is)"
            for key in sorted(set(hf) & set(fixed) - read_keys)
            if hf[key] not in (None, fixed[key])
        ),
        *(f"{key}={hf[key]!r} is not supported" for key in sorted(may_be_read)),
    ]
    if problems:
        raise ValueError("config.json: " + "; ".join(problems))
    if unknown:
        unread = ", ".join(f"{key}={hf[key]!r}" for key in unknown)
        _LOG.warning(
            "config.json: ignored, because no architecture reads it: %s", unread
        )


def check_values(values: Mapping[str, Any]) -> None:
    """Checks that sizes, rotary settings and token ids are of the right type.

    Raises:
        ValueError: naming every key that is not.
    """
    problems = [
        f"{key} must be {words}, got {values[key]!r}"
        for keys, is_right, words in _TYPES
        for key in keys
        if key in values and not is_right(values[key])
    ]
    if problems:
        raise ValueError("config.json: " + "; ".join(problems))
