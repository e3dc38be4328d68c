"""A run of a model with layers that have no attention, and all that is around it."""

import itertools

import jax
import numpy as np
import pytest

from grpo_jax import CheckpointConfig, MeshConfig, TrainConfig, train
from grpo_jax.config import LoraConfig, RolloutConfig, SamplingConfig
from grpo_jax.training.restore import restore_adapter
from grpo_jax.weights.adapter import load_adapter, save_adapter
from grpo_jax.weights.pretrained import Pretrained, save_pretrained

ROWS = [{"prompt": f"{a}+{b}="} for a, b in itertools.product(range(4), range(5))]
TARGETS = ("o", "down", "conv_bcx", "conv_o")


def letters(completions, **_):
    return [float(sum(map(ord, text)) % 7) for text in completions]


@pytest.fixture(scope="module")
def folder(conv_policy, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("conv") / "model", conv_policy.model
    whole = Pretrained(model, conv_policy.params, conv_policy.tokenizer, model.config)
    save_pretrained(folder, whole)
    return folder


def test_adapters_on_a_mesh_with_groups_that_continue(folder, tmp_path):
    """The sampler has the learner's log-probs, however layers are run and stored."""
    config = TrainConfig(
        model=str(folder),
        run_dir=str(tmp_path / "run"),
        steps=2,
        prompts_per_step=8,
        group_size=2,
        max_prompt_tokens=16,
        max_new_tokens=12,
        eval_prompts=0,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        sampling=SamplingConfig(stop_ids=tuple(range(0, 264, 12))),
        rollout=RolloutConfig(carry_over=True, slots=12),
        lora=LoraConfig(rank=2, alpha=6.0, targets=TARGETS, base_dtype="nf4"),
        checkpoint=CheckpointConfig(every=2),
    )
    result = train(config, dataset=ROWS, rewards=letters)
    assert len(result.history) == 2
    # Later steps have tokens of earlier versions.
    assert result.history[0]["sampler_logp_diff/max"] < 1e-4
    _, adapter, base = restore_adapter(result.run_dir)
    save_adapter(tmp_path / "out", adapter, base)
    again = load_adapter(tmp_path / "out", base)
    assert again.targets == TARGETS
    jax.tree.map(np.testing.assert_array_equal, again.params, adapter.params)
