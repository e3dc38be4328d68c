"""Sections of a configuration: dataclasses whose fields carry rules.

The type of a field is its rule (`Positive`, `Count`, ...). `Section` applies all rules
on construction and reports every problem at once: field, expected value, given value.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from grpo_jax.config.trl_names import TRL_NAMES, TRL_PAGE


@dataclass(frozen=True)
class _Rule:
    """A test of a value, and what the value must do, in words."""

    holds: Callable[[Any], bool]
    words: str


def _number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


Text = Annotated[
    str, _Rule(lambda v: isinstance(v, str) and bool(v), "be a text that is not empty")
]
Finite = Annotated[float, _Rule(_number, "be a finite number")]
Positive = Annotated[
    float, _Rule(lambda v: _number(v) and v > 0, "be a positive number")
]
NotNegative = Annotated[
    float, _Rule(lambda v: _number(v) and v >= 0, "be a number not below 0")
]
AboveOne = Annotated[
    float, _Rule(lambda v: _number(v) and v > 1, "be a number above 1")
]
Share = Annotated[float, _Rule(lambda v: _number(v) and 0 < v <= 1, "be in (0, 1]")]
Decay = Annotated[float, _Rule(lambda v: _number(v) and 0 <= v < 1, "be in [0, 1)")]
Count = Annotated[int, _Rule(lambda v: _whole(v) and v >= 1, "be an integer from 1 on")]
Size = Annotated[int, _Rule(lambda v: _whole(v) and v >= 0, "be an integer from 0 on")]
Seed = Annotated[
    int, _Rule(lambda v: _whole(v) and 0 <= v < 2**32, "be an integer in [0, 2**32)")
]
AxisSize = Annotated[
    int,
    _Rule(lambda v: _whole(v) and (v == -1 or v > 0), "be a number of devices, or -1"),
]


class Section:
    """Base of the configuration's dataclasses, which check themselves on construction.

    `section` is the prefix of its fields in messages. Subclasses yield problems between
    fields in `problems`, which is called only if each field is right.
    """

    section: ClassVar[str] = ""

    # Runs before the constructor of the dataclass, which would raise a bare TypeError.
    def __new__(cls, *_: Any, **fields: Any) -> Self:
        """Raise ValueError for an unknown field, with the one that is meant."""
        section: type = cls
        known = {field.name for field in dataclasses.fields(section)}
        found = [
            f"{name} is not a field of {cls.__name__}; {_field_meant(cls, name)}"
            for name in fields
            if name not in known
        ]
        if found:
            raise ValueError("; ".join(found) + ".")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Raise ValueError with every problem."""
        found = []
        hints = typing.get_type_hints(type(self), include_extras=True)
        for name, hint in hints.items():
            if typing.get_origin(hint) is not ClassVar:
                words = _broken_rule(hint, vars(self)[name])
                if words:
                    found.append(f"{name} must {words}, got {vars(self)[name]!r}")
        found = found or list(self.problems())
        if found:
            prefix = f"{self.section}." if self.section else ""
            raise ValueError("; ".join(prefix + problem for problem in found) + ".")

    def problems(self) -> Iterator[str]:
        """Problems between fields, one line each."""
        yield from ()


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a config, nested, with tuples as lists: ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return to_dict(value)
        return list(value) if isinstance(value, tuple) else value

    return {f.name: plain(vars(config)[f.name]) for f in dataclasses.fields(config)}


def from_dict(cls: type, values: Mapping[str, Any], *, where: str = "") -> Any:
    """A config of class `cls` from the nested dict that `to_dict` makes.

    Raises:
      ValueError: with every problem: unknown keys (with the nearest name), sections
        that are not mappings, and the problems of the sections themselves.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'the configuration'} must be a mapping of fields.")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    given: dict[str, Any] = {}
    found: list[str] = []
    for name, value in values.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in names:
            meant = _field_meant(cls, str(name))
            found.append(f"{path} is not a field of the configuration; {meant}")
            continue
        if dataclasses.is_dataclass(hints[name]):
            try:
                value = from_dict(hints[name], value, where=path)
            except ValueError as error:
                found.append(str(error).rstrip("."))
                continue  # the section's defaults stand in, to check the rest too
        given[name] = tuple(value) if isinstance(value, list) else value
    try:
        made = cls(**given)
    except ValueError as error:
        found.append(str(error).rstrip("."))
    else:
        if not found:
            return made
    raise ValueError("; ".join(found) + ".")


def overlay(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict `base`, updated by `values` section by section."""
    both = {
        name: overlay(base[name], value)
        for name, value in values.items()
        if isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
    }
    return {**base, **values, **both}


def differences(one: Any, other: Any, *, ignore: tuple[str, ...] = ()) -> list[str]:
    """Lines naming the fields in which two configs differ, with both values.

    `ignore` holds dotted names, or names of whole sections, that are not compared.
    """

    def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if prefix + name in ignore:
                continue
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    ours, theirs = dict(flat(to_dict(one))), dict(flat(to_dict(other)))
    return [
        f"{name}: {ours.get(name)!r} and {theirs.get(name)!r}"
        for name in sorted(ours | theirs)
        if ours.get(name) != theirs.get(name)
    ]


def _field_meant(cls: type, name: str) -> str:
    """The field that an unknown name means: by TRL's name, or the nearest."""
    if name in TRL_NAMES:
        return f"TRL's {name} is {TRL_NAMES[name]!r} here ({TRL_PAGE})"
    paths = _paths(cls)
    near = difflib.get_close_matches(name, paths, n=1)
    if near:
        return f"did you mean {paths[near[0]]!r}?"
    return f"fields: {', '.join(f.name for f in dataclasses.fields(cls))}"


def _paths(cls: type) -> dict[str, str]:
    """The dotted path of every field, also those of inner sections, by its name."""
    hints = typing.get_type_hints(cls)
    own = {f.name: f.name for f in dataclasses.fields(cls)}
    within = {
        name: f"{section}.{path}"
        for section in own
        if dataclasses.is_dataclass(hints[section])
        for name, path in _paths(hints[section]).items()
    }
    return within | own


def _broken_rule(hint: Any, value: Any) -> str | None:
    """What `value` must be by its type hint, in words; None if it is that."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # `X | None`, the only kind we use
        words = None if value is None else _broken_rule(arguments[0], value)
        return words and f"{words} or None"
    if origin is Literal:
        choices = ", ".join(map(repr, arguments))
        return None if value in arguments else f"be one of {choices}"
    if origin is Annotated:
        (rule,) = hint.__metadata__
        return None if rule.holds(value) else rule.words
    if origin is tuple:  # `tuple[X, ...]`
        if not isinstance(value, tuple):
            return "be a tuple (a list in YAML)"
        broken = filter(None, (_broken_rule(arguments[0], item) for item in value))
        words = next(broken, None)
        return words and f"be a tuple, and each item must {words}"
    return None if isinstance(value, hint) else f"be a {hint.__name__}"
