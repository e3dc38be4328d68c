"""Environments of OpenEnv played in process: actions, observations, seeds, rewards."""

import pickle
import random

import pytest

from grpo_jax.environments.openenv import openenv_environment

pytest.importorskip("openenv.core")

from openenv.core.env_server.interfaces import Environment  # noqa: E402
from openenv.core.env_server.types import Action, Observation, State  # noqa: E402


class Guess(Action):
    message: str


class Move(Action):
    column: int
    row: int = 0


class Said(Observation):
    text: str = ""


class Board(Observation):
    cells: list[int] = []
    turn: int = 0


class Hotter(Environment):
    """A number to guess; the row may say how large it can be."""

    def reset(self, seed=None, episode_id=None, largest=10, **kwargs):
        self.number = random.Random(seed).randint(1, largest)
        return Said(text=f"1 to {largest}")

    def step(self, action, timeout_s=None, **kwargs):
        found = action.message == str(self.number)
        return Said(text="no", done=found, reward=found or None)

    def close(self):
        self.number = "closed"

    @property
    def state(self):
        return State()


class Grid(Hotter):
    def reset(self, seed=None, episode_id=None, **kwargs):
        return Board(cells=[0, 0], metadata={"secret": 1})

    def step(self, action, timeout_s=None, **kwargs):
        return Board(cells=[action.column, action.row], turn=1, reward=2)


class Over(Hotter):
    def reset(self, seed=None, episode_id=None, **kwargs):
        return Said(done=True)


def guesses(environment, seed, **row):
    opening = environment.reset(seed=seed, prompt="?", **row)
    for number in range(1, 100):
        step = environment.step(str(number))
        if step.done:
            return opening, number, step
        assert step == ("no", None, False)


def test_the_seed_and_the_chosen_columns_reach_reset():
    factory = openenv_environment(Hotter, action=Guess, columns=["largest"])
    used = pickle.loads(pickle.dumps(factory))()
    numbers = []
    for seed in range(8):
        opening, number, last = guesses(used, seed, largest=50, answer="unused")
        assert opening == "1 to 50" and last == ("", 1.0, True)
        numbers.append(number)
    assert [guesses(factory(), s, largest=50)[1] for s in range(8)] == numbers
    assert len(set(numbers)) > 4
    with pytest.raises(KeyError, match="largest"):
        used.reset(seed=0)
    used.close()
    assert not used.step("1").done and used.step("closed").done


def test_actions_of_several_fields_are_json():
    environment = openenv_environment(Grid, action=Move)()
    assert environment.reset(seed=0) == '{"cells": [0, 0], "turn": 0}'
    step = environment.step(' {"column": 3, "row": 1}\n')
    assert step == ('{"cells": [3, 1], "turn": 1}', 2.0, False)


@pytest.mark.parametrize("text", ["left", "{}", '{"column": "far"}', '{"colum": 1}'])
def test_what_is_no_action_is_answered_and_costs_a_turn(text):
    environment = openenv_environment(Grid, action=Move)()
    environment.reset(seed=0)
    observation, reward, done = environment.step(text)
    assert observation.startswith("This is not a valid action: ")
    assert "http" not in observation and "\n" not in observation
    assert (reward, done) == (0.0, False)
    assert environment.step('{"column": 1}').reward == 2.0


def test_own_functions_take_the_place_of_the_defaults():
    factory = openenv_environment(
        Grid, to_action=lambda text: Move(column=int(text)), to_text=lambda o: "board"
    )
    environment = factory()
    assert environment.reset(seed=0) == "board"
    assert environment.step("7") == ("board", 2.0, False)
    assert "invalid literal" in environment.step("seven").observation


def test_errors_of_the_environment_are_no_invalid_actions():
    class Broken(Grid):
        def step(self, action, timeout_s=None, **kwargs):
            raise ValueError("broken")

    environment = openenv_environment(Broken, action=Move)()
    environment.reset(seed=0)
    with pytest.raises(ValueError, match="broken"):
        environment.step('{"column": 1}')


def test_what_cannot_be_played_is_refused():
    for given in ({}, {"action": Guess, "to_action": str}):
        with pytest.raises(ValueError, match="either the class"):
            openenv_environment(Hotter, **given)
    with pytest.raises(ValueError, match="Over was over at its reset"):
        openenv_environment(Over, action=Guess)().reset(seed=0)
