"""Episodes: ids, masks, rewards and counts of completions of several turns."""

import dataclasses
import json

import numpy as np
import pytest

from grpo_jax.config import (
    EnvironmentsConfig,
    MeshConfig,
    RewardsConfig,
    SamplingConfig,
    TrainConfig,
)
from grpo_jax.environments.base import Step, TextEnvironment
from grpo_jax.environments.host import Host
from grpo_jax.environments.reward import EnvironmentReward
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout.collect import Collector
from grpo_jax.tasks import task_from_rows
from grpo_jax.training._environments import make_episodes

ROWS = [{"prompt": [{"role": "user", "content": f"row {i}"}], "n": i} for i in range(4)]


def add(a: int, b: int) -> str:
    """Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return str(a + b)


def call(name, **arguments):
    text = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{text}\n</tool_call>"


class Echo(TextEnvironment):
    """Says back what it hears; ends at "stop", and breaks at "break"."""

    resets = []  # noqa: RUF012

    def reset(self, *, seed, n, **row):
        self.resets.append((n, seed))
        if n == 3:
            raise RuntimeError("this row has no game")
        return f"/{seed % 7}"

    def step(self, text):
        if text == "break":
            raise RuntimeError("broken")
        return Step(f"{text}!", reward=float(len(text)), done=text == "stop")


def lengths(completions, **_):
    """A reward of the user's: the number of messages."""
    return [float(len(messages)) for messages in completions]


@pytest.fixture
def make(tiny_policy, chat_tokenizer, fake_sampler):
    """A collector of scripted completions, with what plays beside them."""
    hosts = []

    def build(script, *, tools=(), factory=None, rows=ROWS, limits=None, **changes):
        values = {
            "model": "tiny",
            "prompts_per_step": len(rows),
            "group_size": 2,
            "max_new_tokens": 200,
            "max_prompt_tokens": 100,
            "mesh": MeshConfig(fsdp=1),
            "sampling": SamplingConfig(),
        }
        config = TrainConfig(**(values | changes))
        host = Host(tools, factory, limits or EnvironmentsConfig())
        hosts.append(host)
        played = [EnvironmentReward(name) for name in host.reward_names]
        task = task_from_rows(rows, [lengths, *played])
        model = dataclasses.replace(
            tiny_policy.model.config, max_position_embeddings=300
        )
        sampler = fake_sampler(script, chat_tokenizer)
        collector = Collector(
            sampler,
            model,
            chat_tokenizer,
            task,
            RewardRunner(task.rewards, RewardsConfig()),
            config,
            episodes=make_episodes(host, chat_tokenizer, model, config),
        )
        return collector, sampler

    yield build
    for host in hosts:
        host.close()


def played(collector, step=1, position=0):
    rollout = collector.sample(step=step, position=position)
    return collector.reward(rollout, step=step)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, keep=range(300))


def test_a_trajectory_with_tools_is_what_the_template_writes(make, chat_tokenizer):
    said = [call("add", a=2, b=3), call("add", a=5, b=5), "10"]
    collector, sampler = make(lambda number, sample: said, tools=[add])
    rollout = played(collector)
    messages = rollout.completions[0][0]
    assert [m["role"] for m in messages] == ["assistant", "tool"] * 2 + ["assistant"]
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["5", "10"]
    row = rollout.rows[0]
    whole = chat_tokenizer.encode_messages(
        [*row["prompt"], *messages], tools=collector._episodes.chat(row).tools
    )
    drawn = rollout.tokens[0, 0, : rollout.lengths[0, 0]].tolist()
    # The template leaves the last turn open.
    assert sampler.prompts[0] + drawn[:-1] == whole
    # What the policy drew is learned from, and nothing else.
    mask = rollout.mask[0, 0]
    expected = "".join(f"{text}<end>" for text in said)
    assert text_of(chat_tokenizer, rollout.tokens[0, 0][mask]) == expected
    assert rollout.played["calls"].tolist() == [[2, 2]] * 4
    assert rollout.played["turns"].tolist() == [[3, 3]] * 4
    assert rollout.rewards.tolist() == [[5.0, 5.0]] * 4
    (record, *_) = rollout.records(1, np.zeros((4, 2)))
    assert record["length"] == mask.sum() < rollout.lengths[0, 0]


