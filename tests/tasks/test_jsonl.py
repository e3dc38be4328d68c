"""Lines are read strictly, splits are fixed, and answers compared by a stated rule."""

import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.tasks import load_task
from grpo_jax.tasks.answers import canonical
from grpo_jax.tasks.base import describe_held_out, first_rows, line_of
from grpo_jax.tasks.jsonl import (
    _is_correct,
    _is_correct_lenient,
    _read_answer,
    _read_answer_lenient,
    answer_reward,
)

ROWS = [{"prompt": f"{i}+1=", "answer": i + 1} for i in range(40)]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_a_tenth_is_held_out_and_nothing_is_lost(tmp_path):
    path = write(tmp_path / "sums.jsonl", ROWS)
    task, again = load_task(path, seed=0), load_task(path, seed=1)
    assert len(task.test) == 4
    assert sorted(r["answer"] for r in [*task.train, *task.test]) == list(range(1, 41))
    assert task.name == "sums"
    assert (
        describe_held_out(task) == f"4 held out (a fixed tenth of {path}, at most 500)"
    )
    assert again.test == task.test  # scores of different seeds compare


def test_at_most_five_hundred_are_held_out(tmp_path):
    rows = [{"prompt": str(i), "answer": "a"} for i in range(6000)]
    task = load_task(write(tmp_path / "many.jsonl", rows))
    assert (len(task.train), len(task.test)) == (5500, 500)


def test_few_rows_are_all_for_training(tmp_path):
    task = load_task(write(tmp_path / "few.jsonl", ROWS[:9]))
    assert (len(task.train), len(task.test)) == (9, 0)
    assert describe_held_out(task) == "none held out"


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("sums_train.jsonl", "sums_test.jsonl"),
        ("constrained_train.jsonl", "constrained_test.jsonl"),
        ("pretrain_train.jsonl", "pretrain_test.jsonl"),
        ("training_v2_train.jsonl", "training_v2_test.jsonl"),
        ("trained_on_train_split.jsonl", "trained_on_test_split.jsonl"),
        ("train_train.jsonl", "test_test.jsonl"),
        ("Sums-Train.jsonl", "Sums-Test.jsonl"),
    ],
)
def test_a_test_file_beside_it_is_held_out(tmp_path, name, test):
    path = write(tmp_path / name, ROWS)
    held_out = write(tmp_path / test, ROWS[:3])
    task = load_task(path)
    assert task.train == ROWS and task.test == ROWS[:3]
    assert describe_held_out(task) == f"3 held out (those of {held_out})"


def test_two_files_that_could_be_held_out_are_an_error(tmp_path):
    path = write(tmp_path / "pretrain_train.jsonl", ROWS)
    write(tmp_path / "pretrain_test.jsonl", ROWS[:3])
    write(tmp_path / "pretest_train.jsonl", ROWS[:3])
    with pytest.raises(ValueError, match="several .*pretest_train.*pretrain_test"):
        load_task(path)


