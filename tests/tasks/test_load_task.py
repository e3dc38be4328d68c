"""Names lead to tasks, and wrong names to the right ones."""

import pytest

from grpo_jax.tasks import choose_task, load_task
from grpo_jax.tasks.arithmetic import correct


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arithmetik", r"Did you mean 'arithmetic'\? Choices: arithmetic, gsm8k"),
        ("gsm8", "Did you mean 'gsm8k'"),
        ("xyz", r"unknown task 'xyz'\. Choices: arithmetic, gsm8k, gsm8k:boxed, "),
        ("arithmetic:hard", "unknown task 'arithmetic:hard'"),
        ("", "unknown task ''"),
        ("rows.json", "FILE.jsonl"),
        ("no/such.jsonl", "is not a file"),
    ],
)
def test_unknown_names_list_the_choices_and_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        load_task(name)


def test_data_is_refused_where_it_would_be_ignored():
    with pytest.raises(ValueError, match="'arithmetic' takes no data"):
        load_task("arithmetic", data="rows.jsonl")


@pytest.mark.parametrize("wrong", ["accuracy", b"", {"a": len}, 3, ["a"], [None], []])
@pytest.mark.parametrize("dataset", [None, [{"prompt": "37+48="}]])
def test_rewards_that_are_no_functions_are_refused(wrong, dataset):
    with pytest.raises(ValueError, match="must be (a )?functions?|no reward function"):
        choose_task("arithmetic", dataset=dataset, rewards=wrong)


def test_functions_come_alone_or_in_any_list_and_those_of_the_task_by_default():
    for given in (len, [len], (len,), iter([len])):
        assert choose_task("arithmetic", rewards=given).rewards == (len,)
    assert choose_task("arithmetic").rewards == (correct,)
