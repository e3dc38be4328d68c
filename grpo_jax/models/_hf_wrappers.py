"""Multimodal models as the text models within them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from grpo_jax.models.families import FAMILIES

_OF_THE_WHOLE = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Wrapper:
    """A class whose `config.json` has that of its text model in `text_config`."""

    model_type: str
    texts: tuple[str, ...]  # model types of text models, the first if none is named
    ignored: frozenset[str]  # keys about images
    defaults: Mapping[str, Any]  # what the class assumes where its text model says none


_TIED = {"tie_word_embeddings": True}
_WRAPPERS = {
    "Mistral3ForConditionalGeneration": _Wrapper(
        model_type="mistral3",
        texts=("mistral", "ministral3"),
        ignored=frozenset(
            """
            vision_config image_token_index image_token_id projector_hidden_act
            multimodal_projector_bias spatial_merge_size vision_feature_layer
            """.split()
        ),
        defaults=_TIED,
    ),
    "Gemma3ForConditionalGeneration": _Wrapper(
        model_type="gemma3",
        texts=("gemma3_text",),
        ignored=frozenset(
            """
            vision_config image_token_index image_token_id boi_token_index
            boi_token_id eoi_token_index eoi_token_id mm_tokens_per_image
            """.split()
        ),
        defaults=_TIED | {"vocab_size": 262_208, "num_attention_heads": 8},
    ),
    "Qwen3_5ForConditionalGeneration": _Wrapper(
        model_type="qwen3_5",
        texts=("qwen3_5_text",),
        ignored=frozenset(
            """
            vision_config image_token_id video_token_id vision_start_token_id
            vision_end_token_id language_model_only
            """.split()
        ),
        defaults={},
    ),
}


def text_of(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `config.json` of the text model in a multimodal model; others as they are.

    Keys beside `text_config` hold for the text model where it does not say otherwise.
    Token ids, and whether embeddings are tied, are those of the whole model if it says.
    What is about images is left out, anything else is checked like the other keys.

    Raises:
        ValueError: `text_config` is no object, or of a model that is not supported.
    """
    wrapper = _wrapper(hf)
    if wrapper is None:
        return hf
    if hf.get("model_type") != wrapper.model_type:
        raise ValueError(
            f"config.json: model_type {hf.get('model_type')!r} does not belong to "
            f"{hf['architectures'][0]}; expected {wrapper.model_type!r}"
        )
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"config.json: text_config must be an object, got {text!r}")
    model_type = text.get("model_type") or wrapper.texts[0]
    if model_type not in wrapper.texts:
        raise ValueError(
            f"config.json: text_config of {wrapper.model_type} has model_type "
            f"{model_type!r}, which is not supported; expected one of {wrapper.texts}"
        )
    inner = {*wrapper.ignored, "text_config"}
    outer = {key: value for key, value in hf.items() if key not in inner}
    (name,) = (n for n, f in FAMILIES.items() if f.model_type == model_type)
    first = {key: outer[key] for key in _OF_THE_WHOLE if key in outer}
    own = {"architectures": [name], "model_type": model_type}
    return {**wrapper.defaults, **outer, **text, **first, **own}


def _wrapper(hf: Mapping[str, Any]) -> _Wrapper | None:
    for name, wrapper in _WRAPPERS.items():
        named = hf.get("architectures") or (
            [name] if hf.get("model_type") == wrapper.model_type else []
        )
        if name in named and len(named) == 1:
            return wrapper
    return None
