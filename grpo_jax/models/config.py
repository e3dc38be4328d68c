"""ModelConfig: the shape and options of one decoder, of any model family."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from grpo_jax.models import _hf_config
from grpo_jax.models._delta import DeltaConfig
from grpo_jax.models._routing import ExpertsConfig
from grpo_jax.models._short_conv import ConvConfig
from grpo_jax.models.rope import RopeConfig

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
    "norm_eps",
    "attention_scale",
    "embedding_scale",
    "residual_scale",
    "logit_divisor",
)
_CHOICES = {
    "activation": ("silu", "gelu_tanh", "gelu"),
    "qk_norm": (None, "head", "width", "rotated"),
    "dtype": ("float32", "bfloat16", "float16"),
    "remat": ("none", "layer", "dots"),
    "attention": ("auto", "xla"),
}
# Fields of how the model is run. They are not part of config.json.
RUN_FIELDS = ("dtype", "remat", "attention", "lora_scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and options of a decoder; hashable, so it can be static under jit.

    Raises:
        ValueError: listing every field that is out of range or disagrees with another.
    """

    architecture: str  # Hugging Face class, e.g. "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int
    num_heads: int
    num_kv_heads: int  # divides num_heads
    head_dim: int  # h, even; num_heads * head_dim may differ from hidden_size
    max_position_embeddings: int  # longest sequence with one function, in tokens
    norm_eps: float
    rope: tuple[RopeConfig, ...]  # the distinct rotary settings
    layer_rope: tuple[int | None, ...]  # per layer: index into rope, None = no rotation
    layer_window: tuple[int | None, ...]  # per layer: tokens seen, None = all
    tie_embeddings: bool  # the head is the transposed embedding
    attention_bias: bool  # biases of q, k and v
    output_bias: bool  # bias of o
    mlp_bias: bool
    # Norms of queries and keys: of each head, of all heads together ("width"), or of
    # each head after its rotation.
    qk_norm: Literal["head", "width", "rotated"] | None
    sandwich_norm: bool  # also norms after attention and after the MLP
    norm_offset: float  # added to every stored norm scale
    activation: Literal["silu", "gelu_tanh", "gelu"]
    attention_scale: float  # multiplies q k^T
    embedding_scale: float  # multiplies embeddings, rounded to the compute dtype
    attention_softcap: float | None  # c of c tanh(s / c) on attention scores
    logit_softcap: float | None  # the same on logits; the caller applies it
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    post_norm: bool = False  # norms after attention and the MLP instead of before
    rotary_fraction: float = 1.0  # of each head's dimensions, the first ones
    rotary_neighbors: bool = False  # dimensions 2i and 2i + 1 are a pair, not halves
    residual_scale: float = 1.0  # multiplies what attention and the MLP add
    logit_divisor: float = 1.0  # logits are divided by it
    experts: ExpertsConfig | None = None  # instead of one MLP
    # Layers with a memory or a convolution instead of attention.
    mixer: DeltaConfig | ConvConfig | None = None
    attention_gate: bool = False  # attention times a sigmoid, which q projects as well
    dtype: str = "float32"  # of compute; parameters stay float32
    remat: Literal["none", "layer", "dots"] = "none"  # what backward recomputes
    attention: Literal["auto", "xla"] = "auto"  # kernels where they serve, or none
    lora_scale: float | None = None  # alpha / rank; needed when adapters are given

    def __post_init__(self):
        problems = [*_range_problems(self), *_relation_problems(self)]
        if problems:
            raise ValueError("ModelConfig: " + "; ".join(problems))

    @property
    def active_width(self) -> int:
        """Features of the MLP, or of the experts, that one token passes through."""
        if self.experts is None:
            return self.intermediate_size
        return self.experts.per_token * self.experts.width

    @property
    def attention_layers(self) -> int:
        """Layers that have keys and values."""
        return self.num_layers - (sum(self.mixer.layers) if self.mixer else 0)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that rotate."""
        return int(self.head_dim * self.rotary_fraction)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Returns the configuration of a parsed `config.json`, of either spelling.

        Rotary settings are read from `rope_theta` and `rope_scaling` (transformers 4)
        or `rope_parameters` (5). Absent keys mean what the transformers class assumes.
        `dtype` stays float32, because the dtype of the file is that of storage.

        Keys that change the computation of some architecture are supported or refused.
        A value that is null, false, zero or empty means "not in use". Keys that no
        architecture has are ignored, with a line in the log. They are refused if the
        file names code of its own (`auto_map`), which may read any key.

        Raises:
            ValueError: unknown architecture, missing keys, or an unsupported option.
        """
        return cls(**_hf_config.read(hf))

    def to_hf(self) -> dict[str, Any]:
        """Returns a `config.json` that transformers reads back to the same model.

        The spelling is that of transformers 4, which 5 also reads. `dtype`, `remat`,
        `attention` and `lora_scale` are left out. The caller adds the dtype of the
        stored weights.

        Raises:
            ValueError: the architecture's `config.json` cannot express some field.
        """
        fields = dataclasses.fields(self)
        values = {field.name: getattr(self, field.name) for field in fields}
        hf = _hf_config.write(values)
        restored = ModelConfig.from_hf(hf)
        kept = {name: values[name] for name in RUN_FIELDS}
        restored = dataclasses.replace(restored, **kept)
        if restored != self:
            lost = [n for n, v in values.items() if getattr(restored, n) != v]
            raise ValueError(
                f"the config.json of {self.architecture} cannot express these values: "
                + ", ".join(f"{name}={values[name]!r}" for name in lost)
            )
        return hf


