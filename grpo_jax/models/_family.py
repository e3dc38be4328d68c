"""What a row of `families` says of an architecture."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: what it reads and what its class fixes."""

    model_type: str
    defaults: Mapping[str, Any]  # optional keys, with what absence means
    default_theta: float = 10_000.0  # rotary base where the file names none
    # Rotary base of windowed layers, which then have a setting of their own.
    local_theta: float | None = None
    windows: Literal[
        "none", "all", "late", "alternating", "patterned", "of_four", "unrotated"
    ] = "none"
    qkv_bias: bool = False  # always present, whatever the file says
    output_bias: str | None = "attention_bias"  # the key that o's bias follows
    qk_norm: Literal["head", "width", "rotated"] | None = None
    sandwich_norm: bool = False
    post_norm: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False  # embeddings times sqrt(D)
    rotary_neighbors: bool = False
    only_windows_rotate: bool = False  # in a model with windows
    stretched_base: bool = False  # by `alpha` of the rotary settings
    scaled_queries: bool = False  # by position, with a factor of the rotary settings
    attention_gate: bool = False  # q_proj also projects a gate of each head's output
    ignored_rope: frozenset[str] = frozenset()  # rotary settings about images
    required: tuple[str, ...] = ()  # keys, beside REQUIRED_KEYS
    ignored: frozenset[str] = frozenset()  # keys this class alone disregards
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # FIXED_KEYS too
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # other names
