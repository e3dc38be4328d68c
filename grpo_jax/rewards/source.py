"""A description of reward functions, so that a resumed run can warn if they changed.

Code is compared by its source. The values that it uses are compared one by one:
arguments of a partial, default arguments, closures, attributes of an object, constants
and functions of the same module. Libraries, files and services are not seen.
"""

import dis
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grpo_jax.rewards._convention import reward_names

_SHOWN = 40  # characters of a value that a warning quotes; a SHA-256 has more


def describe_rewards(functions: Sequence[Callable[..., Any]]) -> dict[str, dict]:
    """The parts of each function, by its name: numbers as they are, else SHA-256.

    Texts are never stored: one may be the key of a service.
    """
    return {
        name: dict(_parts(function, "", set()))
        for name, function in zip(reward_names(functions), functions, strict=True)
    }


def changed_rewards(
    functions: Sequence[Callable[..., Any]], before: Mapping[str, Any]
) -> list[str]:
    """A warning if functions differ from `before`, an earlier `describe_rewards`.

    It is no error, so that a function that fails can be repaired.
    """
    now, changed = describe_rewards(functions), []
    for name in {**before, **now}:
        if name not in before or name not in now:
            changed.append(name)
        elif (notes := _changes(before[name], now[name])) is not None:
            changed.append(f"{name} ({'; '.join(notes)})" if notes else name)
    text = f"other reward functions than before: {', '.join(changed)}"
    return [text] if changed else []


def _changes(old: Any, new: Mapping[str, str]) -> list[str] | None:
    """The changed values of a function that has changed; None if it has not."""
    if not isinstance(old, Mapping):
        # Older versions of the package stored the SHA-256 of the code, or nothing.
        return None if old in (None, new.get("code", old)) else []
    parts = sorted(p for p in {**old, **new} if old.get(p) != new.get(p))
    if not parts:
        return None
    if "code" in parts:  # other code uses other values: list only common ones
        parts = sorted({*parts} & old.keys() & new.keys() - {"code"})
    notes = []
    for part in parts:
        then, today = old.get(part, "absent"), new.get(part, "absent")
        shown = max(len(then), len(today)) <= _SHOWN
        notes.append(f"{part}: {then} then, {today} now" if shown else part)
    return notes


def _parts(thing: Any, name: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Names and descriptions of the parts of a callable, each part once."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    prefix = f"{name}." if name else ""
    inner, sources, values = _opened(thing)
    for part, source in sources.items():
        yield from _source(source, prefix + part)
    if inner is not None:
        yield from _parts(inner, name, seen)
    for key, value in values.items():
        if isinstance(value, types.FunctionType | functools.partial | type):
            yield from _parts(value, f"{prefix}{key}()", seen)
        elif (text := _text(value)) is not None:
            is_number = isinstance(value, int | float | complex | types.NoneType)
            yield prefix + key, text if is_number else _sha256(text)


def _opened(thing: Any) -> tuple[Any, dict[str, Any], Mapping[str, Any]]:
    """What a callable wraps, the code of its own by name, and the values it uses."""
    if isinstance(thing, functools.partial):
        return thing.func, {}, _arguments(thing)
    if inspect.ismethod(thing):
        return thing.__func__, {}, getattr(thing.__self__, "__dict__", {})
    if inspect.isfunction(thing):
        inner, code = getattr(thing, "__wrapped__", None), inspect.unwrap(thing)
        wrapper = {} if inner is None else {"wrapper": thing.__code__}
        return inner, {"code": code} | wrapper, _read_by(thing)
    if isinstance(thing, type):
        return None, {"code": thing}, {}
    return None, {"code": type(thing)}, getattr(thing, "__dict__", {})


def _source(thing: Any, name: str) -> Iterator[tuple[str, str]]:
    try:
        source = inspect.getsource(thing)
    except (OSError, TypeError):  # built in, or typed at a prompt
        return
    yield name, _sha256(source)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _arguments(partial: functools.partial) -> dict[str, Any]:
    """The values of a partial, by the parameters that take them."""
    try:
        signature = inspect.signature(partial.func)
        bound = signature.bind_partial(*partial.args, **partial.keywords)
    except (TypeError, ValueError, NameError):  # no signature, or one of unknown types
        numbered = {f"argument {i}": value for i, value in enumerate(partial.args)}
        return numbered | partial.keywords
    given = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given


def _read_by(function: types.FunctionType) -> dict[str, Any]:
    """Constants and functions of its module, closure and default arguments."""
    own, code = function.__globals__, function.__code__
    values = {}
    for name in sorted(_global_names(code) & own.keys()):
        imported = (
            isinstance(own[name], types.FunctionType | type)
            and own[name].__module__ != function.__module__
        )
        if not imported and not isinstance(own[name], functools.partial):
            values[name] = own[name]
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    given = function.__defaults__ or ()
    last = code.co_varnames[code.co_argcount - len(given) : code.co_argcount]
    defaults = dict(zip(last, given, strict=True)) | (function.__kwdefaults__ or {})
    return values | defaults


def _global_names(code: types.CodeType) -> set[str]:
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return found.union(*map(_global_names, inner))


def _text(value: Any) -> str | None:
    """As `repr`, whatever the order of sets; None unless equal values have equal texts.

    That is so for numbers, texts and collections of them.
    """
    if isinstance(value, Mapping):
        items = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        items = list(value)
    else:
        plain = types.NoneType | bool | int | float | complex | str | bytes
        return repr(value) if isinstance(value, plain) else None
    found = [_text(item) for item in items]
    texts = [text for text in found if text is not None]
    if len(texts) < len(found):
        return None
    if isinstance(value, Mapping):
        pairs = zip(texts[: len(value)], texts[len(value) :], strict=True)
        return f"{{{', '.join(f'{key}: {item}' for key, item in pairs)}}}"
    if isinstance(value, set | frozenset):
        return f"set({', '.join(sorted(texts))})"
    return f"{type(value).__name__}({', '.join(texts)})"
