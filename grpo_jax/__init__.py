"""GRPO post-training of language models in JAX.

The names below are resolved on first use, so that `import grpo_jax` starts no backend
and loads nothing heavy.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_HOMES = {
    **dict.fromkeys(
        (
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
        ),
        "grpo_jax.config",
    ),
    **dict.fromkeys(
        (
            "Mean",
            "aggregate",
            "centered_advantages",
            "chunked_logprobs",
            "clipped_surrogate",
            "group_softmax_weights",
            "grpo_loss",
            "kl_estimate",
            "leave_one_out_advantages",
            "log_importance_ratio",
            "sequence_logprobs",
            "softmax_advantages",
            "standardized_advantages",
            "token_entropy",
            "token_logprobs",
            "weighted_likelihood_loss",
        ),
        "grpo_jax.objective",
    ),
    "openenv_environment": "grpo_jax.environments.openenv",
    "reasoning_gym_environment": "grpo_jax.environments.reasoning_gym",
    "skyrl_gym_environment": "grpo_jax.environments.skyrl_gym",
    "textarena_environment": "grpo_jax.environments.textarena",
    "tinker_environment": "grpo_jax.environments.tinker",
    "ModelConfig": "grpo_jax.models.config",
    "Decoder": "grpo_jax.models.decoder",
    "Pretrained": "grpo_jax.weights.pretrained",
    "load_pretrained": "grpo_jax.weights.pretrained",
    "save_pretrained": "grpo_jax.weights.pretrained",
    "Completions": "grpo_jax.rollout.sampler",
    "generate": "grpo_jax.rollout.generate",
    "Step": "grpo_jax.environments.base",
    "TextEnvironment": "grpo_jax.environments.base",
    "Task": "grpo_jax.tasks.base",
    "per_completion": "grpo_jax.tasks.base",
    "load_task": "grpo_jax.tasks",
    "Evaluation": "grpo_jax.training.scores",
    "evaluate": "grpo_jax.training.evaluate",
    "TrainResult": "grpo_jax.training.progress",
    "train": "grpo_jax.training.loop",
    "Restored": "grpo_jax.training.restore",
    "restore": "grpo_jax.training.restore",
    "Batch": "grpo_jax.training.state",
    "TrainState": "grpo_jax.training.state",
    "make_train_state": "grpo_jax.training.state",
    "compile_train_step": "grpo_jax.training.compiled",
    "make_train_step": "grpo_jax.training.step",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """The public object of that name, imported now."""
    if name not in _HOMES:
        raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")
    value = vars(importlib.import_module(_HOMES[name]))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return __all__
