"""Environments of SkyRL-Gym as text environments, registered ones and the caller's."""

import pickle
import random

import pytest

from grpo_jax.environments.skyrl_gym import skyrl_gym_environment

skyrl_gym = pytest.importorskip("skyrl_gym")

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput  # noqa: E402

PROMPT = [{"role": "user", "content": "6 * 7?"}]
ROW = {"prompt": PROMPT, "reward_spec": {"ground_truth": "42"}}


class Doubling(BaseTextEnv):
    """Asks for twice a number, three times, and changes the prompt that it gets."""

    closed = 0

    def __init__(self, seed, factor):
        super().__init__()
        self.random, self.factor = random.Random(seed), factor

    def ask(self):
        self.number = self.random.randrange(100)
        return {"role": "user", "content": f"{self.factor} times {self.number}?"}

    def init(self, prompt):
        prompt[0]["content"] += " Think."
        prompt.append(self.ask())
        return prompt, {}

    def step(self, action):
        self.turns += 1
        reward = float(action == str(self.factor * self.number))
        return BaseTextEnvStepOutput(
            observations=[self.ask()],
            reward=reward,
            done=self.turns == 3,
            metadata={},
            postprocessed_action="ignored",
        )

    def close(self):
        type(self).closed += 1


def doubling(*, seed, factor, **row):
    return Doubling(seed, factor)


def test_a_registered_environment_plays_its_rows():
    factory = skyrl_gym_environment("gsm8k_multi_turn", max_turns=3)
    for environment in (factory(), pickle.loads(pickle.dumps(factory))()):
        for _ in range(2):
            assert environment.reset(seed=0, **ROW) is None  # the prompt as it is
            first = environment.step("#### 41")
            # 0.2 / 3 for a well-formed wrong answer of three.
            assert (first.reward, first.done) == (pytest.approx(0.2 / 3), False)
            assert first.observation[0]["role"] == "user"
            assert environment.step("#### 42")[1:] == (1.0, True)
            with pytest.raises(RuntimeError, match="call reset"):
                environment.step("#### 42")
    assert ROW == {"prompt": PROMPT, "reward_spec": {"ground_truth": "42"}}


def test_an_environment_of_the_caller_follows_seed_and_row():
    factory = skyrl_gym_environment(doubling)

    def play(environment, seed, factor):
        opening = environment.reset(seed=seed, prompt=PROMPT, factor=factor)
        assert opening[0]["content"] == "6 * 7? Think." and len(opening) == 2
        seen, done = [opening[-1]["content"]], False
        while not done:
            answer = factor * int(seen[-1].split()[-1][:-1])
            step = environment.step(str(answer))
            assert step.reward == 1.0
            seen, done = [*seen, step.observation[-1]["content"]], step.done
        return seen

    used = factory()
    seen = play(used, 1, 2)
    assert len(seen) == 4 and len(PROMPT) == 1
    assert play(used, 2, 2) != seen
    assert play(used, 1, 2) == play(factory(), 1, 2) == seen
    assert play(used, 1, 3)[0].startswith("3 times")


def test_every_environment_is_closed_once():
    environment = skyrl_gym_environment(doubling)()
    Doubling.closed = 0
    for ended in (False, True, False, True):
        environment.reset(seed=0, prompt="?", factor=2)
        for _ in range(3 * ended):
            environment.step("")
    environment.reset(seed=0, prompt="?", factor=2)
    environment.close()
    environment.close()
    assert Doubling.closed == 5


def test_names_and_settings_are_checked():
    with pytest.raises(ValueError, match="no environment 'gsm9k'; it has .*gsm8k"):
        skyrl_gym_environment("gsm9k")
    with pytest.raises(ValueError, match="max_turns belong"):
        skyrl_gym_environment(doubling, max_turns=3)
