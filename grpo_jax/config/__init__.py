"""The configuration of a run."""

from grpo_jax.config.run import (
    EMBEDDED,
    PRESETS,
    UNSET,
    CheckpointConfig,
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Projection,
    ReportConfig,
    RewardsConfig,
    SamplingConfig,
    TrainConfig,
)

__all__ = [
    "EMBEDDED",
    "PRESETS",
    "UNSET",
    "CheckpointConfig",
    "LoraConfig",
    "MeshConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Projection",
    "ReportConfig",
    "RewardsConfig",
    "SamplingConfig",
    "TrainConfig",
]
