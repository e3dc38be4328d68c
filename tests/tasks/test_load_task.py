"""Names lead to tasks, and wrong names to the right ones."""

import pytest

from grpo_jax.tasks import load_task


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arithmetik", r"Did you mean 'arithmetic'\? Choices: arithmetic, gsm8k"),
        ("gsm8", "Did you mean 'gsm8k'"),
        ("xyz", r"unknown task 'xyz'\. Choices: arithmetic, gsm8k, reasoning_gym:NAME"),
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
