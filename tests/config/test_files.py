"""Files are written atomically, and JSON is strict."""

import json
import os

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.config import files


def test_values_that_cannot_be_written_leave_the_old_file(tmp_path):
    file = tmp_path / "summary.json"
    files.write_json(file, {"steps": 1})
    before = file.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        files.write_text(file, "half\ud800")
    with pytest.raises(TypeError):
        files.write_json(file, {"steps": object()})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"))


@given(old=st.none() | texts, new=texts, fails=st.sampled_from(["fsync", "replace"]))
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path_factory, old, new, fails
):
    folder = tmp_path_factory.mktemp("run")
    file = folder / "config.yaml"
    if old is not None:
        files.write_text(file, old)

    def fail(*arguments):
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, fails, fail)
        with pytest.raises(OSError, match="disk full"):
            files.write_text(file, new)
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert found == ({} if old is None else {"config.yaml": old})
    files.write_text(file, new)
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert found == {"config.yaml": new}


def test_the_content_is_on_disk_before_the_name_changes(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    file.write_text("old")
    seen = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(number):
        seen.append(os.fstat(number).st_ino)
        fsync(number)

    def spy_replace(source, target):
        inode = os.stat(source).st_ino
        assert seen == [inode], "fsync of the new file must come first"
        seen.append((file.read_text(), os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    files.write_text(file, "new and longer")
    assert seen[1] == ("old", len("new and longer"))
    assert file.read_text() == "new and longer"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_and_the_file_it_points_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "file")
    for text in ("first", "second"):
        files.write_text(link, text)
        assert link.is_symlink() and (tmp_path / "there" / "file").read_text() == text


def test_a_file_that_was_made_private_stays_private(tmp_path):
    file = tmp_path / "eval.json"
    file.write_text("old")
    file.chmod(0o600)
    files.write_text(file, "new")
    assert file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o600


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_json_is_strict_whatever_the_numbers(tmp_path):
    file = tmp_path / "summary.json"
    files.write_json(file, {"accuracy": float("nan"), "steps": jax.numpy.int32(4)})
    text = file.read_text()
    assert json.loads(text) == {"accuracy": None, "steps": 4}
    assert text.endswith("}\n")
