"""The tensors of layers without attention."""

from collections.abc import Iterator

from grpo_jax.models.config import ModelConfig


def delta_tensors(config: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Path, name within the module, and shape of one layer's parameters."""
    delta = config.delta
    if delta is None:
        return
    width, heads = config.hidden_size, delta.value_heads
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
