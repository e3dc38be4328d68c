"""The objective as pure functions of arrays: no model, no config, no input or output.

Log-probabilities are in nats, masks boolean, losses and statistics float32, and a loss
is something to minimize, kept as a `Mean` of total and weight.
"""

from grpo_jax.objective.advantages import (
    centered_advantages,
    group_softmax_weights,
    leave_one_out_advantages,
    overlong_penalty,
    softmax_advantages,
    standardized_advantages,
)
from grpo_jax.objective.aggregate import aggregate
from grpo_jax.objective.kl import kl_estimate
from grpo_jax.objective.logprobs import (
    chunked_logprobs,
    sequence_logprobs,
    token_entropy,
    token_logprobs,
)
from grpo_jax.objective.loss import grpo_loss, weighted_likelihood_loss
from grpo_jax.objective.structs import LossOutput, Mean, TokenLogprobs
from grpo_jax.objective.surrogate import (
    cispo_surrogate,
    clipped_surrogate,
    importance_correction,
    importance_ratio,
    log_importance_ratio,
)

__all__ = [
    "LossOutput",
    "Mean",
    "TokenLogprobs",
    "aggregate",
    "centered_advantages",
    "chunked_logprobs",
    "cispo_surrogate",
    "clipped_surrogate",
    "group_softmax_weights",
    "grpo_loss",
    "importance_correction",
    "importance_ratio",
    "kl_estimate",
    "leave_one_out_advantages",
    "log_importance_ratio",
    "overlong_penalty",
    "sequence_logprobs",
    "softmax_advantages",
    "standardized_advantages",
    "token_entropy",
    "token_logprobs",
    "weighted_likelihood_loss",
]
