"""Folders that appear whole or not at all."""

import pytest

from grpo_jax.weights.folder import replaced_folder


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
