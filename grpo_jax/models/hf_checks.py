"""Checks of a parsed `config.json`: keys not honored here, values of no use."""

import logging
from collections.abc import Mapping
from typing import Any

from grpo_jax.models import families
from grpo_jax.models.families import FAMILIES, Family
from grpo_jax.models.foreign_keys import FOREIGN_KEYS

# Keys that mean something to some architecture.
_MEANINGFUL = FOREIGN_KEYS.union(*(family.defaults for family in FAMILIES.values()))

_WHOLE = (
    *families.REQUIRED_KEYS,
    *("max_position_embeddings", "num_key_value_heads", "head_dim"),
    *("num_experts", "num_local_experts", "num_experts_per_tok"),
    "moe_intermediate_size",
)
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

_LOG = logging.getLogger(__name__)


def check_keys(hf: Mapping[str, Any], family: Family) -> None:
    """Refuses what changes the model, or may: a key that some implementation reads.

    Raises:
        ValueError: naming every such key, and every one that is missing.
    """
    required = (*families.REQUIRED_KEYS, *family.required)
    problems = [f"missing {key}" for key in required if key not in hf]
    fixed = {**families.FIXED_KEYS, **family.fixed}
    read_keys = {*families.REQUIRED_KEYS, *families.ROPE_KEYS, *family.defaults}
    harmless = read_keys | families.IGNORED_KEYS | family.ignored
    unread = []
    for key in sorted((set(hf) - harmless) | (set(hf) & set(fixed) - read_keys)):
        only = fixed.get(key)
        # An unknown key that is null, false, zero or empty is taken as "not in use".
        if hf[key] in (None, only) if key in fixed else not hf[key]:
            continue
        # Code that comes with the files may read any key.
        if key in fixed or key in _MEANINGFUL or hf.get("auto_map"):
            remedy = "" if only is None else f" (only {only!r} is)"
            problems.append(f"{key}={hf[key]!r} is not supported{remedy}")
        else:
            unread.append(f"{key}={hf[key]!r}")
    if problems:
        raise ValueError("config.json: " + "; ".join(problems))
    if unread:
        _LOG.warning(
            "config.json: ignored, because no architecture reads it: %s",
            ", ".join(unread),
        )


def check_values(values: Mapping[str, Any]) -> None:
    """Checks that sizes, rotary settings and token ids are of the right type.

    Raises:
        ValueError: naming every key that is not.
    """
    problems = [
        f"{key} must be a positive whole number, got {values[key]!r}"
        for key in _WHOLE
        if key in values
        and not (_is_whole(values[key]) and values[key] > 0)
        and not (values[key] is None and key in _MAY_BE_NULL)
    ]
    for key in ("rms_norm_eps", "rope_theta"):
        value = values.get(key, 1.0)
        unset = value is None and key == "rope_theta"
        if not unset and not isinstance(value, int | float):
            problems.append(f"{key} must be a number, got {value!r}")
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key) or {}, Mapping):
            problems.append(f"{key} must be an object, got {values[key]!r}")
    for key in _TOKENS:
        ids = values.get(key)
        ids = ids if isinstance(ids, list | tuple) else [ids]
        if not all(index is None or _is_whole(index) for index in ids):
            problems.append(f"{key} must be a token id, got {values[key]!r}")
    if problems:
        raise ValueError("config.json: " + "; ".join(problems))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
