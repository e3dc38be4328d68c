"""One decoder layer, and the settings in which the layers of a model differ.

Layers are scanned, so their differences (rotary setting, window) are scanned data.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from grpo_jax.models import rope
from grpo_jax.models._attention import SelfAttention
from grpo_jax.models._experts import ExpertsMLP
from grpo_jax.models._layers import GatedMLP, RMSNorm, constrain
from grpo_jax.models._mixers import module_of
from grpo_jax.models.config import ModelConfig

# Wider than any sequence: "no window" for a layer of a model that has windows.
_UNBOUNDED = 2**30


@struct.dataclass
class PerLayer:
    """The settings of each layer; None if all layers have the same."""

    index: Int[Array, "*L"]
    rope: Int[Array, "*L"] | None  # row of the rotary tables
    window: Int[Array, "*L"] | None


class Layer(nn.Module):
    """Attention and MLP, each normalized before, after, or both."""

    config: ModelConfig
    memory: bool = False  # a mixer of `_mixers` in the place of attention

    def setup(self):
        """Declares the parts of the layer."""
        config = self.config
        if self.memory:
            self.mixer = module_of(config)
        else:
            self.attn = SelfAttention(config)
        mlp = GatedMLP if config.experts is None else ExpertsMLP
        self.mlp = mlp(config)
        if not config.post_norm:
            self.attn_norm = self._norm()
            self.mlp_norm = self._norm()
        if config.post_norm or config.sandwich_norm:
            self.post_attn_norm = self._norm()
            self.post_mlp_norm = self._norm()

    def __call__(
        self,
        x: Float[Array, "N S D"],
        tables: rope.Rotary,
        data: PerLayer,
        attend: Callable,
        remember: Any = None,
    ) -> tuple[Float[Array, "N S D"], Any]:
        """Returns the layer's output, and the second value that `attend` returns.

        Args:
            tables: the result of `rotary_tables`.
            data: this layer's row of `per_layer_data`.
            attend: mixes the tokens, `attend(queries, keys, values)`; see
                `SelfAttention`.
            remember: the same without attention; see `_mixers`.
        """
        setting = 0 if data.rope is None else data.rope
        rotary = jax.tree.map(lambda table: table[setting], tables)
        before = not self.config.post_norm
        after = self.config.post_norm or self.config.sandwich_norm
        inner = self.attn_norm(x) if before else x
        if self.memory:
            mixed, aux = self.mixer(inner, remember)
        else:
            mixed, aux = self.attn(inner, rotary, attend)
        x = self._add(x, self.post_attn_norm(mixed) if after else mixed)
        inner = self.mlp(self.mlp_norm(x) if before else x)
        x = self._add(x, self.post_mlp_norm(inner) if after else inner)
        return constrain(x, "batch", "seq", "embed"), aux

    def _add(
        self, x: Float[Array, "N S D"], update: Float[Array, "N S D"]
    ) -> Float[Array, "N S D"]:
        """Returns the residual stream with what a block adds to it."""
        scale = self.config.residual_scale
        if scale == 1.0:
            return x + update
        # In float32: a scale such as 0.22 is none of bfloat16.
        return x + (scale * update.astype(jnp.float32)).astype(x.dtype)

    def _norm(self) -> RMSNorm:
        return RMSNorm(eps=self.config.norm_eps, offset=self.config.norm_offset)


def per_layer_data(config: ModelConfig) -> PerLayer:
    """Returns the settings of all layers, stacked on a leading axis."""
    used, settings = _rope_settings(config)
    windows = [_UNBOUNDED if w is None else w for w in config.layer_window]
    windowed = any(w is not None for w in config.layer_window)
    return PerLayer(
        index=jnp.arange(config.num_layers),
        rope=jnp.asarray(used) if len(settings) > 1 else None,
        window=jnp.asarray(windows) if windowed else None,
    )


def rotary_tables(config: ModelConfig, positions: Int[Array, "N S"]) -> rope.Rotary:
    """Returns the tables of every rotary setting that a layer uses."""
    _, settings = _rope_settings(config)
    return rope.rotary_tables(positions, settings, head_dim=config.rotary_dim)


def _rope_settings(
    config: ModelConfig,
) -> tuple[list[int], list[rope.RopeConfig | None]]:
    """Returns each layer's row, and each row's setting (None: no rotation)."""
    chosen = [None if i is None else config.rope[i] for i in config.layer_rope]
    settings = list(dict.fromkeys(chosen))
    return [settings.index(one) for one in chosen], settings
