"""The configuration of a run."""

from grpo_jax.config.objective import PRESETS, ObjectiveConfig
from grpo_jax.config.run import (
    CONV_TARGETS,
    DELTA_TARGETS,
    EMBEDDED,
    LORA_TARGETS,
    UNSET,
    CheckpointConfig,
    EnvironmentsConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    ReportConfig,
    RewardsConfig,
    RolloutConfig,
    SamplingConfig,
    TrainConfig,
)

__all__ = [
    "EMBEDDED",
    "CONV_TARGETS",
    "DELTA_TARGETS",
    "LORA_TARGETS",
    "PRESETS",
    "UNSET",
    "CheckpointConfig",
    "EnvironmentsConfig",
    "LoraConfig",
    "MeshConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ReportConfig",
    "RewardsConfig",
    "RolloutConfig",
    "SamplingConfig",
    "TrainConfig",
]
