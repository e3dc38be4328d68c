import dataclasses

import jax
import numpy as np
import pytest

from grpo_jax.models._routing import ExpertsConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params
from grpo_jax.planning.flops import (
    completion_flops,
    forward_flops,
    gradient_flops,
    layer_weights,
    prefill_flops,
)

CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
)
PROMPTS = np.array([7, 3])
LENGTHS = np.array([[5, 1, 2], [4, 4, 9]])


def test_a_token_meets_every_kernel_of_a_layer_once():
    layers = abstract_params(Decoder(CONFIG))["layers"]
    kernels = [leaf for leaf in jax.tree.leaves(layers) if leaf.ndim == 3]
    assert 3 * layer_weights(CONFIG) == sum(leaf.size for leaf in kernels)


def test_a_token_meets_its_experts_and_the_router():
    experts = ExpertsConfig(count=8, per_token=2, width=16, normalized=True)
    mixed = dataclasses.replace(CONFIG, experts=experts)
    attention = 12 * (24 + 24 + 12 + 12)  # q, o, k, v
    assert layer_weights(mixed) == attention + 2 * 3 * 12 * 16 + 12 * 8


@pytest.mark.parametrize("windows", [(None, None, None), (None, 2, 4)])
def test_attention_counts_the_pairs_of_its_mask(windows):
    config = dataclasses.replace(CONFIG, layer_window=windows)

    def pairs(first, end):
        seen = 0
        for window in windows:
            query, key = np.indices((end, end))
            mask = (key <= query) & (query - key < (window or end)) & (query >= first)
            seen += mask.sum()
        return seen

    per_pair = 2 * 2 * 4 * 6  # scores and sums, multiply and add, heads, width
    prompt = sum(pairs(0, p) for p in PROMPTS)
    # The last token of a completion is never read.
    own = sum(
        pairs(p, p + length - 1)
        for p, group in zip(PROMPTS, LENGTHS, strict=True)
        for length in group
    )
    assert prefill_flops(config, PROMPTS).attention == per_pair * prompt
    assert completion_flops(config, PROMPTS, LENGTHS).attention == per_pair * own
    assert forward_flops(config, PROMPTS, LENGTHS).attention == per_pair * (
        prompt + own
    )


def test_a_token_meets_what_its_kind_of_layer_has(hybrid_policy):
    config = hybrid_policy.model.config
    layers = abstract_params(hybrid_policy.model)["layers"]
    kernels = [leaf for leaf in jax.tree.leaves(layers) if leaf.ndim == 3]
    flops = prefill_flops(config, PROMPTS)
    assert flops.weights == 2 * sum(leaf.size for leaf in kernels) * 10
    pairs = 7 * 8 // 2 + 3 * 4 // 2  # of the one layer with attention
    # A memory of four heads, 6 x 5, has three products for each token.
    assert flops.attention == 2 * 2 * 4 * 8 * pairs + 2 * 3 * 4 * 6 * 5 * 10


def test_the_head_meets_completion_tokens_alone_and_prompts_count_once():
    # Prompts 7 + 3; own tokens that are read 4 + 0 + 1 and 3 + 3 + 8, drawn 25.
    layers = 2 * 3 * layer_weights(CONFIG) * (10 + 19)
    assert forward_flops(CONFIG, PROMPTS, LENGTHS).weights == layers + 2 * 25 * 12 * 50


def test_a_gradient_costs_two_products_more_each_unless_weights_are_frozen():
    forward = forward_flops(CONFIG, PROMPTS, LENGTHS)
    assert gradient_flops(forward) == 3 * forward.total
    frozen = gradient_flops(forward, frozen=True)
    assert frozen == 2 * forward.weights + 3 * forward.attention
