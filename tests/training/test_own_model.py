"""A Linen module that is no decoder of ours samples, scores and trains as one."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import MeshConfig, ObjectiveConfig, TrainConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.protocol import LanguageModel, LanguageModelConfig
from grpo_jax.rollout.generate import generate
from grpo_jax.training.learner import Learner
from grpo_jax.training.state import Batch
from grpo_jax.training.step import policy_logprobs

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "own_model.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("own_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sampled(script):
    """The model, its parameters, ragged prompts and a group of completions of each."""
    model = script.Recurrent()
    prompts = jax.random.randint(jax.random.key(1), (4, 3), 0, 16)
    lengths = jnp.array([3, 1, 2, 3])
    params = model.init(
        jax.random.key(0), prompts, lengths, prompts[:, None], method=model.score
    )["params"]
    drawn = generate(
        model,
        params,
        prompts,
        lengths,
        jax.random.key(2),
        group_size=8,
        max_new_tokens=4,
    )
    return model, params, prompts, lengths, drawn


def test_sampler_and_learner_agree_about_it(sampled):
    model, params, prompts, lengths, drawn = sampled
    scored = policy_logprobs(
        model, {"params": params}, prompts, lengths, drawn.tokens, temperature=1.0
    )
    np.testing.assert_allclose(scored.logp, drawn.logp, atol=1e-5)
    # It reads the prompt, and no padding: the prompts differ in their last tokens.
    assert np.abs(np.asarray(drawn.logp)).min() > 0.1


def test_an_update_of_the_learner_favors_what_was_rewarded(sampled, meshes_of):
    model, params, prompts, lengths, drawn = sampled
    config = TrainConfig(
        model="mine",
        max_new_tokens=4,
        prompts_per_step=4,
        mesh=MeshConfig(fsdp=1),
        objective=ObjectiveConfig(kl_coef=0.1),
    )
    learner = Learner(model, jax.tree.map(jnp.copy, params), config, meshes_of(1, 1, 1))
    advantages = jnp.where(jnp.arange(8) < 4, 1.0, -1.0)
    batch = Batch(
        prompts=prompts,
        prompt_lengths=lengths,
        completions=drawn.tokens,
        mask=drawn.mask,
        advantages=jnp.broadcast_to(advantages, (4, 8)),
        sampler_logp=drawn.logp,
        ref_logp=drawn.logp,
    )
    metrics = learner.update(batch)
    assert metrics["sampler_logp_diff/max"] < 1e-5 and metrics["update_skipped"] == 0.0
    after = policy_logprobs(
        model, learner.variables, prompts, lengths, drawn.tokens, temperature=1.0
    )
    change = (after.logp - drawn.logp).sum(axis=-1).mean(axis=0)
    assert change[:4].mean() > change[4:].mean()


def test_the_example_learns(script, capsys):
    rewards = script.main(steps=40)
    # Chance is 1 of 16 tokens.
    assert np.mean(rewards[:2]) < 0.1 and np.mean(rewards[-2:]) > 0.4
    assert "step 39  reward" in capsys.readouterr().out


def test_the_interface_names_what_is_there(script, tiny_policy):
    members = {n for n in vars(LanguageModel) if not n.startswith("_")}
    facts = {n for n in vars(LanguageModelConfig) if not n.startswith("_")}
    assert members == {
        "apply",
        "config",
        "decode",
        "head",
        "init_cache",
        "prefill",
        "score",
    }
    for model in (tiny_policy.model, script.Recurrent()):
        assert members <= set(dir(model)) and facts <= set(dir(model.config))
    # The example offers no fact that the library does not read.
    assert facts == set(vars(script.Recurrent.config))
    assert isinstance(tiny_policy.model, Decoder)
