"""Problems are reproducible, and scored fully or not at all, in the worker only."""

import sys

import pytest

from grpo_jax.config import RewardsConfig
from grpo_jax.rollout.rewards import RewardRunner
from grpo_jax.tasks import load_task
from grpo_jax.tasks.reasoning_gym import TEST_ROWS, TRAIN_ROWS, answer_score

pytest.importorskip("reasoning_gym")


def test_rows_are_reproducible_and_follow_the_seed():
    one, two = (
        load_task("reasoning_gym:chain_sum"),
        load_task("reasoning_gym:chain_sum"),
    )
    other = load_task("reasoning_gym:chain_sum", seed=1)
    assert len(one.train) == TRAIN_ROWS and len(one.test) == TEST_ROWS
    assert one.train[5] == two.train[5] == one.train[5 - TRAIN_ROWS]
    assert one.train[5]["prompt"] != other.train[5]["prompt"]
    assert list(one.test) == list(other.test)
    assert one.train[2:4] == [one.train[2], one.train[3]]
    with pytest.raises(IndexError):
        one.train[TRAIN_ROWS]
    assert one.isolate


def test_no_problem_is_made_from_the_seed_of_another():
    # Problem i of a data set is made from its seed + i.
    used = set()
    for seed in (0, 1, 2, 999_999):
        task = load_task("reasoning_gym:chain_sum", seed=seed)
        first = task.train[0]["dataset_seed"]
        mine = set(range(first, first + TRAIN_ROWS))
        assert not used & mine
        used |= mine
    held_out = task.test[0]["dataset_seed"]
    assert not used & set(range(held_out, held_out + TEST_ROWS))
    assert max(used) < 2**32


def test_only_a_full_score_in_tags_earns_the_reward_in_the_worker():
    task = load_task("reasoning_gym:chain_sum")
    row = task.train[0]
    gold = row["answer"]
    texts = [
        f"I say <answer>{gold}</answer>",
        f"<answer>The answer is {gold}</answer>",  # partial credit in the library
        gold,
        "<answer>17 + </answer>",
        "",
    ]
    columns = {name: [value] * len(texts) for name, value in row.items()}
    config = RewardsConfig(isolate=True, timeout_seconds=30.0)
    with RewardRunner(task.rewards, config) as runner:
        scores = runner.score(
            [row["prompt"]] * len(texts),
            texts,
            columns,
            completion_ids=[[1]] * len(texts),
            step=1,
        )
    assert scores.total.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_scorer_that_raises_means_a_wrong_answer(monkeypatch):
    from grpo_jax.tasks import reasoning_gym

    class Broken:
        def score_answer(self, answer, entry):
            raise SyntaxError(answer)

    monkeypatch.setattr(reasoning_gym, "_dataset", lambda name, seed: Broken())
    monkeypatch.setattr(reasoning_gym, "_entry", lambda name, seed, index: {})
    texts = ["<answer>(</answer>"]
    assert answer_score([], texts, dataset=["x"], dataset_seed=[0], index=[0]) == [0.0]


def test_accuracy_is_offered_only_where_the_library_compares_texts():
    several = load_task("reasoning_gym:countdown")  # many expressions are right
    assert several.is_correct is None
    single = load_task("reasoning_gym:leg_counting")
    row = single.train[0]
    assert single.is_correct(f"<answer>{row['answer']}</answer>", row)
    assert not single.is_correct(row["answer"], row)


def test_unknown_data_sets_and_a_missing_library_are_explained(monkeypatch):
    with pytest.raises(ValueError, match=r"no data set 'chainsum'.*chain_sum"):
        load_task("reasoning_gym:chainsum")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"grpo-jax\[tasks\]"):
        load_task("reasoning_gym:chain_sum")
