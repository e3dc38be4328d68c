"""Folders that appear whole or not at all."""

import os
import pathlib
import shutil

import pytest

from grpo_jax.weights.folder import remove_unfinished, replaced_folder


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up after it."""


def names(folder):
    return {path.name for path in folder.iterdir()}


def export(folder, text):
    with replaced_folder(folder) as place:
        (place / "config.json").write_text(text)


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    export(tmp_path / "a" / "b", "new")
    assert (tmp_path / "a" / "b" / "config.json").read_text() == "new"
    assert names(tmp_path / "a") == {"b"}


def test_an_earlier_export_is_replaced_whole(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_text("old")
    export(folder, "new")
    assert names(folder) == {"config.json"}
    assert names(tmp_path) == {"export"}


def test_a_failed_export_leaves_the_earlier_one(tmp_path):
    folder = tmp_path / "export"
    export(folder, "old")
    with pytest.raises(OSError, match="disk full"), replaced_folder(folder) as place:
        (place / "config.json").write_text("new")
        raise OSError("disk full")
    assert (folder / "config.json").read_text() == "old"
    assert names(tmp_path) == {"export"}


def test_an_export_is_on_disk_before_the_earlier_one_goes(tmp_path, monkeypatch):
    folder = tmp_path / "export"
    export(folder, "old")

    def fail(number):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        export(folder, "new")
    assert (folder / "config.json").read_text() == "old"
    assert names(tmp_path) == {"export"}


def test_a_failed_first_export_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"), replaced_folder(tmp_path / "x"):
        raise OSError("disk full")
    assert names(tmp_path) == set()


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex"):
        export(tmp_path, "new")
    assert names(tmp_path) == {"thesis.tex"}


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export(tmp_path / "x", "new")


def export_until_killed(monkeypatch, folder, renames):
    """An export that is killed after so many renames, or in its end where all are."""
    left = [renames]
    rename = pathlib.Path.rename

    def counted(path, target):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return rename(path, target)

    def killed(path):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pathlib.Path, "rename", counted)
        patch.setattr(shutil, "rmtree", killed)
        export(folder, "new")


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("next_start", [remove_unfinished, None])
def test_a_killed_export_leaves_nothing_after_the_next_start(
    tmp_path, monkeypatch, renames, next_start
):
    folder = tmp_path / "a [draft]-1"
    export(folder, "old")
    export_until_killed(monkeypatch, folder, renames)
    assert len(names(tmp_path)) == (1 if renames == 1 else 2)
    if next_start is None:
        export(folder, "newest")
    else:
        next_start(tmp_path)
    expected = ["newest"] * 3 if next_start is None else ["old", "new", "new"]
    assert (folder / "config.json").read_text() == expected[renames]
    assert names(tmp_path) == {folder.name}


def test_a_folder_that_is_being_written_and_others_stay(tmp_path):
    (tmp_path / ".export-notes").mkdir()
    with replaced_folder(tmp_path / "export") as place:
        remove_unfinished(tmp_path)
        (place / "config.json").write_text("new")
    assert names(tmp_path) == {"export", ".export-notes"}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    # A file in the way stops root as well, whom permissions do not.
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written .*; give another folder"):
        export(tmp_path / "file" / "export", "new")
