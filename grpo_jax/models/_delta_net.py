"""GatedDeltaNet: projections, a convolution and a gate around the delta rule."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from grpo_jax.models._delta import DeltaConfig, DeltaInputs
from grpo_jax.models._layers import (
    KERNEL_INIT,
    Projection,
    RMSNorm,
    constrain,
    parameter,
)
from grpo_jax.models.config import ModelConfig

Aux = TypeVar("Aux")


class GatedDeltaNet(nn.Module):
    """o(norm(rule(convolution(qkv(x)))) * silu(z(x))), in the place of attention."""

    config: ModelConfig

    def setup(self):
        """Declares the projections, the convolution and what decays are made of."""
        delta, width = delta_of(self.config), self.config.hidden_size
        values, heads = delta.value_heads * delta.value_dim, (delta.value_heads,)
        made = functools.partial(
            Projection, use_bias=False, lora_scale=self.config.lora_scale
        )
        # Not split: it has queries, keys and values one after the other.
        self.qkv = made(width, delta.channels, ("embed", None))
        self.z = made(width, values, ("embed", "heads"))
        self.b = made(width, delta.value_heads, ("embed", "heads"))
        self.a = made(width, delta.value_heads, ("embed", "heads"))
        self.o = made(values, width, ("heads", "embed"))
        shape = (delta.channels, 1, delta.kernel)  # as files have it
        axes = (None, None, None)
        self.conv = parameter(self, "conv", KERNEL_INIT, shape, axes)
        self.log_rate = parameter(self, "log_rate", _rates, heads, ("heads",))
        ones = nn.initializers.ones
        self.rate_bias = parameter(self, "rate_bias", ones, heads, ("heads",))
        self.norm = RMSNorm(eps=self.config.norm_eps, offset=0.0)

    def __call__(
        self,
        x: Float[Array, "N S D"],
        remember: Callable[[DeltaInputs], tuple[Float[Array, "N S V v"], Aux]],
    ) -> tuple[Float[Array, "N S D"], Aux]:
        """Returns the output and whatever else `remember` returns.

        `remember` runs the convolution and the rule over the tokens. It is what
        distinguishes a plain pass from prefill, decode and score.
        """
        delta = delta_of(self.config)
        channels = constrain(
            delta.by_heads(self.qkv(x)), "batch", "seq", "kv_heads", None
        )
        rates = self.a(x).astype(jnp.float32) + self.rate_bias[None, None]
        inputs = DeltaInputs(
            channels=channels,
            decay=-jnp.exp(self.log_rate)[None, None] * jax.nn.softplus(rates),
            share=jax.nn.sigmoid(self.b(x).astype(jnp.float32)),
            kernel=delta.by_heads(self.conv[:, 0].T),
        )
        out, aux = remember(inputs)
        gate = self.z(x).reshape(out.shape).astype(jnp.float32)
        gated = (self.norm(out) * jax.nn.silu(gate)).astype(x.dtype)
        return self.o(gated.reshape(*x.shape[:2], -1)), aux


def delta_of(config: ModelConfig) -> DeltaConfig:
    """Returns the settings of the layers that are not attention."""
    assert isinstance(config.mixer, DeltaConfig), "only where a model has such layers"
    return config.mixer


def _rates(
    key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, " V"]:
    """Returns logarithms of rates that are uniform, as in the models' own training."""
    return jnp.log(jax.random.uniform(key, shape, dtype, minval=0.01, maxval=16.0))