def test_a_folder_stands_for_its_train_file(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS[:2])
    task = load_task(str(tmp_path))
    assert task.train == ROWS and task.test == ROWS[:2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no train\.jsonl"):
        load_task(str(tmp_path / "empty"))


def test_blank_lines_a_byte_order_mark_and_odd_separators_are_fine(tmp_path):
    file = tmp_path / "odd.jsonl"
    line = '{"prompt": "a\u2028b\x85", "answer": "c"}'
    file.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\n  \n{line}\n".encode())
    assert load_task(str(file)).train == [{"prompt": "a\u2028b\x85", "answer": "c"}] * 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{'prompt': 1}", "line 2 is not valid JSON"),
        ('{"prompt": "a", "answer": NaN}', "line 2 is not valid JSON: NaN"),
        ('{"prompt": "a", "prompt": "b"}', "line 2 is not valid JSON: .*duplicate"),
        ('["prompt"]', "line 2 is not a JSON object"),
        ('{"prompt": "a", "answer": 1e400}', "line 2 .*1e400 is larger"),
        ('\n{"prompt": "a", "answer": " . "}', "line 3 has the empty answer ' . '"),
        ('{"prompt": ["a"], "answer": "b"}', "line 2 has a bad message .*'a' is a str"),
        ('{"prompt": "a", "answer": ["b"]}', r"line 2 .*answer \['b'\] \(list\)"),
        ('{"prompt": "a"', "line 2 is not valid JSON"),
        (
            '{"question": "a", "answer": "b"}',
            r"bad\.jsonl, line 2 .*columns are answer, question",
        ),
        ('{"prompt": "a", "solution": "b"}', r"bad\.jsonl, line 2 .*prompt, solution"),
        ('{"prompt": "a", "answer": null}', r"bad\.jsonl, line 2 .*answer None"),
        ('{"prompt": "a", "answer": true}', r"bad\.jsonl, line 2 .*answer True"),
        ('{"prompt": "", "answer": "b"}', r"bad\.jsonl, line 2 .*empty prompt"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n' + line)
    with pytest.raises(ValueError, match=problem):
        load_task(str(file))


def test_all_rows_without_answers_are_told_their_columns(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "solution": "b"}])
    with pytest.raises(ValueError, match="no 'answer' column; its columns are prompt"):
        load_task(path)


def test_missing_empty_and_binary_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        load_task(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        load_task(str(tmp_path / "empty.jsonl"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_task(str(tmp_path / "binary.jsonl"))


def test_reward_and_accuracy_follow_one_rule(tmp_path):
    task = load_task(write(tmp_path / "sums.jsonl", ROWS))
    assert task.rewards == (answer_reward,)
    texts, answers = ["so 7", "Paris", "7 or 8"], [7, "paris.", 7.0]
    assert answer_reward([], texts, answer=answers) == [1.0, 1.0, 0.0]
    pairs = zip(texts, answers, strict=True)
    assert [task.is_correct(t, {"answer": a}) for t, a in pairs] == [True, True, False]


def test_rows_know_their_lines_on_either_side_of_the_split(tmp_path):
    text = "\n".join(
        json.dumps(row) + "\n" for row in ROWS
    )  # every other line is blank
    file = tmp_path / "sums.jsonl"
    file.write_text(text)
    task = load_task(str(file))
    for rows in (task.train, task.test, first_rows(task.test, 2)):
        for number, row in enumerate(rows):
            assert line_of(rows, number) == f"{file}, line {2 * row['answer'] - 1}"


json_numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(json_numbers | st.text(max_size=20).filter(canonical))
def test_every_answer_that_loads_is_right_as_its_own_text(answer):
    row = json.loads(json.dumps({"answer": answer}))
    assert answer_reward([], [str(answer)], answer=[row["answer"]]) == [1.0]


@settings(deadline=None)
@given(json_numbers)
def test_numbers_are_right_however_long_they_are_written(answer):
    row = json.loads(json.dumps({"answer": answer}))
    text = f"So it is {Decimal(str(answer)):f}."
    assert answer_reward([], [text], answer=[row["answer"]]) == [1.0]


texts = st.sampled_from(
    [
        "Nf3",
        "Bf3",
        "3",
        "3.0",
        "so 3",
        "<answer>3</answer>",
        "<answer>3</answer> 4",
        "4",
    ]
    + [
        "answer: Nf3",
        "Nf3.",
        "nf3",
        "",
        "no",
        "\\frac62",
        "3/1",
        "<answer>Bf3</answer>",
    ]
)


@settings(deadline=None)
@given(texts, texts, st.sampled_from(["Nf3", "3", 3, 3.0, "Bf3", 4]))
def test_equal_votes_imply_equal_verdicts(one, two, answer):
    row = {"answer": answer}
    for vote, verdict in [
        (_read_answer, _is_correct),
        (_read_answer_lenient, _is_correct_lenient),
    ]:
        if vote(one, row) == vote(two, row):
            assert verdict(one, row) == verdict(two, row)
        assert vote("Nf3", {"answer": "Nf3"}) != vote("Bf3", {"answer": "Nf3"})
