"""Reading and writing the rotary settings of a Hugging Face `config.json`.

Both spellings are read: `rope_theta` and `rope_scaling` of transformers 4, and
`rope_parameters` of 5, which may have an entry for each type of layer.
"""

import math
from collections.abc import Mapping
from typing import Any

from grpo_jax.models._frequencies import yarn_attention_factor
from grpo_jax.models.families import Family
from grpo_jax.models.rope import SCALING_KEYS, RopeConfig

FULL, SLIDING = "full_attention", "sliding_attention"
_KINDS = {"su": "longrope"}  # an older name
_TRAINED = "original_max_position_embeddings"
# The key of `RopeConfig.query_beta`.
_QUERY_BETA = "llama_4_scaling_beta"


def read_rope(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of a ModelConfig about positions, but those of single layers.

    `rope` has the setting of full layers, and then that of windowed ones where they
    have their own.
    """
    rope = _settings(values, family)
    limit = values["max_position_embeddings"]
    return {
        "rope": rope,
        "rotary_fraction": _fraction(values, family),
        "max_position_embeddings": min(limit, *(r.context or limit for r in rope)),
    }


def write_rope(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The keys of a `config.json` that `read_rope` reads, in the older spelling.

    In the newer one where a class knows no other or the older one cannot express it.
    """
    rope = fields["rope"]
    full = rope[0]
    limit = full.extended or fields["max_position_embeddings"]
    hf: dict[str, Any] = {"max_position_embeddings": limit}
    if _TRAINED in family.defaults:
        trained = full.original_max_position_embeddings
        hf[_TRAINED] = trained or family.defaults[_TRAINED]
    if "partial_rotary_factor" in family.defaults:
        hf["partial_rotary_factor"] = fields["rotary_fraction"]
    if "rope_parameters" in family.required:
        return hf | {"rope_parameters": _parameters(full)}
    if _is_local_fixed(family):
        local = RopeConfig(theta=full.theta)
        if rope[-1] != local or full.theta != family.local_theta:
            entries = {FULL: _parameters(full), SLIDING: _parameters(rope[-1])}
            return hf | {"rope_parameters": entries}
    elif family.local_theta is not None:
        hf["rope_local_base_freq"] = rope[-1].theta
    return hf | {"rope_theta": full.theta, "rope_scaling": _scaling(full)}


def _is_local_fixed(family: Family) -> bool:
    """Whether windowed layers have a base that no key of the older spelling has."""
    return family.local_theta is not None and (
        "rope_local_base_freq" not in family.defaults
    )


def _settings(values: Mapping[str, Any], family: Family) -> tuple[RopeConfig, ...]:
    theta = {FULL: values.get("rope_theta") or family.default_theta}
    if family.local_theta is not None:
        theta[SLIDING] = values.get("rope_local_base_freq") or family.local_theta
    parameters = values.get("rope_scaling") or values.get("rope_parameters") or {}
    nested = set(parameters) <= {FULL, SLIDING}
    if nested != (SLIDING in theta) and values.get("rope_parameters"):
        expected = {1: "one flat entry", 2: "one entry per layer type"}[len(theta)]
        raise ValueError(
            f"config.json: rope_parameters of {family.model_type} must be {expected}, "
            f"got {parameters}"
        )
    same = theta[FULL] == theta.get(SLIDING, theta[FULL])
    if not (parameters and nested) and not same and _is_local_fixed(family):
        raise ValueError(
            f"config.json: rope_theta={theta[FULL]} of {family.model_type} is that of "
            "all layers in transformers 4, and of full layers in 5. Write "
            f"rope_parameters with an entry for {FULL} and one for {SLIDING}"
        )
    by_type = parameters if nested else {FULL: parameters}
    return tuple(
        _setting(by_type.get(kind) or {}, values, family, theta=base)
        for kind, base in theta.items()
    )


def _pop_query_scale(given: dict[str, Any]) -> dict[str, Any]:
    """What the class multiplies queries by; a key that it does not read goes too."""
    given.pop("max_position_embeddings", None)
    if (beta := given.pop(_QUERY_BETA, None)) is None:
        raise ValueError(f"config.json: rope_parameters needs {_QUERY_BETA}")
    return {"query_beta": beta}


def _setting(
    parameters: Mapping[str, Any],
    values: Mapping[str, Any],
    family: Family,
    *,
    theta: float,
) -> RopeConfig:
    """The setting of a `rope_scaling` or flat `rope_parameters` entry."""
    given = {key: value for key, value in parameters.items() if value is not None}
    kind: Any = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    kind = _KINDS.get(kind, kind)
    theta = float(given.pop("rope_theta", theta))
    for key in ("partial_rotary_factor", *family.ignored_rope):
        given.pop(key, None)  # `_fraction` reads the first
    _check_numbers(given)
    if (stretch := _stretch(kind, given, values, family)) is not None:
        theta, kind, given = theta * stretch, "default", {}
    own = _pop_query_scale(given) if family.scaled_queries else {}
    if kind not in SCALING_KEYS:
        raise ValueError(
            f"rope_type {kind!r} is not supported; expected one of "
            f"{sorted(SCALING_KEYS)}"
        )
    limit = values["max_position_embeddings"]
    if _TRAINED in SCALING_KEYS[kind]:
        # Phi 3 has its own key beside. Elsewhere the longest position stands in.
        given[_TRAINED] = values.get(_TRAINED) or given.get(_TRAINED, limit)
    if kind == "yarn":
        given = _with_yarn_defaults(given)
    if kind == "longrope":
        given = _with_longrope_defaults(given, limit)
        own["extended"] = limit
    unused = sorted(set(given) - set(SCALING_KEYS[kind]))
    if kind == "default":
        # Old exports carry a factor of 1 and the trained length beside "default".
        unused = [key for key in unused if key not in SCALING_KEYS["llama3"]]
        given = {}
    if unused:
        raise ValueError(f"rope_type {kind!r} does not use {unused}")
    return RopeConfig(theta=theta, kind=kind, **given, **own)


def _stretch(
    kind: str, given: Mapping[str, Any], values: Mapping[str, Any], family: Family
) -> float | None:
    """What multiplies the base of HunYuan: alpha to the power of h / (h - 2).

    Its files name this "dynamic", beside numbers of YaRN that the class does not read.
    """
    alpha = given.get("alpha") if family.stretched_base else None
    if kind != "dynamic" or not alpha:
        return None
    width, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values["head_dim"] or width // heads
    if not (alpha > 0 and head_dim > 2):
        raise ValueError(
            f"config.json: alpha of the rotary settings must be positive, and head_dim "
            f"more than 2, got {alpha} and {head_dim}"
        )
    return alpha ** (head_dim / (head_dim - 2))


def _check_numbers(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(
                f"config.json: {key} of the rotary settings must be a number, or a "
                f"list of numbers, got {value!r}"
            )


def _with_yarn_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    scaling = dict(given)
    scales = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
    if not scaling.pop("truncate", True):
        raise ValueError("truncate=False of rope_type 'yarn' is not supported")
    if "attention_factor" not in scaling and "factor" in scaling:
        # DeepSeek's pair of scales, of which the second is of its other dimensions.
        factor, both = scaling["factor"], scales if all(scales) else (1.0, 0.0)
        top, bottom = (yarn_attention_factor(factor, mscale) for mscale in both)
        scaling["attention_factor"] = top / bottom
    return {"beta_fast": 32.0, "beta_slow": 1.0} | scaling


def _with_longrope_defaults(given: Mapping[str, Any], limit: int) -> dict[str, Any]:
    scaling = dict(given)
    trained = scaling[_TRAINED]
    if not trained > 1:
        raise ValueError(f"{_TRAINED} must be more than 1, got {trained}")
    factor = scaling.pop("factor", limit / trained)
    if "attention_factor" not in scaling:
        stretched = 1 + math.log(max(factor, 1.0)) / math.log(trained)
        scaling["attention_factor"] = math.sqrt(stretched)
    lists = ("short_factor", "long_factor")
    return scaling | {name: tuple(scaling[name]) for name in lists if name in scaling}


def _fraction(values: Mapping[str, Any], family: Family) -> float:
    """The share of each head that rotates, from either of its places."""
    entries = values.get("rope_scaling") or values.get("rope_parameters") or {}
    known = family.defaults.get("partial_rotary_factor")
    given = values.get("partial_rotary_factor")
    for entry in (entries, *entries.values()):
        if isinstance(entry, Mapping):
            given = entry.get("partial_rotary_factor", given)
    fraction = 1.0 if given is None else given
    if known is None and fraction != 1.0:
        raise ValueError(
            f"partial_rotary_factor {fraction} is not supported; only 1.0 is"
        )
    return fraction


def _scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """The `rope_scaling` entry, None for unscaled frequencies."""
    if rope.kind == "default":
        return None
    numbers = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in rope.scaling().items()
    }
    return {"rope_type": rope.kind, **numbers}


def _parameters(rope: RopeConfig) -> dict[str, Any]:
    """The `rope_parameters` entry."""
    beta = {} if rope.query_beta is None else {_QUERY_BETA: rope.query_beta}
    plain = {"rope_type": "default"}
    return {"rope_theta": rope.theta, **(_scaling(rope) or plain), **beta}
