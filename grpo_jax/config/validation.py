"""Sections of a configuration: checked by rules at their fields, and plain as dicts.

A field's type carries its rule (`Positive`, `Count`, ...); `Section` applies them all
on construction and tells every problem at once: field, value and what is expected.
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
class Rule:
    """What a value must be, as a test and in words."""

    holds: Callable[[Any], bool]
    words: str


def _number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


Text = Annotated[
    str, Rule(lambda v: isinstance(v, str) and bool(v), "be a text that is not empty")
]
Finite = Annotated[float, Rule(_number, "be a finite number")]
Positive = Annotated[
    float, Rule(lambda v: _number(v) and v > 0, "be a positive number")
]
NotNegative = Annotated[
    float, Rule(lambda v: _number(v) and v >= 0, "be a number not below 0")
]
AboveOne = Annotated[float, Rule(lambda v: _number(v) and v > 1, "be a number above 1")]
Share = Annotated[float, Rule(lambda v: _number(v) and 0 < v <= 1, "lie in (0, 1]")]
Decay = Annotated[float, Rule(lambda v: _number(v) and 0 <= v < 1, "lie in [0, 1)")]
Count = Annotated[int, Rule(lambda v: _whole(v) and v >= 1, "be an integer from 1 on")]
Size = Annotated[int, Rule(lambda v: _whole(v) and v >= 0, "be an integer from 0 on")]
Seed = Annotated[
    int, Rule(lambda v: _whole(v) and 0 <= v < 2**32, "be an integer in [0, 2**32)")
]
AxisSize = Annotated[
    int,
    Rule(lambda v: _whole(v) and (v == -1 or v > 0), "be a number of devices, or -1"),
]


class Section:
    """Base of the configuration's dataclasses: checks itself when it is made.

    `section` is the prefix of its fields in messages. Subclasses say in `problems`
    what must hold between fields; it is asked only when each field is right by itself.
    """

    section: ClassVar[str] = ""

    # Before the constructor of the dataclass, which knows no better than TypeError.
    def __new__(cls, *_: Any, **fields: Any) -> Self:
        """Raise ValueError for what is no field, naming the one that is meant."""
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
        """Raise ValueError with every problem found."""
        found = list(self._field_problems()) or list(self.problems())
        if found:
            prefix = f"{self.section}." if self.section else ""
            raise ValueError("; ".join(prefix + problem for problem in found) + ".")

    def problems(self) -> Iterator[str]:
        """What is wrong between fields, one line each."""
        yield from ()

    def _field_problems(self) -> Iterator[str]:
        for name, hint in typing.get_type_hints(
            type(self), include_extras=True
        ).items():
            if typing.get_origin(hint) is not ClassVar:
                value = vars(self)[name]
                words = _broken(hint, value)
                if words:
                    yield f"{name} must {words}, got {value!r}"


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
        that are no mapping, and what the sections themselves refuse.
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
                continue  # its defaults stand in, so that the rest is checked too
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
    """The nested dict `base` with `values` over it, section by section."""
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

    def flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in values.items():
            path = prefix + name
            if path in ignore:
                continue
            nested = (
                flat(value, path + ".") if isinstance(value, dict) else {path: value}
            )
            result.update(nested)
        return result

    ours, theirs = flat(to_dict(one), ""), flat(to_dict(other), "")
    return [
        f"{name}: {ours.get(name)!r} and {theirs.get(name)!r}"
        for name in sorted(ours | theirs)
        if ours.get(name) != theirs.get(name)
    ]


def _field_meant(cls: type, name: str) -> str:
    """Which field stands for a name that is none: by TRL's name, or the nearest."""
    if name in TRL_NAMES:
        return f"TRL's {name} is {TRL_NAMES[name]!r} here ({TRL_PAGE})"
    paths = _paths(cls)
    near = difflib.get_close_matches(name, paths, n=1)
    if near:
        return f"did you mean {paths[near[0]]!r}?"
    return f"fields: {', '.join(f.name for f in dataclasses.fields(cls))}"


def _paths(cls: type) -> dict[str, str]:
    """Dotted path by name of every field, those of sections within included."""
    hints = typing.get_type_hints(cls)
    own = {f.name: f.name for f in dataclasses.fields(cls)}
    within = {
        name: f"{section}.{path}"
        for section in own
        if dataclasses.is_dataclass(hints[section])
        for name, path in _paths(hints[section]).items()
    }
    return within | own


def _broken(hint: Any, value: Any) -> str | None:
    """What `value` should have been by the rules in `hint`; None when it fits."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        inner = [option for option in options if option is not type(None)]
        words = _broken(inner[0], value)
        return f"{words} or None" if words else None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        choices = ", ".join(map(repr, arguments))
        return None if value in arguments else f"be one of {choices}"
    if origin is Annotated:
        rules = [rule for rule in hint.__metadata__ if isinstance(rule, Rule)]
        return next((rule.words for rule in rules if not rule.holds(value)), None)
    if origin is tuple:
        if not isinstance(value, tuple):
            return "be a tuple (a list in YAML)"
        words = [_broken(arguments[0], item) for item in value]
        return next((f"be a tuple, and each item must {w}" for w in words if w), None)
    if isinstance(hint, type) and not isinstance(value, hint):
        return f"be a {hint.__name__}"
    return None
