"""Which layers stand in the place of attention: the one choice, by their settings."""

from typing import Any, TypeAlias

import jax
from flax import linen as nn

from grpo_jax.models import _delta, _short_conv
from grpo_jax.models._delta import DeltaConfig, DeltaInputs
from grpo_jax.models._delta_net import GatedDeltaNet
from grpo_jax.models._short_conv import ConvConfig, ConvInputs
from grpo_jax.models._short_conv_net import ShortConv
from grpo_jax.models.config import ModelConfig

MixerConfig: TypeAlias = DeltaConfig | ConvConfig
MixerInputs: TypeAlias = DeltaInputs | ConvInputs

PARTS = (DeltaConfig.part, ConvConfig.part)


def mixer_of(config: ModelConfig) -> MixerConfig:
    """Returns the settings of the layers that are not attention."""
    assert config.mixer is not None, "only called where a model has such layers"
    return config.mixer


def module_of(config: ModelConfig) -> nn.Module:
    """Returns the module of such a layer, named as its part of the parameters."""
    mixer = mixer_of(config)
    if isinstance(mixer, ConvConfig):
        width, scale = config.hidden_size, config.lora_scale
        return ShortConv(mixer, width, scale, name=mixer.part)
    return GatedDeltaNet(config, name=mixer.part)


def rules_of(config: MixerConfig) -> Any:
    """Returns what has `empty_state`, `advance` and `answers_in_rows` of the kind."""
    return _short_conv if isinstance(config, ConvConfig) else _delta


def of_tokens(change: Any, inputs: Any) -> Any:
    """Returns inputs of which `change` is applied to all that tokens have."""
    changed: Any = jax.tree.map(change, inputs.replace(kernel=None))
    return changed.replace(kernel=inputs.kernel)
