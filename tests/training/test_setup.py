"""What a run is told before it begins."""

import types

import pytest

from grpo_jax.config import TrainConfig
from grpo_jax.tasks import load_task, task_from_rows
from grpo_jax.training.setup import file_name, warnings


def told(prompts, model="embedded", warning=None):
    policy = types.SimpleNamespace(config=TrainConfig(model=model), warning=warning)
    rows = [{"prompt": prompt} for prompt in prompts]
    return list(warnings(policy, task_from_rows(rows, rewards=len)))


def test_the_embedded_model_knows_its_own_task():
    policy = types.SimpleNamespace(config=TrainConfig(), warning=None)
    assert list(warnings(policy, load_task("arithmetic"))) == []


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("What is 37+48?", "' ' '?' 'W' 'a' 'h' 'i' 's' 't'"),
        ("37*48=", "'*'"),
        ("37 + 48 =", "' '"),
        ("3+4=", None),  # a sum of single digits is another thing to it
        ("137+48=", None),
        ("37+48", None),
        ("12+13+14=", None),
        ("-12+13=", None),
    ],
)
def test_the_embedded_model_warns_of_what_it_has_never_seen(prompt, unknown):
    (text,) = told(["37+48=", prompt, prompt])
    assert "2 of 3 prompts are others" in text and repr(prompt) in text
    assert (f"with {unknown}, never seen" in text) == (unknown is not None)


def test_other_models_know_language_and_are_warned_of_memory_alone():
    assert told(["What?"], model="folder") == []
    assert told(["What?"], model="folder", warning="too large") == ["too large"]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("arithmetic", "arithmetic"),
        ("data/my rows.jsonl", "my-rows"),
        ("reasoning_gym:countdown", "reasoning_gym-countdown"),
        ("…", "run"),
    ],
)
def test_a_task_names_a_folder(task, name):
    assert file_name(task) == name
