"""Lines are read strictly, splits are fixed, and answers compared by a stated rule."""

import json

import pytest

from grpo_jax.tasks import load_task
from grpo_jax.tasks.jsonl import answer_reward

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
    assert again.test == task.test  # scores of different seeds compare


def test_at_most_five_hundred_are_held_out(tmp_path):
    rows = [{"prompt": str(i), "answer": "a"} for i in range(6000)]
    task = load_task(write(tmp_path / "many.jsonl", rows))
    assert (len(task.train), len(task.test)) == (5500, 500)


def test_few_rows_are_all_for_training(tmp_path):
    task = load_task(write(tmp_path / "few.jsonl", ROWS[:9]))
    assert (len(task.train), len(task.test)) == (9, 0)


@pytest.mark.parametrize("name", ["train.jsonl", "sums_train.jsonl"])
def test_a_test_file_beside_it_is_held_out(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    write(tmp_path / name.replace("train", "test"), ROWS[:3])
    task = load_task(path)
    assert task.train == ROWS and task.test == ROWS[:3]


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
        ('{"prompt": "a"', "line 2 is not valid JSON"),
        ('{"question": "a", "answer": "b"}', "row 1 .*columns are answer, question"),
        ('{"prompt": "a", "solution": "b"}', "row 1 .*prompt, solution"),
        ('{"prompt": "a", "answer": null}', "row 1 .*answer None"),
        ('{"prompt": "a", "answer": true}', "row 1 .*answer True"),
        ('{"prompt": "", "answer": "b"}', "row 1 .*empty prompt"),
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
