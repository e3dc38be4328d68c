"""Problems are reproducible, and scored fully or not at all, in the worker only."""

import sys
import types

import pytest

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards.runner import RewardRunner
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
    config = RewardsConfig(isolate=True, timeout_seconds=600.0)
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
    from grpo_jax.tasks import reasoning_gym as problems

    class Broken:
        def score_answer(self, answer, entry):
            raise SyntaxError(answer)

    monkeypatch.setattr(problems, "_dataset", lambda name, seed: Broken())
    monkeypatch.setattr(problems, "_entry", lambda name, seed, index: {})
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


def test_scorers_are_tried_with_right_and_wrong_answers(caplog):
    with pytest.raises(
        ValueError, match="'game_of_life_halting' in reasoning_gym 0.* "
    ):
        load_task("reasoning_gym:game_of_life_halting")
    with pytest.raises(ValueError, match="cannot make problems of 'composite'"):
        load_task("reasoning_gym:composite")
    assert not caplog.records
    for name, kind in [
        ("gsm_symbolic", "a number with the wrong sign"),
        ("coin_flip", "0 where the answer is another number"),
        ("puzzle24", "the answers of other problems"),
    ]:
        caplog.clear()
        load_task(f"reasoning_gym:{name}")
        (record,) = caplog.records
        assert name in record.getMessage() and f"takes {kind}" in record.getMessage()
    caplog.clear()
    for name in ("chain_sum", "leg_counting", "countdown", "propositional_logic"):
        load_task(f"reasoning_gym:{name}")
    assert not caplog.records


def test_what_the_library_prints_does_not_reach_the_output_of_a_command(capsys):
    assert load_task("reasoning_gym:bf").test[0]["dataset"] == "bf"
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(".")


@pytest.mark.parametrize(
    ("score", "problem"),
    [
        (lambda answer, entry: 1.0, "'certainly nothing' for right"),
        (lambda answer, entry: 0.0, "its own answer '7' for wrong"),
    ],
)
def test_a_scorer_that_does_not_tell_right_from_wrong_is_refused(
    monkeypatch, score, problem
):
    from grpo_jax.tasks import reasoning_gym as problems

    scorer = types.SimpleNamespace(score_answer=score)
    monkeypatch.setattr(problems, "_dataset", lambda name, seed: scorer)
    monkeypatch.setattr(problems, "_entry", lambda *_: {"answer": "7"})
    with pytest.raises(ValueError, match=problem):
        load_task("reasoning_gym:chain_sum")
