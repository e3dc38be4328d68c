"""What a run is told, and says of itself, before it begins."""

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import train
from grpo_jax.config import RewardsConfig, TrainConfig
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.tasks import load_task, task_from_rows
from grpo_jax.tasks.arithmetic import correct
from grpo_jax.tasks.base import Task
from grpo_jax.training import setup
from grpo_jax.training.evaluate import one_device
from grpo_jax.training.scores import Completed
from grpo_jax.training.setup import (
    choose_task,
    describe_run,
    file_name,
    make_evaluation,
    make_runner,
    warnings,
)

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


def test_other_models_know_language_and_are_warned_of_memory_alone():
    assert told(["What?"], model="folder") == []
    assert told(["What?"], model="folder", warning="too large") == ["too large"]


@pytest.mark.parametrize("wrong", ["accuracy", b"", {"a": len}, 3, ["a"], [None], []])
@pytest.mark.parametrize("dataset", [None, [{"prompt": "37+48="}]])
def test_rewards_that_are_no_functions_are_refused(wrong, dataset):
    with pytest.raises(ValueError, match="must be (a )?functions?|no reward function"):
        choose_task(TrainConfig(), dataset, wrong, None)


def test_functions_come_alone_or_in_any_list_and_those_of_the_task_by_default():
    for given in (len, [len], (len,), iter([len])):
        assert choose_task(TrainConfig(), None, given, None).rewards == (len,)
    assert choose_task(TrainConfig(), None, None, None).rewards == (correct,)


@pytest.mark.parametrize("config", ["embedded", {"steps": 1}, {}, 3, TrainConfig])
def test_a_run_is_described_by_a_configuration(config):
    with pytest.raises(ValueError, match="config must be a TrainConfig, got "):
        train(config)


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
    policy = types.SimpleNamespace(config=TrainConfig(), base={}, trained={})
    line = describe_run(policy, task, one_device(), Path("runs/a"))
    assert said in line


def lengths(completions, prompts, **_):
    """Rewards that differ, and none for the empty text."""
    return [len(text) / 7 if text else None for text in completions]


def test_rewards_of_held_out_rows_come_in_batches_as_their_completions_do():
    seen = []

    def count(completions, **_):
        seen.append(len(completions))
        return [float(text) for text in completions]

    rows = [{"prompt": "a"}] * 7
    completed = Completed(texts=[[str(n)] for n in range(7)], ids=[[[1]]] * 7)
    task = task_from_rows(rows, count, eval_rows=rows)
    with RewardRunner(task.rewards, RewardsConfig()) as runner:
        given = setup._verdicts(completed, rows, task, runner, 3)
    assert given == list(range(7)) and seen == [3, 3, 1]


def needs_answer(completions, answer, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("changes", "refused"), [({}, True), ({"eval_every": 0}, False)]
)
def test_held_out_rows_have_the_columns_that_rewards_need(changes, refused):
    rows = [{"prompt": "a", "answer": "b"}]
    task = task_from_rows(rows, needs_answer, eval_rows=[{"prompt": "a", "Answer": 1}])
    config = TrainConfig(model="tiny", **changes)
    if not refused:
        make_runner(config, task).close()
        return
    with pytest.raises(ValueError, match="needs answer, which the held-out rows do"):
        make_runner(config, task)


def test_held_out_rows_that_are_judged_by_comparing_need_no_columns_of_rewards():
    task = dataclasses.replace(load_task("arithmetic"), rewards=(lengths,))
    make_runner(TrainConfig(), task).close()


@pytest.fixture
def evaluation(tiny_policy, fake_sampler):
    """What measures a policy whose completion of the row of a number is as long."""
    sampler = fake_sampler(lambda number, _: "x" * (number % 4))
    policy = types.SimpleNamespace(
        model=tiny_policy.model,
        tokenizer=tiny_policy.tokenizer,
        config=TrainConfig(model="tiny", eval_batch_size=8),
    )
    rows = [{"prompt": str(number)} for number in range(7)]

    def measure(seen, prompts, judged):
        def scores(completions, prompts, **_):
            seen.extend(prompts)
            return lengths(completions, prompts)

        def is_right(text, row):
            seen.append(row["prompt"])
            return len(text) == 2

        task = task_from_rows(rows, scores, eval_rows=rows[:prompts])
        if judged:
            task = dataclasses.replace(task, is_correct=is_right)
        with RewardRunner(task.rewards, RewardsConfig()) as runner:
            return make_evaluation(
                policy,
                task,
                runner,
                TrainConfig(model="tiny", max_new_tokens=8),
                None,
                sampler=sampler,
                agreement=Agreement(),
                announce=lambda text: None,
            )()

    return measure


@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize(("prompts", "count"), [(7, 3), (2, 4), (1, 2)])
def test_processes_score_each_held_out_row_once_and_agree(
    prompts, count, judged, evaluation, on_processes
):
    seen = []
    alone = evaluation(seen, prompts, judged)
    assert sorted(seen) == [str(number) for number in range(prompts)]
    seen.clear()
    together = on_processes(lambda _: evaluation(seen, prompts, judged), count)
    assert sorted(seen) == [str(number) for number in range(prompts)]
    for metrics in together:
        for name in metrics.keys() - {"time/eval"}:
            np.testing.assert_array_equal(metrics[name], alone[name])
