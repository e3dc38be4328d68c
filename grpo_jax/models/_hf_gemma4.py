"""Gemma 4 is refused: which of its parts the decoder lacks, in one sentence.

The parts are those of `Gemma4TextModel` in transformers 5.24. docs/models.md says how
each would be built.
"""

from collections.abc import Iterator, Mapping
from typing import Any

# What the class of the text model assumes for keys that are absent.
_DEFAULTS: Mapping[str, Any] = {
    "head_dim": 256,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "use_bidirectional_attention": None,
}
# Keys that are in use with any other value than zero, false or null.
_PARTS = {
    "hidden_size_per_layer_input": "an input of each layer from the token",
    "num_kv_shared_layers": "keys and values that layers share",
    "attention_k_eq_v": "values that are the projected keys",
    "enable_moe_block": "experts beside an MLP",
}


def refuse_gemma4(hf: Mapping[str, Any]) -> None:
    """Refuses the `config.json` of Gemma 4, its text model alone or within another.

    Raises:
        ValueError: naming every part that this file uses and the decoder lacks.
    """
    names = [str(hf.get("model_type")), *(hf.get("architectures") or [])]
    if not any(name.lower().startswith("gemma4") for name in names):
        return
    text = hf.get("text_config")
    values = {**_DEFAULTS, **(text if isinstance(text, Mapping) else hf)}
    raise ValueError(
        "config.json: Gemma 4 is not supported, because this decoder lacks: "
        + "; ".join(_missing(values))
        + " (see docs/models.md)"
    )


def _missing(values: Mapping[str, Any]) -> Iterator[str]:
    yield "a norm of values; a scalar of each layer; proportional rotary frequencies"
    yield from _other_heads(values)
    for key, part in _PARTS.items():
        if values[key]:
            yield f"{part} ({key}={values[key]!r})"
    if values["num_kv_shared_layers"] and values["use_double_wide_mlp"]:
        yield "MLPs of two widths (use_double_wide_mlp=True)"
    # "vision" is about the tokens of images, so text alone stays causal.
    if values["use_bidirectional_attention"] == "all":
        yield "attention to later tokens (use_bidirectional_attention='all')"


def _other_heads(values: Mapping[str, Any]) -> Iterator[str]:
    """What says that layers differ in their heads, in either spelling."""
    size = values["head_dim"]
    # transformers 5.24 writes this key, and `global_head_dim` no more.
    if "per_layer_config" in values:
        if values["per_layer_config"]:
            yield "heads that differ from layer to layer (per_layer_config)"
        return
    of_global = values.get("global_head_dim")
    of_global = 512 if of_global is None else of_global
    if of_global != size:
        yield (
            "heads of another size in global layers "
            f"(head_dim={size!r}, global_head_dim={of_global!r})"
        )
    count = values.get("num_global_key_value_heads")
    if values["attention_k_eq_v"] and count is not None:
        yield (
            "another number of heads in global layers "
            f"(num_global_key_value_heads={count!r})"
        )
