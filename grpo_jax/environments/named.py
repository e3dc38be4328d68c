"""Tools and environments that a command names: found in a module or a file."""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_FORMS = "package.module:NAME or path/to/file.py:NAME"


def _load_named(given: str, *, flag: str) -> Any:
    """The object of that name in a module, or in a file of Python.

    The module is imported as from a script in the current folder, and a file as from a
    script in its own folder. So both are found again by worker processes.

    Args:
      given: ``package.module:NAME`` or ``path/to/file.py:NAME``.
      flag: that it was given to, for messages.

    Raises:
      ValueError: no such form, module, file or name; or the module cannot be imported.
    """
    said = f"{flag} {given}"
    place, _, name = given.rpartition(":")
    if not place or not name:
        raise ValueError(f"{said}: expected {_FORMS}.")
    is_file = place.endswith(".py")
    module = _of_file(Path(place), said) if is_file else _of_name(place, said)
    names = vars(module)
    if name not in names:
        public = [
            key
            for key, value in names.items()
            if not (key.startswith("_") or inspect.ismodule(value))
        ]
        near = difflib.get_close_matches(name, public, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(public)}."
        raise ValueError(f"{said}: {place} has no {name!r}; {hint}")
    return names[name]


def load_tools(given: Sequence[str]) -> tuple[Any, ...]:
    """The functions of these names; none for none.

    Raises:
      ValueError: there is nothing of a name, or it is no function.
    """
    found = tuple(_load_named(name, flag="--tools") for name in given)
    for name, tool in zip(given, found, strict=True):
        if not inspect.isroutine(tool):
            raise ValueError(
                f"--tools {name}: a tool must be a function, got {tool!r:.80}; an "
                "environment goes to --environment."
            )
    return found


def load_environment(given: str | None) -> Any:
    """The class, function or dict of that name that makes environments.

    Raises:
      ValueError: there is nothing of that name, or it makes no environments.
    """
    if given is None:
        return None
    found = _load_named(given, flag="--environment")
    if not (callable(found) or isinstance(found, dict)):
        raise ValueError(
            f"--environment {given}: expected a class, a function without arguments "
            f"that makes an environment, or a dict of them by name; got {found!r:.80}."
        )
    return found


def _of_file(path: Path, said: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ValueError(f"{said}: there is no file {path}; expected {_FORMS}.")
    if not path.stem.isidentifier():
        raise ValueError(
            f"{said}: {path.name} cannot be imported; rename it, with letters, digits "
            "and underscores only."
        )
    # Behind all others, so that a helper called json.py takes the place of nothing.
    _append(str(path.parent))
    spec = importlib.util.find_spec(path.stem)
    if spec is None or Path(spec.origin or "").resolve() != path:
        other = "" if spec is None else f", {spec.origin}"
        raise ValueError(
            f"{said}: another module is called {path.stem}{other}; rename the file."
        )
    return _import(path.stem, said)


def _of_name(name: str, said: str) -> ModuleType:
    _append(os.getcwd())
    return _import(name, said)


def _append(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()


def _import(name: str, said: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{name}.".startswith(f"{missing}."):
            raise ValueError(
                f"{said}: {name} imports {missing}, which is not installed."
            ) from error
        raise ValueError(
            f"{said}: there is no module {missing}, here or among the installed "
            f"packages; expected {_FORMS}."
        ) from error
    except Exception as error:  # it is a program of the user
        last = traceback.extract_tb(error.__traceback__)[-1]
        why = " ".join(str(error).split())
        raise ValueError(
            f"{said}: importing {name} failed with {type(error).__name__}: {why} "
            f"({last.filename}, line {last.lineno})"
        ) from error