def test_members_of_a_group_begin_alike_and_steps_differ(make):
    Echo.resets.clear()
    collector, _ = make(lambda number, sample: ["stop"], factory=Echo)
    played(collector), played(collector, step=2)
    seeds = {}
    for n, seed in Echo.resets:
        if n != 3:  # whose reset fails
            seeds.setdefault(n, []).append(seed)
    for of_row in seeds.values():
        first, second = of_row[:2], of_row[2:]
        assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
    assert len({seed for of_row in seeds.values() for seed in of_row}) == 6
    rollout = played(collector)
    for row in rollout.rows:
        if row["n"] != 3:
            assert row["prompt"][-1]["content"].startswith(f"row {row['n']}/")


def test_rewards_of_turns_are_summed_and_failures_cost_only_themselves(make):
    def script(number, sample):
        if number == 0 and sample == 1:
            return ["ab", "break"]
        return ["ab", "c", "stop"]

    collector, _ = make(script, factory=Echo)
    rollout = played(collector)
    rewards = rollout.rewards_by_name["Echo"]
    own = {n: row["n"] for n, row in enumerate(rollout.rows)}
    for n, g in np.ndindex(4, 2):
        failed = own[n] == 3 or (n == 0 and g == 1)
        assert rollout.played["failed"][n, g] == failed
        # Whatever the user's function gives, a trajectory that failed has no reward.
        assert np.isnan(rollout.rewards[n, g]) == failed
        if not failed:
            assert rewards[n, g] == 2 + 1 + 4
            assert rollout.rewards[n, g] == 7 + 5
    # A group that cannot begin is sampled without its environment.
    lost = next(n for n in own if own[n] == 3)
    assert len(rollout.completions[lost][0]) == 1


def test_an_answer_that_does_not_fit_is_dropped_with_its_turn(make):
    collector, _ = make(
        lambda number, sample: ["a" * 30, "b" * 30, "c"],
        factory=Echo,
        rows=ROWS[:2],
        max_new_tokens=80,
    )
    rollout = played(collector)
    # 31 drawn, "<end>" of the turn among them; "u:aaa...!<end>a:" are 36; 31 more.
    assert rollout.lengths.tolist() == [[80, 80]] * 2
    assert not rollout.finished.any()
    collector, _ = make(
        lambda number, sample: ["a" * 30, "b"],
        factory=Echo,
        rows=ROWS[:2],
        max_new_tokens=60,
    )
    rollout = played(collector)
    assert rollout.lengths.tolist() == [[31, 31]] * 2
    assert rollout.played["dropped_answers"].all() and not rollout.finished.any()
    assert [len(group[0]) for group in rollout.completions] == [1, 1]


def test_a_turn_that_is_cut_calls_nothing(make):
    said = [call("add", a=2, b=3), "5"]
    collector, _ = make(lambda number, sample: said, tools=[add], max_new_tokens=40)
    rollout = played(collector)
    assert rollout.lengths.tolist() == [[40, 40]] * 4
    assert not rollout.played["calls"].any() and not rollout.finished.any()
    assert rollout.played["turns"].tolist() == [[1, 1]] * 4


def test_malformed_and_unknown_calls_are_counted(make):
    def script(number, sample):
        if sample:
            return ["<tool_call>\n{nonsense\n</tool_call>"]
        return [call("subtract", a=1, b=2), "done"]

    collector, _ = make(script, tools=[add], rows=ROWS[:1])
    rollout = played(collector)
    assert rollout.played["malformed_calls"].tolist() == [[0, 1]]
    assert rollout.played["failed_calls"].tolist() == [[1, 0]]
    assert "error" in rollout.completions[0][0][1]["content"]


