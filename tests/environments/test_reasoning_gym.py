"""Problems in several tries: what a wrong answer is told, what a right one earns."""

import concurrent.futures
import multiprocessing

import pytest

from grpo_jax.environments import reasoning_gym as module
from grpo_jax.environments.reasoning_gym import reasoning_gym_environment
from grpo_jax.tasks import load_task

pytest.importorskip("reasoning_gym")


@pytest.fixture
def row():
    return load_task("reasoning_gym:chain_sum").train[3]


@pytest.fixture
def here(monkeypatch):
    """As if in a process for environments."""
    monkeypatch.setattr(module, "_may_hang_here", lambda: True)


def play(factory, row, answers):
    environment = factory()
    assert environment.reset(seed=0, **row) is None
    return [environment.step(text) for text in answers]


def test_a_wrong_answer_gets_its_score_and_another_try(here, row):
    gold = row["answer"]
    steps = play(
        reasoning_gym_environment(discount=0.5),
        row,
        [f"<answer>about {gold}</answer>", gold, f"So <answer>{gold}</answer>"],
    )
    # Partial credit of the library: the length of the answer over that of the text.
    score = len(gold) / len(f"about {gold}")
    assert f"a score of {score:.2f};" in steps[0].observation
    assert "2 more tries" in steps[0].observation
    assert "no answer between <answer>" in steps[1].observation
    assert "Try once more." in steps[1].observation
    assert [step.reward for step in steps] == [0.0, 0.0, 0.25]
    assert [step.done for step in steps] == [False, False, True]


def test_the_last_try_ends_the_episode_without_a_reward(here, row):
    wrong = "<answer>certainly nothing</answer>"
    steps = play(reasoning_gym_environment(tries=2), row, [wrong, wrong])
    assert [step[1:] for step in steps] == [(0.0, False), (0.0, True)]
    assert gold_at_once(row) == [("", 1.0, True)]
    assert play(reasoning_gym_environment(tries=1), row, [wrong])[0].done


def gold_at_once(row):
    text = f"<answer>{row['answer']}</answer>"
    return play(reasoning_gym_environment(), row, [text])


def test_scorers_run_in_a_process_for_environments_only(row):
    with pytest.raises(ValueError, match="environments.isolate"):
        reasoning_gym_environment()().reset(seed=0, **row)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        assert pool.submit(gold_at_once, row).result(300) == [("", 1.0, True)]


def test_rows_of_other_tasks_and_bad_settings_are_refused(here):
    with pytest.raises(ValueError, match="no column dataset_seed, index"):
        reasoning_gym_environment()().reset(seed=0, prompt="?", dataset="x")
    for bad in ({"tries": 0}, {"discount": 0.0}, {"discount": 1.5}):
        with pytest.raises(ValueError, match="tries must be at least 1"):
            reasoning_gym_environment(**bad)
