"""What a run says of itself before it begins."""

import types
from pathlib import Path

import jax
import pytest

from grpo_jax.config import LoraConfig, ObjectiveConfig, TrainConfig
from grpo_jax.parallel import mesh as meshes
from grpo_jax.tasks import load_task, task_from_rows
from grpo_jax.tasks.base import Task
from grpo_jax.training._announce import describe_run, warnings
from grpo_jax.training._policy import load_policy
from grpo_jax.training.evaluate import one_device

ROW = {"prompt": "a", "answer": "b"}


def told(prompts, model="embedded", warning=None, held_out=()):
    policy = types.SimpleNamespace(config=TrainConfig(model=model), warning=warning)
    rows, test = ([{"prompt": p} for p in part] for part in (prompts, held_out))
    task = task_from_rows(rows, rewards=len, eval_rows=test or None)
    return list(warnings(policy, task))


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
    assert f"2 of 3 prompts are of another kind, such as {prompt!r}." in text
    assert (f"It has never seen {unknown}." in text) == (unknown is not None)


def test_the_embedded_model_warns_of_held_out_rows_too():
    (text,) = told(["37+48="], held_out=["52-19=", "3+4="])
    assert "1 of 3 prompts are of another kind, such as '3+4='." in text


def test_settings_without_effect_are_named():
    objective = ObjectiveConfig(cispo_max_weight=5.0)
    config = TrainConfig(model="folder", objective=objective)
    policy = types.SimpleNamespace(config=config, warning=None)
    task = task_from_rows([{"prompt": "a"}], rewards=len)
    assert list(warnings(policy, task)) == list(objective.without_effect()) != []


def test_other_models_know_language_and_are_warned_of_memory_alone():
    assert told(["What?"], model="folder") == []
    assert told(["What?"], model="folder", warning="too large") == ["too large"]


@pytest.mark.parametrize(
    ("test", "source", "said"),
    [
        ([], "", "mine, 2 rows, none held out; a step"),
        ([ROW] * 3, "", "mine, 2 rows, 3 held out; a step"),
        (
            [ROW],
            "those of test.jsonl",
            "rows, 1 held out (those of test.jsonl); a step",
        ),
    ],
)
def test_a_run_always_says_what_is_held_out(test, source, said):
    task = Task(
        name="mine", train=[ROW] * 2, test=test, held_out=source, rewards=(print,)
    )
    policy = types.SimpleNamespace(config=TrainConfig(), base=None, params={})
    line = describe_run(policy, task, one_device(), Path("runs/a"))
    assert said in line


@pytest.mark.parametrize("base", ["auto", "int8", "nf4"])
def test_parameters_are_counted_as_those_of_the_model(base, tiny_policy):
    lora = LoraConfig(rank=2, base_dtype=base)
    config = TrainConfig(model=str(tiny_policy.folder), lora=lora)
    policy = load_policy(config, meshes.make_mesh(config.mesh))
    adapters = sum(leaf.size for leaf in jax.tree.leaves(policy.params))
    whole = sum(leaf.size for leaf in jax.tree.leaves(tiny_policy.params)) + adapters
    task = task_from_rows([ROW], rewards=len)
    line = describe_run(policy, task, one_device(), Path("runs/a"))
    said = f" {whole / 1e6:.3g}M parameters, {adapters / 1e6:.3g}M of them in adapters"
    assert said in line
