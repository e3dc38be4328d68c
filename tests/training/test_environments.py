"""Runs with tools and environments: rewards, metrics, resume, refusals."""

import json

import numpy as np
import pytest

from grpo_jax.config import (
    CheckpointConfig,
    EnvironmentsConfig,
    OptimizerConfig,
    RewardsConfig,
    RolloutConfig,
    SamplingConfig,
    TrainConfig,
)
from grpo_jax.environments.base import Step, TextEnvironment
from grpo_jax.environments.host import Host
from grpo_jax.training._environments import choose_played_task, make_host
from grpo_jax.training.loop import train


class Echo(TextEnvironment):
    """Two answers, which begin with a digit of the seed; a reward for short turns."""

    def reset(self, *, seed, **row):
        self.turns, self.digit = 0, str(seed % 10)
        return f"play{self.digit}"

    def step(self, text):
        self.turns += 1
        reward = 1.0 / (1 + len(text))
        return Step(self.digit + text[:2], reward=reward, done=self.turns == 3)


def add(a: int) -> str:
    """Adds one.

    Args:
        a: A number.
    """
    return str(a + 1)


def length(completions, **_):
    return [float(len(messages)) for messages in completions]


@pytest.fixture(scope="module")
def config(tiny_policy):
    def make(folder, **changes):
        values = {
            "model": str(tiny_policy.folder),
            "run_dir": str(folder),
            "steps": 4,
            "prompts_per_step": 8,
            "group_size": 2,
            "max_new_tokens": 24,
            "eval_every": 2,
            "eval_prompts": 8,
            "sampling": SamplingConfig(stop_ids=tuple(range(0, 258, 3))),
            "optimizer": OptimizerConfig(learning_rate=1e-2),
            "checkpoint": CheckpointConfig(every=2),
        }
        return TrainConfig(**(values | changes))

    return make


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(config(folder), environment_factory=Echo)


def test_a_run_plays_and_measures(whole):
    last = whole.history[-1]
    assert last["episodes/turns"] > 1
    assert last["episodes/failed_rate"] == 0.0
    assert last["rewards/Echo/mean"] == last["reward"] > 0
    assert last["sampler_logp_diff/max"] < 1e-4
    assert last["eval/reward"] > 0
    # Before the first step as well.
    turns = [line.get("eval/episodes/turns", 0) for line in whole.history]
    assert [n > 1 for n in turns] == [True, False, True, False, True]
    (path,) = (whole.run_dir / "completions").glob("*4.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 16
    for record in records:
        roles = [message["role"] for message in record["completion"]]
        assert roles == ["assistant", "user"] * (len(roles) // 2) + ["assistant"] * (
            len(roles) % 2
        )
        assert record["prompt"][-1]["content"].startswith("play")
        assert record["turns"] == roles.count("assistant")


def test_a_run_that_is_stopped_ends_in_the_same_bits(whole, config, tmp_path):
    train(config(tmp_path, steps=2), environment_factory=Echo)
    again = train(config(tmp_path), environment_factory=Echo)
    digest = "params_sha256"
    assert again.summary[digest] == whole.summary[digest]
    lines = (tmp_path / "episodes.jsonl").read_text().splitlines()
    expected = (whole.run_dir / "episodes.jsonl").read_text().splitlines()
    assert lines == expected


def test_environments_cannot_be_carried_over(config, tmp_path):
    carried = config(tmp_path, rollout=RolloutConfig(carry_over=True))
    with pytest.raises(ValueError, match=r"Set rollout\.carry_over to false"):
        train(carried, environment_factory=Echo)


def test_a_model_without_a_template_cannot_have_tools(config, tmp_path):
    rows = [{"prompt": "1"}]
    with pytest.raises(ValueError, match="no chat template"):
        train(config(tmp_path), dataset=rows, rewards=length, tools=[add])


def test_rows_and_rewards_of_a_run_with_environments(config, tmp_path):
    made = config(tmp_path)
    with Host((), Echo, EnvironmentsConfig()) as host:
        alone = choose_played_task(
            TrainConfig(eval_prompts=5),
            host,
            dataset=None,
            rewards=None,
            eval_dataset=None,
        )
        assert [reward.__name__ for reward in alone.rewards] == ["Echo"]
        assert len(alone.test) == 5 and alone.train[0]["prompt"][0]["content"] == ""
        weighted = choose_played_task(
            config(tmp_path, rewards=RewardsConfig(weights=(0.5,))),
            host,
            dataset=[{"prompt": "1"}],
            rewards=length,
            eval_dataset=None,
        )
        assert weighted.reward_weights == (0.5, 1.0)
    with make_host(made, [add], None) as host, pytest.raises(ValueError, match="needs"):
        # Tools alone give no reward.
        choose_played_task(
            made, host, dataset=[{"prompt": "1"}], rewards=None, eval_dataset=None
        )
    assert make_host(made, None, None) is None


def test_masked_tokens_change_no_gradient(tiny_policy):
    """Whatever stands at tokens that were given, the update is the same."""
    import jax
    import jax.numpy as jnp
    import optax

    from grpo_jax.training.state import Batch, make_train_state
    from grpo_jax.training.step import make_train_step

    random = np.random.default_rng(0)
    shape = 2, 2, 10
    mask = random.random(shape) < 0.6
    tokens = jnp.asarray(random.integers(0, 256, shape), jnp.int32)
    logp = random.normal(-3, 1, shape).astype(np.float32)

    def updated(at_given):
        config = TrainConfig(max_new_tokens=10)
        tx = optax.sgd(1.0)
        both = jnp.asarray(np.where(mask, logp, at_given))
        batch = Batch(
            prompts=jnp.ones((2, 3), jnp.int32),
            prompt_lengths=jnp.full(2, 3),
            completions=tokens,
            mask=jnp.asarray(mask),
            advantages=jnp.asarray([[1.0, -1.0], [0.5, -0.5]]),
            sampler_logp=both,
            old_logp=both,
            ref_logp=both - 0.1,
        )
        state = make_train_state(tiny_policy.params, tx)
        state, metrics = jax.jit(make_train_step(tiny_policy.model, tx, config))(
            state, batch
        )
        return state.params, metrics

    params, metrics = updated(0.0)
    other, others = updated(-50.0)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name in ("loss", "kl", "entropy"):
        np.testing.assert_allclose(metrics[name], others[name], atol=1e-6)
