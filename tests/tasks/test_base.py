"""Rows are checked before anything runs, and the first bad one is named."""

import dataclasses
import functools

import datasets
import pytest

from grpo_jax.tasks import Task, task_from_rows
from grpo_jax.tasks._rows import is_conversational
from grpo_jax.tasks.base import completion_text, is_per_completion, per_completion

CHAT = [{"role": "user", "content": "2+2?"}]
GOOD = {"prompt": "a"}


def reward(completions, **kwargs):
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("text", "is a str; expected a mapping"),
        ({"question": "q", "id": 1}, "no 'prompt' column; its columns are id, quest"),
        ({"prompt": ""}, "has an empty prompt"),
        ({"prompt": []}, "has an empty list of messages"),
        ({"prompt": None}, "has a prompt of type NoneType"),
        ({"prompt": 3}, "has a prompt of type int, 3; expected a string or a list"),
        (
            {"prompt": ["hi"]},
            "bad message .* number 0 from 0: 'hi' is a str; each must",
        ),
        ({"prompt": [*CHAT, None]}, "number 1 from 0: None is a NoneType"),
        (
            {"prompt": [{"role": "user"}]},
            "bad message .*it has no 'content', only role",
        ),
        (
            {"prompt": [{"role": "user", "content": ["image"]}]},
            r"bad message .*its 'content' is \['image'\], a list",
        ),
        ({"prompt": [{"role": 7, "content": "a"}]}, "its 'role' is 7, a int"),
        ({"prompt": "a", "trainer_state": 1}, "'trainer_state', a name reserved"),
        ({"prompt": CHAT}, "mixes string prompts and chat messages"),
        (
            {"prompt": "a", "extra": 1},
            "has the columns extra, prompt, the first has pro",
        ),
    ],
)
def test_the_first_bad_row_is_named_with_what_is_wrong(row, problem):
    with pytest.raises(ValueError, match=r"row 2 \(counting from 0\) "):
        task_from_rows([GOOD, GOOD, row, row], [reward])
    with pytest.raises(ValueError, match=problem):
        task_from_rows([GOOD, GOOD, row, row], [reward])


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "are empty"),
        ((row for row in [GOOD]), "with a length, got a generator"),
        (GOOD, "got a dict"),
        ("rows", "got a str"),
        (datasets.DatasetDict(train=[GOOD], test=[]), "Choose a split: train, test"),
    ],
)
def test_what_is_not_rows_is_refused(rows, problem):
    with pytest.raises(ValueError, match=problem):
        task_from_rows(rows, [reward])


def test_held_out_rows_are_checked_like_the_others():
    with pytest.raises(ValueError, match="held-out dataset rows: row 1"):
        task_from_rows([GOOD], [reward], eval_rows=[GOOD, {"prompt": ""}])
    with pytest.raises(ValueError, match="prompts of two kinds"):
        task_from_rows([GOOD], [reward], eval_rows=[{"prompt": CHAT}])


def test_a_datasets_dataset_is_used_as_it_is():
    rows = datasets.Dataset.from_list([{"prompt": CHAT, "answer": "4"}] * 3)
    task = task_from_rows(rows, reward)
    assert task.train is rows
    assert task.train[1]["answer"] == "4"
    assert is_conversational(task.train)
    assert task.rewards == (reward,)


def test_rewards_must_be_functions_and_weights_must_fit():
    with pytest.raises(ValueError, match="no reward function"):
        task_from_rows([GOOD], [])
    with pytest.raises(ValueError, match="must be functions, got 'accuracy'"):
        task_from_rows([GOOD], ["accuracy"])
    task = task_from_rows([GOOD], [reward])
    with pytest.raises(ValueError, match="2 entries for 1 reward functions"):
        dataclasses.replace(task, reward_weights=(1.0, 2.0))


def test_a_task_made_directly_is_checked_too():
    with pytest.raises(ValueError, match="row 0"):
        Task(name="mine", train=[{"text": "a"}], rewards=(reward,))


def test_the_text_of_a_completion_of_either_kind():
    assert completion_text("4") == "4"
    assert completion_text([{"role": "assistant", "content": "4"}]) == "4"


def marked_ones():
    def plain(completions, **_):
        return [0.0 for _ in completions]

    class Scorer:
        @per_completion
        def __call__(self, completions):
            return plain(completions)

        @per_completion
        def score(self, completions):
            return plain(completions)

    @dataclasses.dataclass  # which has no hash
    class Bonus:
        amount: float

        def __call__(self, completions):
            return [self.amount for _ in completions]

    function = per_completion(plain)
    assert function is plain
    yield function
    yield functools.partial(function, weight=2.0)
    yield functools.partial(functools.partial(function), weight=2.0)
    yield Scorer()
    yield Scorer().score
    yield per_completion(Bonus(1.0))
    yield per_completion(functools.partial(reward))


@pytest.mark.parametrize(
    "function", list(marked_ones()), ids=lambda f: type(f).__name__
)
def test_functions_are_marked_that_score_completions_alone(function):
    assert is_per_completion(function)


def test_a_mark_is_of_one_function_and_of_none_around_it():
    function = next(marked_ones())

    @functools.wraps(function)
    def ranked(completions, **columns):
        return sorted(function(completions, **columns))

    class Ranked(type(list(marked_ones())[3])):
        def __call__(self, completions):
            return sorted(super().__call__(completions))

    for other in (ranked, Ranked(), reward, len, print, [].append, str.upper):
        assert not is_per_completion(other)
    with pytest.raises(ValueError, match="mark its method __call__"):
        per_completion(Ranked)
    with pytest.raises(ValueError, match="got 3"):
        per_completion(3)