def _range_problems(config: ModelConfig) -> Iterator[str]:
    values = dataclasses.asdict(config)
    for name in _SIZES:
        if not values[name] > 0:
            yield f"{name} must be positive, got {values[name]}"
    for name in ("attention_softcap", "logit_softcap", "lora_scale"):
        if values[name] is not None and not values[name] > 0:
            yield f"{name} must be positive or None, got {values[name]}"
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            yield f"{name} must be one of {choices}, got {values[name]!r}"


def _relation_problems(config: ModelConfig) -> Iterator[str]:
    heads, kv_heads, layers = config.num_heads, config.num_kv_heads, config.num_layers
    rope, window = config.layer_rope, config.layer_window
    rules = [
        (
            heads % max(kv_heads, 1) == 0,
            f"num_heads {heads} must be a multiple of num_kv_heads {kv_heads}",
        ),
        (
            config.head_dim % 2 == 0,
            f"head_dim must be even for rotary embeddings, got {config.head_dim}",
        ),
        (
            0 < config.rotary_fraction <= 1 and config.rotary_dim % 2 == 0,
            f"rotary_fraction must be in (0, 1] and rotate an even number of the "
            f"{config.head_dim} dimensions, got {config.rotary_fraction}",
        ),
        (
            not (config.post_norm and config.sandwich_norm),
            "post_norm and sandwich_norm exclude each other",
        ),
        *_rope_rules(config),
        (
            config.experts is None or not config.mlp_bias,
            "mlp_bias must be False: experts have no biases",
        ),
        (
            config.mixer is None or len(config.mixer.layers) == layers,
            f"mixer.layers needs num_layers={layers} entries",
        ),
        (
            len(rope) == layers,
            f"layer_rope needs num_layers={layers} entries, has {len(rope)}",
        ),
        (
            len(window) == layers,
            f"layer_window needs num_layers={layers} entries, has {len(window)}",
        ),
        (
            set(rope) <= {None, *range(len(config.rope))},
            f"layer_rope must index the {len(config.rope)} settings in rope",
        ),
        (
            all(tokens is None or tokens >= 1 for tokens in window),
            f"layer_window must be positive or None, got {window}",
        ),
    ]
    return (problem for holds, problem in rules if not holds)


def _rope_rules(config: ModelConfig) -> Iterator[tuple[bool, str]]:
    for rope in config.rope:
        pairs, lists = config.rotary_dim // 2, (rope.short_factor, rope.long_factor)
        yield (
            all(factors is None or len(factors) == pairs for factors in lists),
            f"short_factor and long_factor of rope must have {pairs} entries, one for "
            "each pair of dimensions that rotate",
        )
        yield (
            rope.context is None or config.max_position_embeddings <= rope.context,
            f"max_position_embeddings must be at most {rope.context}: longrope has "
            "other frequencies for all positions of longer sequences, so those of a "
            "completion would change while it is sampled; got "
            f"{config.max_position_embeddings}",
        )
