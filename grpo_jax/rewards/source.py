"""What reward functions are, so that a resumed run can tell that they have changed.

Code is compared by its source and values by themselves: arguments of a partial, default
arguments, closures, attributes of an object, and what is read of the function's own
module. Libraries, files and anything else that a function asks are not seen.
"""

import dis
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grpo_jax.rewards.convention import reward_names

_CODE = "code"
_SHOWN = 40  # characters of a value that a warning quotes


def describe_rewards(functions: Sequence[Callable[..., Any]]) -> dict[str, dict]:
    """For each function, by its name, its parts: numbers as they are, else digests.

    A text is never written out: it may be a key to somebody's service.
    """
    return {
        name: dict(_parts(function, "", set()))
        for name, function in zip(reward_names(functions), functions, strict=True)
    }


def changed_rewards(
    functions: Sequence[Callable[..., Any]], before: Mapping[str, Any]
) -> list[str]:
    """A warning where functions are not what `describe_rewards` said before.

    They may change, so that one that fails can be mended. What an older version of the
    package has not written down is not compared.
    """
    now = describe_rewards(functions)
    told = [
        name + _how(before[name], now[name]) if name in before and name in now else name
        for name in {**before, **now}
        if name not in before or name not in now or _differing(before[name], now[name])
    ]
    return [f"other reward functions than before: {', '.join(told)}"] if told else []


def _differing(old: Any, new: Mapping[str, Any]) -> list[str]:
    """The parts that differ, the code first."""
    if not isinstance(old, Mapping):  # a digest of the code, or nothing
        return [_CODE] if old is not None and new.get(_CODE, old) != old else []
    names = sorted({**old, **new}, key=lambda name: (name != _CODE, name))
    return [n for n in names if (old.get(n, n), n in old) != (new.get(n, n), n in new)]


def _how(old: Any, new: Mapping[str, Any]) -> str:
    """The parts that differ besides the code, numbers with their values.

    Other code has other parts: then those alone that both have.
    """
    differing = _differing(old, new)
    if not isinstance(old, Mapping):
        return ""
    if _CODE in differing:
        differing = [n for n in differing if n in old and n in new and n != _CODE]
    parts = []
    for name in differing:
        values = [part.get(name, "absent") for part in (old, new)]
        shown = max(map(len, values)) <= _SHOWN  # a digest is longer
        parts.append(f"{name}: {values[0]} then, {values[1]} now" if shown else name)
    return f" ({'; '.join(parts)})" if parts else ""


def _parts(thing: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Names and descriptions of what a callable is made of, each part once."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    prefix = f"{name}." if name else ""
    values: Mapping[str, Any] = {}
    if isinstance(thing, functools.partial):
        yield from _parts(thing.func, name, seen)
        values = _arguments(thing)
    elif inspect.ismethod(thing):
        yield from _parts(thing.__func__, name, seen)
        values = getattr(thing.__self__, "__dict__", {})
    elif inspect.isfunction(thing):
        yield from _source(inspect.unwrap(thing), prefix + _CODE)
        if (inner := getattr(thing, "__wrapped__", None)) is not None:
            yield from _source(thing.__code__, f"{prefix}wrapper")
            yield from _parts(inner, name, seen)
        values = _read_by(thing)
    elif isinstance(thing, type):
        yield from _source(thing, prefix + _CODE)
    else:
        yield from _source(type(thing), prefix + _CODE)
        values = getattr(thing, "__dict__", {})
    for key, value in values.items():
        if isinstance(value, types.FunctionType | functools.partial | type):
            yield from _parts(value, f"{prefix}{key}()", seen)
        elif _is_plain(value):
            yield prefix + key, _shown(value)


def _source(thing: Any, name: str) -> Iterator[tuple[str, str]]:
    try:
        source = inspect.getsource(thing)
    except (OSError, TypeError):  # built in, or typed at a prompt
        return
    yield name, hashlib.sha256(source.encode()).hexdigest()


def _arguments(partial: functools.partial) -> dict[str, Any]:
    try:
        bound = inspect.signature(partial.func).bind_partial(
            *partial.args, **partial.keywords
        )
    except (TypeError, ValueError, NameError):  # no signature, or one of unknown types
        numbered = {f"argument {i}": value for i, value in enumerate(partial.args)}
        return numbered | partial.keywords
    given = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given


def _read_by(function: types.FunctionType) -> dict[str, Any]:
    """Default arguments, closure, and what it reads of its own module."""
    own = function.__globals__
    read = {
        name: own[name]
        for name in sorted(_global_names(function.__code__))
        if name in own and _is_of_module(own[name], function.__module__)
    }
    closure = {}
    cells = function.__closure__ or ()
    for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
        try:
            closure[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    code, given = function.__code__, function.__defaults__ or ()
    last = code.co_varnames[code.co_argcount - len(given) : code.co_argcount]
    defaults = dict(zip(last, given, strict=True)) | (function.__kwdefaults__ or {})
    return read | closure | defaults


def _is_of_module(value: Any, module: str) -> bool:
    is_code = isinstance(value, types.FunctionType | type)
    return value.__module__ == module if is_code else _is_plain(value)


def _global_names(code: types.CodeType) -> set[str]:
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return found.union(*map(_global_names, inner))


def _is_plain(value: Any) -> bool:
    """Whether equal values have equal texts: numbers, texts, collections of them."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(
        value, bool | int | float | complex | str | bytes
    )


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    return hashlib.sha256(_text(value).encode()).hexdigest()


def _text(value: Any) -> str:
    """As `repr`, whatever the order of sets."""
    if isinstance(value, Mapping):
        pairs = (f"{_text(key)}: {_text(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_text, value))})"
    if isinstance(value, set | frozenset):
        return f"set({', '.join(sorted(map(_text, value)))})"
    return repr(value)
