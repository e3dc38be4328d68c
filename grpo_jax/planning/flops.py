"""The floating-point operations that a model needs at least for groups of completions.

A multiplication and an addition are two operations. Only matrix products count: the
projections, the MLP (or the router and the experts of a token), attention over the
tokens that each token sees (or a memory), and the head for each completion token.
Norms, rotations, convolutions, softmax, nonlinearities, biases, adapters, padding and
recomputation do not count. A prompt counts once for its whole group.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from grpo_jax.models.config import ModelConfig


class _Flops(NamedTuple):
    """Operations of forward passes.

    Attributes:
      weights: products of activations with weights.
      attention: products of activations with each other.
    """

    weights: float
    attention: float

    @property
    def total(self) -> float:
        """All operations."""
        return self.weights + self.attention


def prefill_flops(config: ModelConfig, prompts: Int[np.ndarray, " N"]) -> _Flops:
    """Operations of a pass over prompts of these lengths, without the head."""
    weights = 2.0 * _all_weights(config) * prompts.sum()
    return _Flops(weights, _mixing(config, _pairs(config, prompts), prompts))


def completion_flops(
    config: ModelConfig,
    prompts: Int[np.ndarray, " N"],
    lengths: Int[np.ndarray, "N G"],
) -> _Flops:
    """Operations of the completions of these lengths, without those of their prompts.

    A completion of length l has l products with the head but reads only l - 1 tokens:
    the last one is predicted and never read. So decoding and scoring need the same.
    """
    read = np.maximum(lengths - 1, 0)
    per_token = _all_weights(config)
    head = config.hidden_size * config.vocab_size
    weights = 2.0 * (per_token * read.sum() + head * lengths.sum())
    before = prompts[:, None]
    pairs = _pairs(config, before + read) - _pairs(config, before)
    return _Flops(weights, _mixing(config, pairs, read))


def forward_flops(
    config: ModelConfig,
    prompts: Int[np.ndarray, " N"],
    lengths: Int[np.ndarray, "N G"],
) -> _Flops:
    """Operations of the log-probabilities of completions; sampling needs as many."""
    parts = prefill_flops(config, prompts), completion_flops(config, prompts, lengths)
    return _Flops(*map(sum, zip(*parts, strict=True)))


def gradient_flops(forward: _Flops, *, frozen: bool = False) -> float:
    """Operations of a forward pass with its gradient.

    Each product has two in the backward pass, one per operand. `frozen` weights, as
    under adapters, need no gradient of their own.
    """
    return (2 if frozen else 3) * forward.weights + 3 * forward.attention


def layer_weights(config: ModelConfig) -> int:
    """The number of weights of one layer with attention that multiply a token."""
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    projections = 2 * queries + 2 * keys  # q and o; k and v
    if config.attention_gate:
        projections += queries
    return config.hidden_size * (projections + _mlp_width(config))


def _all_weights(config: ModelConfig) -> int:
    """The weights of all layers that multiply a token."""
    weights = config.attention_layers * layer_weights(config)
    if config.mixer is None:
        return weights
    width = config.mixer.projected + _mlp_width(config)
    return weights + sum(config.mixer.layers) * config.hidden_size * width


def _mlp_width(config: ModelConfig) -> int:
    router = 0 if config.experts is None else config.experts.count
    return 3 * config.active_width + router


def _mixing(
    config: ModelConfig,
    pairs: Int[np.ndarray, "..."],
    tokens: Int[np.ndarray, "..."],
) -> float:
    """Products of activations: of attention for all layers' pairs, and of memories.

    Attention has two for a pair of query and key, scores and sums. A memory has three
    for a token: its answers to key and to query, and its correction.
    """
    attention = 2 * config.num_heads * config.head_dim * float(pairs.sum())
    mixer = config.mixer
    memories = 0 if mixer is None else 3 * sum(mixer.layers) * mixer.memory_size
    return 2.0 * (attention + memories * float(tokens.sum()))


def _pairs(
    config: ModelConfig, lengths: Int[np.ndarray, "..."]
) -> Int[np.ndarray, "..."]:
    """Pairs of a token and one that it sees, itself included, over all layers."""
    total = np.zeros(lengths.shape, np.int64)
    mixer = config.mixer
    memory = (False,) * config.num_layers if mixer is None else mixer.layers
    for window, without in zip(config.layer_window, memory, strict=True):
        if without:
            continue
        # The first tokens see all tokens before them, later ones a full window.
        filling = lengths if window is None else np.minimum(lengths, window)
        full = lengths - filling
        total += filling * (filling + 1) // 2 + full * (window or 0)
    return total
