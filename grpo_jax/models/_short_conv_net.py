"""ShortConv: projections and gates around a convolution over a few tokens."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from grpo_jax.models._layers import KERNEL_INIT, Projection, constrain, parameter
from grpo_jax.models._short_conv import ConvConfig, ConvInputs

Aux = TypeVar("Aux")


class ShortConv(nn.Module):
    """o(c * convolution(b * x)), in the place of attention."""

    config: ConvConfig
    features: int  # of the layer's input, and of its output
    lora_scale: float | None

    def setup(self):
        """Declares the projections and the convolution."""
        width, conv = self.config.channels, self.config
        made = functools.partial(Projection, use_bias=False, lora_scale=self.lora_scale)
        # Not split: it has b, c and x one after the other.
        self.bcx = made(self.features, 3 * width, ("embed", None))
        self.o = made(width, self.features, ("heads", "embed"))
        shape = (width, 1, conv.kernel)  # as files have it
        self.taps = parameter(self, "taps", KERNEL_INIT, shape, (None, None, None))

    def __call__(
        self,
        x: Float[Array, "N S D"],
        remember: Callable[[ConvInputs], tuple[Float[Array, "N S K w"], Aux]],
    ) -> tuple[Float[Array, "N S D"], Aux]:
        """Returns the output and whatever else `remember` returns.

        `remember` runs the convolution over the tokens. It is what distinguishes a
        plain pass from prefill, decode and score.
        """
        before, after, values = jnp.split(self.bcx(x), 3, axis=-1)
        groups = self.config.groups
        channels = (before * values).reshape(*x.shape[:2], groups, -1)
        kernel = self.taps[:, 0].T
        out, aux = remember(
            ConvInputs(
                channels=constrain(channels, "batch", "seq", "kv_heads", None),
                kernel=kernel.reshape(len(kernel), groups, -1),
            )
        )
        mixed = out.reshape(after.shape).astype(x.dtype)
        return self.o(after * mixed), aux
