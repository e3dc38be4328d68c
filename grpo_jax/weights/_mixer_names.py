"""The tensors of layers without attention."""

from collections.abc import Iterator

from grpo_jax.models.config import ConvConfig, DeltaConfig, ModelConfig

_Row = tuple[str, str, tuple[int, ...]]


def mixer_tensors(config: ModelConfig) -> Iterator[_Row]:
    """Path, name within the layer, and shape of one layer's parameters."""
    mixer = config.mixer
    if mixer is None:
        return
    convolves = isinstance(mixer, ConvConfig)
    rows = _of_conv(mixer) if convolves else _of_delta(mixer, config.hidden_size)
    module = "conv" if convolves else "linear_attn"
    for path, name, shape in rows:
        yield f"{mixer.part}/{path}", f"{module}.{name}", shape


def _of_conv(conv: ConvConfig) -> Iterator[_Row]:
    width = conv.channels
    yield "bcx/kernel", "in_proj.weight", (width, 3 * width)
    yield "taps", "conv.weight", (width, 1, conv.kernel)
    yield "o/kernel", "out_proj.weight", (width, width)


def _of_delta(delta: DeltaConfig, width: int) -> Iterator[_Row]:
    heads = delta.value_heads
    values = heads * delta.value_dim
    yield "qkv/kernel", "in_proj_qkv.weight", (width, delta.channels)
    yield "z/kernel", "in_proj_z.weight", (width, values)
    yield "b/kernel", "in_proj_b.weight", (width, heads)
    yield "a/kernel", "in_proj_a.weight", (width, heads)
    yield "conv", "conv1d.weight", (delta.channels, 1, delta.kernel)
    yield "log_rate", "A_log", (heads,)
    yield "rate_bias", "dt_bias", (heads,)
    yield "norm/scale", "norm.weight", (delta.value_dim,)
    yield "o/kernel", "out_proj.weight", (values, width)
