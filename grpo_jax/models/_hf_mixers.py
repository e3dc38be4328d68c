"""Reading and writing the keys of `config.json` about layers without attention."""

from collections.abc import Mapping
from typing import Any

from grpo_jax.models._delta import DeltaConfig
from grpo_jax.models._hf_conv import read_conv, write_conv
from grpo_jax.models._hf_rope import FULL
from grpo_jax.models._short_conv import ConvConfig

LINEAR = "linear_attention"
# The field of a DeltaConfig that each key holds.
_FIELDS = {
    "linear_num_key_heads": "key_heads",
    "linear_num_value_heads": "value_heads",
    "linear_key_head_dim": "key_dim",
    "linear_value_head_dim": "value_dim",
    "linear_conv_kernel_dim": "kernel",
}


def read_mixer(values: Mapping[str, Any]) -> DeltaConfig | ConvConfig | None:
    """The settings of these layers; None of an architecture that has none.

    Raises:
        ValueError: by key, for layers of another kind, and sizes that do not fit.
    """
    if not _FIELDS.keys() <= values.keys():
        return read_conv(values)
    count, kinds = values["num_hidden_layers"], values["layer_types"]
    if kinds is None:
        every = values["full_attention_interval"]
        if not isinstance(every, int) or every < 1:
            raise ValueError(
                "config.json: full_attention_interval must be a positive whole number, "
                f"got {every!r}"
            )
        kinds = [LINEAR if (i + 1) % every else FULL for i in range(count)]
    if set(kinds) - {FULL, LINEAR} or len(kinds) != count:
        raise ValueError(
            f"config.json: layer_types must have {count} entries, each {FULL!r} or "
            f"{LINEAR!r}; got {kinds}"
        )
    sizes: dict[str, Any] = {field: values[key] for key, field in _FIELDS.items()}
    try:
        return DeltaConfig(layers=tuple(kind == LINEAR for kind in kinds), **sizes)
    except ValueError as error:
        raise ValueError(
            f"config.json: layer_types and {', '.join(_FIELDS)}: {error}"
        ) from error


def attention_types(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys as those of a model in which all layers have attention to all tokens."""
    mixed = _FIELDS.keys() <= values.keys() or "conv_L_cache" in values
    return {**values, "layer_types": None} if mixed else values


def write_mixer(delta: DeltaConfig | ConvConfig | None) -> dict[str, Any]:
    """The keys that `read_mixer` reads."""
    if delta is None:
        return {}
    if isinstance(delta, ConvConfig):
        return write_conv(delta)
    sizes = {"key_heads": delta.key_heads, "value_heads": delta.value_heads}
    sizes |= {"key_dim": delta.key_dim, "value_dim": delta.value_dim}
    sizes |= {"kernel": delta.kernel}
    kinds = [LINEAR if memory else FULL for memory in delta.layers]
    return {key: sizes[f] for key, f in _FIELDS.items()} | {"layer_types": kinds}
