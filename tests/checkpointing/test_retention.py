"""The best step, against a search through all; the folders of steps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.checkpointing._best_step import BestStep
from grpo_jax.checkpointing._corruption import CorruptCheckpointError
from grpo_jax.checkpointing.retention import TEMPORARY, StepFolders
from grpo_jax.config import CheckpointConfig

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)


def best_of(saved, mode="max", read=None):
    def read_metadata(step):
        if read is not None:
            read.append(step)
        if isinstance(saved[step], Exception):
            raise saved[step]
        return {"metrics": {"loss": saved[step]}}

    config = CheckpointConfig(keep_best="loss", best_mode=mode)
    return BestStep(config, read_metadata, report=lambda text: None)


@given(
    saved=st.dictionaries(st.integers(0, 99), numbers, max_size=8),
    mode=st.sampled_from(["max", "min"]),
)
def test_it_is_the_first_with_the_best_value(saved, mode):
    known = [step for step in sorted(saved) if saved[step] is not None]
    sign = 1 if mode == "max" else -1
    expected = min(known, key=lambda step: (-sign * saved[step], step), default=None)
    assert best_of(saved, mode).among(list(saved)) == expected


def test_steps_that_cannot_be_read_are_passed_over():
    gone = FileNotFoundError("gone")
    errors = [CorruptCheckpointError("?"), gone, ValueError("old"), KeyError("metrics")]
    saved = dict(enumerate(errors)) | {9: 0.5}
    assert best_of(saved).among(list(saved)) == 9


def test_a_storage_that_is_away_is_no_answer():
    with pytest.raises(OSError, match="away"):
        best_of({1: 0.5, 2: OSError("away")}).among([1, 2])


def test_each_metadata_file_is_read_once_and_again_after_a_new_save():
    read = []
    best = best_of({1: 0.5, 2: 0.4}, read=read)
    for _ in range(3):
        assert best.among([1, 2]) == 1
    assert read == [1, 2]
    best.saving(2, {"loss": 0.9})
    best.among([1, 2])
    assert read == [1, 2, 2]


def make(directory, steps):
    folders = StepFolders(directory)
    for step in steps:
        folders.path(step).mkdir(parents=True)
        (folders.path(step) / "file").write_text("x")
    return folders


@settings(max_examples=30)
@given(
    steps=st.sets(st.integers(0, 60), min_size=1, max_size=6),
    keep=st.integers(1, 4),
    every=st.none() | st.integers(1, 10),
    best=st.none() | st.integers(0, 60),
)
def test_the_newest_the_best_and_every_so_many_stay(
    tmp_path_factory, steps, keep, every, best
):
    folders = make(tmp_path_factory.mktemp("steps"), steps)
    folders.remove_old(keep=keep, keep_every=every, best=best)
    newest = set(sorted(steps)[-keep:])
    periodic = set() if every is None else {s for s in steps if s % every == 0}
    assert set(folders.steps()) == newest | periodic | (steps & {best})
    assert not list(folders.directory.glob(f"*{TEMPORARY}*"))


def test_only_whole_steps_are_steps(tmp_path):
    folders = make(tmp_path, [2, 10, 3])
    for name in (f"4.{TEMPORARY}-1", "5.damaged", "notes", "٧"):  # a digit of Arabic
        (tmp_path / name).mkdir()
    (tmp_path / "6").write_text("a file")
    assert folders.steps() == [2, 3, 10]
    assert StepFolders(tmp_path / "nowhere").steps() == []


def test_candidates_are_one_step_or_all_from_the_newest_on(tmp_path):
    folders = make(tmp_path, [2, 10, 3])
    assert folders.candidates(None) == [10, 3, 2]
    assert folders.candidates(3) == [3]
    with pytest.raises(ValueError, match=r"no checkpoint 4 in .*exist: \[2, 3, 10\]"):
        folders.candidates(4)


def test_leftovers_go_and_nothing_else(tmp_path):
    folders = make(tmp_path, [2])
    (tmp_path / f"3.{TEMPORARY}-17").mkdir()
    (tmp_path / "3.12").mkdir()  # complete, and not yet in its place
    (tmp_path / f"1.old.{TEMPORARY}").mkdir()
    (tmp_path / "3.damaged").mkdir()
    folders.remove_leftovers()
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3.damaged"}


def test_each_damaged_copy_of_a_step_keeps_a_name_of_its_own(tmp_path):
    names = [make(tmp_path, [7]).quarantine(7) for _ in range(3)]
    assert names == ["7.damaged", "7.damaged-2", "7.damaged-3"]
    assert all((tmp_path / name / "file").is_file() for name in names)
    assert StepFolders(tmp_path).steps() == []
