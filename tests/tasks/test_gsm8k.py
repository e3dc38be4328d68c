"""GSM8K rows from files; the gold answer and the completion are read alike."""

import json
import sys

import pytest

from grpo_jax.tasks import load_task
from grpo_jax.tasks.gsm8k import (
    accuracy_reward,
    format_reward,
    is_correct,
    is_correct_lenient,
)

LINES = [
    {"question": "How many?", "answer": "2 * 500 = 1000\n#### 1,000"},
    {"question": "How few?", "answer": "3 - 6 = -3\n#### -3"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_hold_a_user_message_and_the_gold_number(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    write(tmp_path / "test.jsonl", LINES[1:])
    task = load_task("gsm8k", data=str(tmp_path))
    (message,) = task.train[0]["prompt"]
    assert message["role"] == "user"
    assert message["content"].startswith("How many?") and "####" in message["content"]
    assert [row["answer"] for row in task.train] == ["1000", "-3"]
    assert task.train[0]["question"] == "How many?"
    assert [row["answer"] for row in task.test] == ["-3"]
    assert task.rewards == (accuracy_reward, format_reward)
    assert task.reward_weights == (1.0, 0.1)


def test_every_gold_solution_earns_both_rewards(tmp_path):
    write(tmp_path / "train.jsonl", LINES * 10)
    task = load_task("gsm8k", data=str(tmp_path / "train.jsonl"))
    solutions = {line["question"]: line["answer"] for line in LINES}
    completions = [
        [{"role": "assistant", "content": solutions[row["question"]]}]
        for row in task.train
    ]
    gold = [row["answer"] for row in task.train]
    assert len(task.train) == 18 and len(task.test) == 2  # a tenth is held out
    assert accuracy_reward([], completions, answer=gold) == [1.0] * 18
    assert format_reward([], completions) == [1.0] * 18


def test_the_box_replaces_the_mark_in_prompt_reader_and_rewards(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    write(tmp_path / "test.jsonl", LINES[1:])
    task = load_task("gsm8k:boxed", data=str(tmp_path))
    for row in (*task.train, *task.test):
        content = row["prompt"][0]["content"]
        assert r"\boxed{}" in content and "####" not in content
    plain = load_task("gsm8k", data=str(tmp_path))
    texts = [r"So \boxed{-3}.", "So -3.", "#### -3", r"\boxed{4} or -3"]
    row = task.test[0]
    assert [task.is_correct(text, row) for text in texts] == [True, False, False, False]
    assert [task.answer(text, row) for text in texts] == ["-3", None, None, "4"]
    for text in texts:
        assert task.is_correct_lenient(text, row) and plain.is_correct_lenient(
            text, row
        )
    columns = {"answer": ["-3"] * 4, "mark": [row["mark"]] * 4}
    assert accuracy_reward([], texts, **columns) == [1.0, 0.0, 0.0, 0.0]
    assert format_reward([], texts, **columns) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1/2", "0.5"),
        ("1/3", "1/3"),
        ("6.02e23", "602" + "0" * 21),
        ("1 000", "1000"),
        ("$1,000 dollars.", "1000"),
        ("10:30", None),
        ("3-4", None),
        ("3,5", None),
        ("1.8 million", None),
        ("5 of 10", None),
    ],
)
def test_gold_answers_are_read_whole_or_refused_by_their_line(tmp_path, answer, gold):
    line = {"question": "q", "answer": f"So.\n#### {answer}"}
    file = write(tmp_path / "train.jsonl", [LINES[0], line])
    if gold is None:
        with pytest.raises(ValueError, match="line 2 has no number after '####'.*####"):
            load_task("gsm8k", data=str(file))
        return
    row = load_task("gsm8k", data=str(file)).train[1]
    assert row["answer"] == gold
    assert is_correct(line["answer"], row) and is_correct(f"#### {gold}", row)
    assert not is_correct("#### 1", row) and not is_correct("#### 6", row)


def test_accuracy_needs_the_mark_and_format_does_not_need_the_truth():
    completions = ["#### 18.00", "18", "#### 19", "#### eighteen"]
    assert accuracy_reward([], completions, answer=["18"] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert format_reward([], completions) == [1.0, 0.0, 1.0, 0.0]
    row = {"answer": "18"}
    assert [is_correct(text, row) for text in completions] == [
        True,
        False,
        False,
        False,
    ]
    assert is_correct_lenient("It is 18", row) and not is_correct_lenient("19", row)


def test_a_gold_answer_without_a_number_never_equals_a_missing_answer():
    assert accuracy_reward([], ["no idea"], answer=["unknown"]) == [0.0]
    assert not is_correct("no idea", {"answer": "unknown"})
    assert not is_correct_lenient("no idea", {"answer": "unknown"})


def test_rows_of_another_shape_are_named(tmp_path):
    file = write(tmp_path / "train.jsonl", [LINES[0], {"prompt": "a", "label": "b"}])
    with pytest.raises(
        ValueError, match=r"train\.jsonl, line 2 .*'question'.*are label, prompt"
    ):
        load_task("gsm8k", data=str(file))
    file = write(tmp_path / "train.jsonl", [{"question": "q", "answer": 7}])
    with pytest.raises(ValueError, match="line 1 must .*has 7 for 'answer'"):
        load_task("gsm8k", data=str(file))
    file = write(tmp_path / "train.jsonl", [{"question": "q", "answer": "seven"}])
    with pytest.raises(ValueError, match=r"line 1 .*no number after '####'"):
        load_task("gsm8k", data=str(file))


def test_without_data_the_hub_is_asked_and_its_absence_explained(monkeypatch):
    import datasets

    def refuse(name, subset):
        assert (name, subset) == ("openai/gsm8k", "main")
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"offline.*--data DIR"):
        load_task("gsm8k")
    splits = {"train": datasets.Dataset.from_list(LINES), "test": LINES[:1]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: splits)
    task = load_task("gsm8k")
    assert [row["answer"] for row in task.train] == ["1000", "-3"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"grpo-jax\[hub\]"):
        load_task("gsm8k")
