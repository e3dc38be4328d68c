"""Files appear whole, and JSON is strict."""

import json
import os

import jax
import pytest

from grpo_jax.config import files


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "summary.json"
    files.write_json(file, {"steps": 1})
    before = file.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(file, "half\ud800")
    with pytest.raises(TypeError):
        files.write_json(file, {"steps": object()})
    assert file.read_bytes() == before


def test_a_reader_never_sees_a_part(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    file.write_text("old")
    seen = []
    replace = os.replace

    def spy(source, target):
        # All is written, beside its place, when the name changes hands.
        seen.append((file.read_text(), os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    files.write_atomically(file, "new and longer")
    assert seen == [("old", len("new and longer"))]
    assert file.read_text() == "new and longer"
    assert list(tmp_path.iterdir()) == [file]


def test_json_is_strict_whatever_the_numbers(tmp_path):
    file = tmp_path / "summary.json"
    files.write_json(file, {"accuracy": float("nan"), "steps": jax.numpy.int32(4)})
    text = file.read_text()
    assert json.loads(text) == {"accuracy": None, "steps": 4}
    assert text.endswith("}\n")
