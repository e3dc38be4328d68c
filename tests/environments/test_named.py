"""Tools and environments by name: where they are found, and what is told if not."""

import pickle
import subprocess
import sys

import pytest

from grpo_jax.environments.named import _load_named, load_environment, load_tools

CODE = '''
import helper_of_mine
def add(a: int) -> int:
    """Adds."""
    return a + helper_of_mine.ONE
class Game:
    pass
ALL = {"a": Game}
NUMBER = 3
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with code, another one to be in, and modules as they were."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_tools.py").write_text(CODE)
    (tmp_path / "code" / "helper_of_mine.py").write_text("ONE = 1\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = dict(sys.modules)
    yield tmp_path / "code"
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)


def message(given):
    with pytest.raises(ValueError) as error:
        _load_named(given, flag="--tools")
    text = str(error.value)
    assert text.startswith(f"--tools {given}: ") and "\n" not in text
    return text


def test_a_function_of_a_file_is_found_with_what_lies_beside_it(folder):
    assert _load_named("code/my_tools.py:add", flag="--tools")(2) == 3
    assert _load_named(f"{folder}/my_tools.py:NUMBER", flag="--tools") == 3


def test_a_module_of_the_current_folder_is_found(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (tool,) = load_tools(["my_tools:add"])
    assert tool(2) == 3
    assert load_tools([]) == ()


def test_an_installed_module_is_found(folder):
    assert _load_named("json.decoder:JSONDecoder", flag="x").__name__ == "JSONDecoder"


def test_what_was_found_can_be_sent_to_another_process(folder):
    """Where sys.path is the same, as in a process that multiprocessing spawns."""
    game = _load_named("code/my_tools.py:Game", flag="--environment")
    code = f"""
import sys, pickle
sys.path = {sys.path!r}
print(pickle.loads({pickle.dumps(game)!r}).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "Game\n"


def test_classes_functions_and_dicts_make_environments(folder):
    assert load_environment(None) is None
    assert load_environment("code/my_tools.py:Game").__name__ == "Game"
    assert set(load_environment("code/my_tools.py:ALL")) == {"a"}
    with pytest.raises(
        ValueError, match=r"^--environment code/my_tools.py:NUMBER: .*3"
    ):
        load_environment("code/my_tools.py:NUMBER")


def test_a_class_is_no_tool(folder):
    with pytest.raises(ValueError, match=r"a tool must be a function, got <class"):
        load_tools(["code/my_tools.py:add", "code/my_tools.py:Game"])


@pytest.mark.parametrize("given", ["add", "my_tools", ":add", "my_tools:", ""])
def test_a_name_without_a_place_is_told_the_forms(folder, given):
    assert "expected package.module:NAME or path/to/file.py:NAME" in message(given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("code/none.py:add", "there is no file"),
        ("code/my_tools.py:ad", "has no 'ad'; did you mean 'add'?"),
        ("code/my_tools.py:zzz", "has no 'zzz'; it has add, Game, ALL, NUMBER."),
        ("no_such_module:add", "there is no module no_such_module, here or among"),
        ("json.no_such:add", "there is no module json.no_such"),
        ("code/broken.py:f", "importing broken failed with ZeroDivisionError: "),
        ("code/broken.py:f", "broken.py, line 2)"),
        ("code/lacks.py:f", "lacks imports no_such_package, which is not installed"),
        ("code/wrong syntax.py:f", "wrong syntax.py cannot be imported; rename it"),
        ("code/syntax.py:f", "importing syntax failed with SyntaxError"),
        ("code/json.py:f", "another module is called json, "),
    ],
)
def test_what_cannot_be_loaded_is_told_with_the_reason(folder, given, told):
    (folder / "broken.py").write_text("x = 1\ny = x / 0\n")
    (folder / "lacks.py").write_text("import no_such_package\n")
    (folder / "wrong syntax.py").write_text("f = 1\n")
    (folder / "syntax.py").write_text("f = = 1\n")
    (folder / "json.py").write_text("f = 1\n")
    assert told in message(given)


def test_a_file_takes_the_place_of_no_other_module(folder):
    """The folder is searched last, so only what is asked for comes from it."""
    (folder / "random.py").write_text("raise RuntimeError('not this one')\n")
    _load_named("code/my_tools.py:add", flag="--tools")
    sys.modules.pop("random", None)
    import random

    assert str(folder) not in random.__file__
