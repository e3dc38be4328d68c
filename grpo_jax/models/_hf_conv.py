"""Reading and writing the keys of `config.json` about layers that convolve."""

import math
from collections.abc import Mapping
from typing import Any

from grpo_jax.models._hf_rope import FULL
from grpo_jax.models._short_conv import ConvConfig

CONV = "conv"


def plain_keys(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a file of LFM2 with one spelling, and the width that its MLPs have.

    As `Lfm2Config` and `Lfm2MLP` of transformers 5.24: `block_ff_dim` goes before
    `intermediate_size`. Unless `block_auto_adjust_ff_dim` is false, two thirds of it
    times `block_ffn_dim_multiplier` are rounded up to a multiple of
    `block_multiple_of`. The result says that nothing is left to adjust.

    Raises:
        ValueError: by key, for a value of no use.
    """
    plain = {**hf}
    if plain.get("layer_types") is None:
        plain["layer_types"] = _kinds(plain)
    plain.pop("full_attn_idxs", None)
    if "tie_embedding" in plain:
        plain["tie_word_embeddings"] = plain.pop("tie_embedding")
    given = plain.keys() & {"block_ff_dim", "intermediate_size"}
    width = plain.pop("block_ff_dim", plain.get("intermediate_size", 0))
    adjusted = plain.pop("block_auto_adjust_ff_dim", True)
    multiplier = plain.pop("block_ffn_dim_multiplier", 1.0)
    multiple = plain.pop("block_multiple_of", 256)
    if not given:
        return plain  # what is missing is named with all that is
    if not isinstance(adjusted, bool):
        raise ValueError(
            "config.json: block_auto_adjust_ff_dim must be true or false, got "
            f"{adjusted!r}"
        )
    if not _is_size(width):
        raise ValueError(
            "config.json: block_ff_dim or intermediate_size must be a positive whole "
            f"number, got {width!r}"
        )
    if adjusted:
        width = int(2 * width / 3)
        if multiplier is not None:
            width = _rounded(width, multiplier, multiple)
    return {**plain, "intermediate_size": width, "block_auto_adjust_ff_dim": False}


def read_conv(values: Mapping[str, Any]) -> ConvConfig | None:
    """The settings of these layers; None of an architecture that has none.

    Raises:
        ValueError: by key, for layers of another kind, and sizes that do not fit.
    """
    if "conv_L_cache" not in values:
        return None
    count, kinds = values["num_hidden_layers"], values["layer_types"]
    if set(kinds) - {FULL, CONV} or len(kinds) != count:
        raise ValueError(
            f"config.json: layer_types must have {count} entries, each {FULL!r} or "
            f"{CONV!r}; got {kinds}"
        )
    width = values["hidden_size"]
    heads = values["num_key_value_heads"] or values["num_attention_heads"]
    try:
        return ConvConfig(
            layers=tuple(kind == CONV for kind in kinds),
            channels=width,
            groups=math.gcd(width, heads),
            kernel=values["conv_L_cache"],
        )
    except ValueError as error:
        raise ValueError(
            f"config.json: layer_types (or full_attn_idxs) and conv_L_cache: {error}"
        ) from error


def write_conv(conv: ConvConfig) -> dict[str, Any]:
    """The keys that `read_conv` reads."""
    kinds = [CONV if convolves else FULL for convolves in conv.layers]
    return {"conv_L_cache": conv.kernel, "layer_types": kinds}


def _kinds(hf: Mapping[str, Any]) -> list[str]:
    count: Any = hf.get("num_hidden_layers")
    chosen: Any = hf.get("full_attn_idxs")
    if not _is_size(count):
        raise ValueError(
            "config.json: num_hidden_layers must be a positive whole number, got "
            f"{count!r}"
        )
    if chosen is None:
        chosen = range(count)
    elif not isinstance(chosen, list) or not all(_is_index(i, count) for i in chosen):
        raise ValueError(
            f"config.json: full_attn_idxs must be a list of some of the {count} "
            f"layers, counted from 0; got {chosen!r}"
        )
    return [FULL if i in chosen else CONV for i in range(count)]


def _rounded(width: int, multiplier: Any, multiple: Any) -> int:
    is_number = isinstance(multiplier, int | float) and math.isfinite(multiplier)
    is_number = is_number and not isinstance(multiplier, bool)
    if not is_number or multiplier <= 0 or not _is_size(multiple):
        raise ValueError(
            "config.json: block_ffn_dim_multiplier must be a positive number and "
            f"block_multiple_of a positive whole one, got {multiplier!r} and "
            f"{multiple!r}"
        )
    return multiple * math.ceil(int(multiplier * width) / multiple)


def _is_index(value: Any, count: int) -> bool:
    # In Python true is 1, and 1.0 is in a range of whole numbers.
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and 0 <= value < count


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
