"""Evaluations with tools and environments: rewards, accuracy, and what is written."""

import json
import math

import numpy as np
import pytest

from grpo_jax.config import RewardsConfig, SamplingConfig, TrainConfig
from grpo_jax.environments.base import Step, TextEnvironment
from grpo_jax.environments.host import Host
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.reporting.metrics import episode_metrics
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout.generate import GroupSampler
from grpo_jax.tasks.base import Task
from grpo_jax.training._environments import make_episodes, with_played_rewards
from grpo_jax.training._held_out import encode_held_out, make_evaluation
from grpo_jax.training._policy import Policy
from grpo_jax.training.evaluate import GREEDY, complete, evaluate, one_device
from grpo_jax.training.scores import Evaluation

# Stops often, so that drawn texts have several turns.
OFTEN = SamplingConfig(stop_ids=tuple(range(0, 264, 6)))


class Steps(TextEnvironment):
    """Rewards turns by their length, and ends after as many as its seed says."""

    def reset(self, *, seed, prompt=None, step_reward=1.0, answer=None):
        self.left, self.reward = 1 + seed % 3, step_reward
        return f"{seed % 7}="

    def step(self, text):
        self.left -= 1
        return Step(f"{self.left}=", self.reward * len(text), self.left == 0)


def turns(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


def played(policy, task, **options):
    return evaluate(
        policy.model,
        policy.params,
        policy.tokenizer,
        task,
        environment_factory=Steps,
        **({"max_new_tokens": 40, "sampling": OFTEN} | options),
    )


@pytest.fixture(scope="module")
def drawn(tiny_policy):
    """Twice each of five prompts that the environment brings."""
    return played(tiny_policy, None, prompts=5, samples=2, batch_size=3)


def test_rewards_are_those_of_the_turns_that_were_drawn(drawn):
    assert drawn.rewards.shape == (5, 2) and drawn.correct is None
    for n, g in np.ndindex(5, 2):
        said = turns(drawn.completions[n][g])
        assert drawn.played["turns"][n, g] == len(said)
        # A turn that the limit cut is not given to the environment.
        lengths = [len(text) for text in said]
        assert drawn.rewards[n, g] in (sum(lengths), sum(lengths[:-1]))
    assert len(set(drawn.played["turns"].ravel())) > 1
    assert drawn.reward == pytest.approx(drawn.rewards.mean())
    assert math.isnan(drawn.accuracy) and math.isnan(drawn.standard_error)
    # Both members of a group saw what the group's seed made.
    assert len({json.dumps(prompt) for prompt in drawn.prompts}) > 1


def test_the_summary_has_the_reward_and_the_metrics_of_episodes(drawn):
    summary = drawn.summary()
    assert (summary["prompts"], summary["samples"]) == (5, 2)
    assert "accuracy" not in summary and "pass@1" not in summary
    assert summary["reward"] == drawn.reward and summary["reward/none_rate"] == 0.0
    error = drawn.rewards.mean(axis=1).std(ddof=1) / math.sqrt(5)
    assert summary["reward/standard_error"] == pytest.approx(error)
    assert summary["episodes/turns"] == drawn.played["turns"].mean()
    # There are no tools that could be called.
    assert "tools/call_frequency" not in summary


def test_each_record_has_the_conversation_and_what_happened(drawn):
    records = [json.loads(json.dumps(record)) for record in drawn.records(())]
    assert len(records) == 10
    assert drawn.cut[drawn.played["dropped_answers"] > 0].all()
    for record, (n, g) in zip(records, np.ndindex(5, 2), strict=True):
        assert record["prompt"] == drawn.prompts[n]
        assert record["completion"] == drawn.completions[n][g]
        assert record["reward"] == drawn.rewards[n, g]
        assert record["turns"] == len(turns(record["completion"]))
        assert record["failed"] is False and "correct" not in record


def test_rewards_without_numbers_are_left_out_and_counted():
    rewards = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, 5.0]])
    one = Evaluation(completions=[["a", "b"]] * 3, rewards=rewards)
    assert one.reward == 3.0
    summary = one.summary()
    # Of the means 1 and 4 of the prompts that have one.
    assert summary["reward/standard_error"] == pytest.approx(1.5)
    assert summary["reward/none_rate"] == 0.5
    records = list(one.records([{"prompt": "p"}] * 3))
    assert [record["reward"] for record in records][:3] == [1.0, None, None]
    none = Evaluation(completions=[["a"]], rewards=np.array([[np.nan]]))
    assert none.summary()["reward"] is None
    assert "reward" not in Evaluation(completions=[["a"]]).summary()


def make_task(count=4, **changes):
    prompt = [{"role": "user", "content": "Go "}]
    rows = [
        {"prompt": prompt, "step_reward": float(n), "answer": n} for n in range(count)
    ]
    fields = {"name": "steps", "train": rows, "test": rows}
    rewards = (lambda completions, **_: [10.0 * len(c) for c in completions],)
    return Task(**(fields | {"rewards": rewards} | changes))