def test_answers_are_fed_when_their_turn_has_come_however_fast_they_are(make):
    collector, _ = make(lambda number, sample: ["stop"], factory=Echo, rows=ROWS[:2])
    playing = collector._play(ROWS[:2], range(2), step=1)
    ids = [97, 257]
    playing.ended(0, 0, ids)
    counts = [len(playing.answers(wait=False)) for _ in range(3)]
    assert counts == [0, 0, 1]
    playing.ended(0, 1, ids)
    playing.ended(1, 0, [97])  # cut: nothing answers it
    assert [one[:2] for one in playing.answers(wait=False)] == [(1, 0)]
    assert [one[:2] for one in playing.answers(wait=True)] == [(0, 1)]
    playing.finish()
    playing.close()


def test_reward_functions_see_the_environments(make):
    seen = []

    def look(completions, environments, **_):
        seen.extend(type(one).__name__ for one in environments)
        return [0.0] * len(completions)

    collector, _ = make(lambda number, sample: ["stop"], factory=Echo, rows=ROWS[:2])
    collector._runner = RewardRunner([look], RewardsConfig())
    played(collector)
    assert seen == ["Echo"] * 4


def test_reward_functions_do_not_see_what_failed(make):
    seen = []

    def look(completions, environments, log_extra, **_):
        seen.extend(environment.value for environment in environments)
        log_extra("asked", [1] * len(completions))
        return [1.0] * len(completions)

    class Late(TextEnvironment):
        def reset(self, *, seed, n, **row):
            if n == 1:
                raise RuntimeError("no value is set")
            self.value = n

        def step(self, text):
            return Step(reward=1.0, done=True)

    collector, _ = make(lambda number, sample: ["a"], factory=Late, rows=ROWS[:3])
    collector._runner = RewardRunner([look], RewardsConfig())
    rollout = played(collector)
    numbers = [row["n"] for row in rollout.rows]
    lost = numbers.index(1)
    assert sorted(seen) == [0, 0, 2, 2]
    for values in (rollout.rewards, rollout.rewards_by_name["look"]):
        assert np.isnan(values[lost]).all() and np.isfinite(values).sum() == 4
    assert rollout.extra["asked"][lost] == [None, None]
    # All of them: the functions are not called.
    rows = [{**ROWS[1], "n": 1}] * 2
    collector, _ = make(lambda number, sample: ["a"], factory=Late, rows=rows)
    assert np.isnan(played(collector).rewards).all()


@pytest.mark.parametrize("shown", ["\ud800", [{"role": "user", "content": None}]])
def test_an_opening_that_cannot_be_encoded_costs_its_group(make, shown):
    class Odd(TextEnvironment):
        def reset(self, *, seed, n, **row):
            return shown if n == 1 else "/"

        def step(self, text):
            return Step(reward=1.0, done=True)

    collector, _ = make(lambda number, sample: ["a"], factory=Odd, rows=ROWS[:2])
    rollout = played(collector)
    lost = [row["n"] for row in rollout.rows].index(1)
    assert np.isnan(rollout.rewards[lost]).all()
    assert np.isfinite(rollout.rewards[1 - lost]).all()


@pytest.mark.parametrize("value", [[{1: 2, "a": 3}], [{(1, 2): 3}]])
def test_lists_of_tools_are_shown_whatever_is_in_them(make, value):
    value.append(0)

    def look(a: int) -> list:
        """Looks.

        Args:
          a: A number.
        """
        value[-1] += 1
        return value

    calls = call("look", a=1) + "\n" + call("look", a=1)
    collector, _ = make(
        lambda number, sample: [calls, "b"], tools=[look], rows=ROWS[:1]
    )
    first, second = rollout_results(played(collector))
    assert first != second


def rollout_results(rollout):
    messages = rollout.completions[0][0]
    return [str(m["content"]) for m in messages if m["role"] == "tool"]


def test_a_share_without_rows_plays_nothing(make):
    collector, _ = make(lambda number, sample: ["stop"], factory=Echo)
    playing = collector._episodes.begin([], step=0, numbers=[], members=2)
    assert playing.answers(wait=True) == [] and playing.prompts == []
    assert playing.finish().counts["turns"].shape == (0, 2)
    playing.close()
