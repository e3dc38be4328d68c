"""The protocol of text environments, by the game that the tests play."""

import pytest

from grpo_jax.environments.base import Step, TextEnvironment


@pytest.mark.parametrize("seed", range(20))
def test_halving_finds_the_number_in_time(guess_number, seed):
    game = guess_number()
    assert game.reset(seed=seed, prompt="") == "Guess my number from 1 to 16."
    low, high, step = 1, 16, Step()
    while not step.done:
        guess = (low + high) // 2
        step = game.step(f"I say {guess}")
        if step.observation == "It is lower.":
            high = guess - 1
        elif step.observation == "It is higher.":
            low = guess + 1
    assert step.reward == 1.0


def test_the_seed_decides_the_number(guess_number):
    game = guess_number()

    def answers(seed):
        game.reset(seed=seed)
        return [game.step(text) for text in ("8", "no idea", "1", "16", "2")]

    assert answers(3) == answers(3)
    assert len({str(answers(seed)) for seed in range(20)}) > 1
    assert answers(3)[1] == ("Give a number.", 0.0, False)


def test_an_environment_has_both_methods():
    class Half(TextEnvironment):
        def reset(self, *, seed, **row):
            return None

    with pytest.raises(TypeError, match="step"):
        Half()
    assert Step() == ("", 0.0, False)