def test_a_task_that_knows_right_from_wrong_is_judged_by_the_last_turn(polite_policy):
    # The policy says "!" at each turn.
    judge = lambda text, row: text == "!" and row["answer"] > 1  # noqa: E731
    result = played(polite_policy, make_task(is_correct=judge), sampling=GREEDY)
    assert result.accuracy == 0.5
    said = [turns(group[0]) for group in result.completions]
    assert all(set(texts) == {"!"} for texts in said)
    # The task's reward of 10 per message, and the environment's of n per turn.
    expected = [
        10.0 * len(group[0]) + n * len(texts)
        for n, (group, texts) in enumerate(zip(result.completions, said, strict=True))
    ]
    assert result.rewards[:, 0].tolist() == expected
    record = next(result.records(make_task().test))
    assert (record["answer"], record["correct"]) == ("!", False)


def test_weights_of_the_run_weigh_the_task_and_the_environment(polite_policy):
    task = make_task(2)
    both = played(polite_policy, task, sampling=GREEDY)
    alone = played(
        polite_policy, task, sampling=GREEDY, rewards=RewardsConfig(weights=(0.0, 2.0))
    )
    messages = np.array([[10.0 * len(group[0])] for group in both.completions])
    np.testing.assert_allclose(alone.rewards, 2.0 * (both.rewards - messages))


def test_it_measures_what_a_run_measures_of_itself(tiny_policy):
    task = make_task(5)
    config = TrainConfig(
        model="tiny", eval_batch_size=8, max_new_tokens=40, seed=3, sampling=OFTEN
    )
    with Host((), Steps) as host:
        whole = with_played_rewards(task, host)
        episodes = make_episodes(
            host, tiny_policy.tokenizer, tiny_policy.model.config, config
        )
        policy = Policy(
            model=tiny_policy.model,
            tokenizer=tiny_policy.tokenizer,
            params=tiny_policy.params,
            config=config,
        )
        sampler = GroupSampler(
            tiny_policy.model, one_device(), max_prompt_tokens=config.max_prompt_tokens
        )
        sampler.update(tiny_policy.variables, version=0)
        runner = RewardRunner(
            whole.rewards, RewardsConfig(weights=whole.reward_weights)
        )
        with runner:
            own = make_evaluation(
                policy,
                whole,
                whole.test,
                encode_held_out(policy, whole.test, episodes),
                runner,
                one_device(),
                sampler=sampler,
                episodes=episodes,
                agreement=Agreement(),
                announce=lambda text: None,
            )()
    greedy = SamplingConfig(temperature=0.0, stop_ids=OFTEN.stop_ids)
    # The sampling of an evaluation within a run has the seed 0, and is greedy.
    result = played(tiny_policy, task, seed=3, sampling=greedy)
    assert own["eval/reward"] == pytest.approx(result.reward)
    expected = episode_metrics(result.played)
    assert {f"eval/{name}": n for name, n in expected.items()}.items() <= own.items()


@pytest.mark.parametrize("tools", [(), (lambda: None,)])
def test_nothing_to_measure_is_refused(tiny_policy, tools):
    class Silent(Steps):
        def step(self, text):
            return Step("=", None, True)

    with pytest.raises(ValueError, match="nothing to measure: give a task, or an env"):
        evaluate(tiny_policy.model, {}, tiny_policy.tokenizer, None)
    with pytest.raises(ValueError, match="steps.*no held-out prompts with known"):
        played(tiny_policy, make_task(test=()))


def test_completions_of_an_environment_are_messages(polite_policy):
    policy = polite_policy
    given = (policy.model, policy.params, policy.tokenizer, ["Go ", "Now "])
    ((first,), (second,)) = complete(
        *given, max_new_tokens=30, environment_factory=Steps
    )
    assert first[0] == second[0] == {"role": "assistant", "content": "!"}
    # Without an environment it goes on with what it is given, as text.
    assert complete(*given, max_new_tokens=3) == [["   "], ["   "]]


def test_an_environment_that_fails_costs_its_own_prompts_the_reward(polite_policy):
    class Picky(Steps):
        def reset(self, *, seed, **row):
            if row["answer"] == 1:
                raise RuntimeError("not this one")
            return super().reset(seed=seed, **row)

    result = evaluate(
        polite_policy.model,
        polite_policy.params,
        polite_policy.tokenizer,
        make_task(3),
        environment_factory=Picky,
        max_new_tokens=40,
    )
    assert np.isnan(result.rewards[:, 0]).tolist() == [False, True, False]
    assert result.summary()["episodes/failed_rate"] == pytest.approx(1 / 3)
