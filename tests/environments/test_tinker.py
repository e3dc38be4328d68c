"""Message environments of the tinker cookbook: each message once, nothing rewritten."""

import asyncio
import copy
import random
import types

import pytest

from grpo_jax.environments.tinker import tinker_environment


class Countdown:
    """Counts down with the policy from a random number; returns its own list."""

    def __init__(self, seed, start=None, rewrites=False):
        self.number = start or random.Random(seed).randint(3, 40)
        self.rewrites, self.history = rewrites, []

    async def initial_observation(self):
        self.history = [
            {"role": "system", "content": "Count down."},
            {"role": "user", "content": [{"type": "text", "text": str(self.number)}]},
        ]
        return self.history

    async def step(self, message):
        await asyncio.sleep(0)
        right = message["content"] == str(self.number - 1)
        self.number -= 2
        self.history.append(message)
        self.history.append({"role": "user", "content": str(self.number)})
        if self.rewrites:
            self.history[-2] = {"role": "assistant", "content": "rewritten"}
        return types.SimpleNamespace(
            reward=float(right),
            episode_done=self.number <= 1,
            next_messages=[] if self.number <= 1 else self.history,
        )


async def play(environment, seed, **row):
    """All that the policy reads, and its rewards, if it counts right."""
    opening = await environment.reset(seed=seed, prompt="unused", **row)
    read, rewards, done = copy.deepcopy(list(opening)), [], False
    while not done:
        step = await environment.step(str(int(read[-1]["content"]) - 1))
        read += step.observation
        rewards.append(step.reward)
        done = step.done
    return read, rewards


async def make_later(*, seed, **row):
    await asyncio.sleep(0)
    return Countdown(seed, row.get("start"))


@pytest.mark.parametrize("make", [lambda *, seed, prompt: Countdown(seed), make_later])
def test_each_message_is_read_once_and_follows_from_the_seed(make):
    factory = tinker_environment(make)
    used = factory()
    read, rewards = asyncio.run(play(used, 3))
    assert read[0] == {"role": "system", "content": "Count down."}
    numbers = [int(message["content"]) for message in read[1:]]
    assert numbers == list(range(numbers[0], 1, -2))
    assert rewards == [1.0] * len(numbers)
    assert asyncio.run(play(used, 5)) != (read, rewards)
    assert asyncio.run(play(used, 3)) == (read, rewards)
    assert asyncio.run(play(factory(), 3)) == (read, rewards)


def test_the_row_reaches_the_environment():
    read, _ = asyncio.run(play(tinker_environment(make_later)(), 0, start=9))
    assert [message["content"] for message in read[1:]] == ["9", "7", "5", "3"]


def test_a_conversation_that_was_rewritten_is_an_error():
    environment = tinker_environment(
        lambda *, seed, **row: Countdown(seed, 9, rewrites=True)
    )()
    with pytest.raises(ValueError, match="Countdown changed the conversation"):
        asyncio.run(play(environment, 0))


def test_parts_that_are_no_text_are_refused_by_kind():
    class Picture(Countdown):
        async def initial_observation(self):
            return [{"role": "user", "content": [{"type": "image", "image": "x"}]}]

    environment = tinker_environment(lambda *, seed, **row: Picture(seed))()
    with pytest.raises(ValueError, match=r"kinds \['image'\]"):
        asyncio.run(environment.reset(seed=0))


def test_there_is_no_step_after_the_end():
    environment = tinker_environment(make_later)()
    with pytest.raises(RuntimeError, match="call reset"):
        asyncio.run(environment.step("1"))
    asyncio.run(play(environment, 0))
    with pytest.raises(RuntimeError, match="call reset"):
        asyncio.run(environment.step("1"))


def test_environments_of_the_library_play():
    pytest.importorskip("tinker_cookbook", reason="needs torch, and is in no extra")
    from tinker_cookbook.eval.benchmarks.gsm8k import GSM8KMessageEnv
    from tinker_cookbook.rl.message_env import MessageEnv, MessageStepResult
    from tinker_cookbook.tool_use import AgentToolMessageEnv

    class Real(Countdown, MessageEnv):
        async def step(self, message):
            return MessageStepResult(**vars(await super().step(message)))

    factory = tinker_environment(lambda *, seed, **row: Real(seed))
    ours = tinker_environment(make_later)
    assert asyncio.run(play(factory(), 3)) == asyncio.run(play(ours(), 3))

    async def answer(environment, text):
        opening = await environment.reset(seed=0, question="6 * 7?", prompt="")
        return opening, await environment.step(text)

    def gsm8k(*, seed, question, prompt):
        return GSM8KMessageEnv(question, "42")

    opening, step = asyncio.run(answer(tinker_environment(gsm8k)(), r"\boxed{42}"))
    assert "6 * 7?" in opening[-1]["content"] and opening[-1]["role"] == "user"
    assert step == ("", 1.0, True)

    async def reward(history):
        return float(len(history)), {}

    def agent(*, seed, **row):
        first = [{"role": "user", "content": row["question"]}]
        return AgentToolMessageEnv([], first, max_turns=3, reward_fn=reward)

    # Without parsed tool calls the first turn is the last one.
    opening, step = asyncio.run(answer(tinker_environment(agent)(), "42"))
    assert (len(opening), step) == (1, ("", 2.0, True))
