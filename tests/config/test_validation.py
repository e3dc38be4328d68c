"""Sections check their fields; dicts and YAML say the same as the dataclasses."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.config.validation import (
    AboveOne,
    AxisSize,
    Count,
    Decay,
    Finite,
    NotNegative,
    Positive,
    Section,
    Seed,
    Share,
    Size,
    Text,
    differences,
    from_dict,
    overlay,
    to_dict,
)


@dataclass(frozen=True, kw_only=True)
class Inner(Section):
    section: ClassVar[str] = "inner"
    rate: Positive = 0.5
    sizes: tuple[Size, ...] | None = None
    kinds: tuple[Literal["a", "b"], ...] = ("a",)

    def problems(self):
        if self.sizes == ():
            yield "sizes must not be empty"
        if self.rate > 100:
            yield f"rate {self.rate} is too high"


@dataclass(frozen=True, kw_only=True)
class Outer(Section):
    name: Text = "run"
    count: Count = 3
    on: bool = False
    file: str | None = None
    mode: Literal["fast", "exact"] = "fast"
    inner: Inner = field(default_factory=Inner)


RULES = {
    "Text": (Text, ["a", " "], ["", 3, None]),
    "Finite": (Finite, [-2.5, 0, 7], [math.nan, math.inf, -math.inf, True, "1"]),
    "Positive": (Positive, [1e-30, 2], [0, 0.0, -1, math.nan, math.inf, True, None]),
    "NotNegative": (NotNegative, [0, 0.0, 3.5], [-1e-9, math.nan, math.inf, False]),
    "AboveOne": (AboveOne, [1.0001, 3], [1, 1.0, 0, math.nan, math.inf, True]),
    "Share": (Share, [1e-6, 1, 1.0], [0, 0.0, 1.0001, -0.1, math.nan, True]),
    "Decay": (Decay, [0, 0.0, 0.999], [1, 1.0, -0.1, math.nan, False]),
    "Count": (Count, [1, 10**9], [0, -1, 1.0, "1", True, None]),
    "Size": (Size, [0, 5], [-1, 0.0, "0", False]),
    "Seed": (Seed, [0, 2**32 - 1], [-1, 2**32, 1.5, True]),
    "AxisSize": (AxisSize, [-1, 1, 64], [0, -2, 1.0, True]),
    "optional": (Count | None, [None, 1], [0, "none"]),
    "choice": (Literal["x", "y"], ["x", "y"], ["z", None, 0]),
    "bool": (bool, [True, False], [1, 0, "true", None]),
    "optional text": (str | None, [None, "", "a"], [1, True]),
    "tuple": (tuple[Size, ...], [(), (0, 4)], [[1], (-1,), 3, ("1",), None]),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_takes_what_fits_and_refuses_the_rest(name):
    hint, right, wrong = RULES[name]
    namespace = {"__annotations__": {"value": hint}}
    one = dataclass(frozen=True, kw_only=True)(type("One", (Section,), namespace))
    for value in right:
        assert one(value=value).value is value
    for value in wrong:
        with pytest.raises(ValueError, match="^value must ") as caught:
            one(value=value)
        assert str(caught.value).endswith(f"got {value!r}.")


def test_every_broken_field_is_told_at_once():
    with pytest.raises(ValueError) as caught:
        Outer(count=0, on=1, mode="slow")
    assert str(caught.value) == (
        "count must be an integer from 1 on, got 0; on must be a bool, got 1; "
        "mode must be one of 'fast', 'exact', got 'slow'."
    )


def test_what_holds_between_fields_is_asked_of_right_fields_only():
    with pytest.raises(ValueError) as caught:
        Inner(rate="high", sizes=())  # comparing "high" with 100 would be a TypeError
    assert str(caught.value) == "inner.rate must be a positive number, got 'high'."
    with pytest.raises(ValueError) as caught:
        Inner(rate=101, sizes=())
    assert str(caught.value) == (
        "inner.sizes must not be empty; inner.rate 101 is too high."
    )


def test_items_of_a_tuple_are_checked():
    message = (
        r"inner\.kinds must be a tuple, and each item must be one of 'a', 'b', got"
    )
    with pytest.raises(ValueError, match=message):
        Inner(kinds=("a", "c"))
    with pytest.raises(ValueError, match=r"inner\.sizes must .* from 0 on or None"):
        Inner(sizes=(3, -3))


def test_a_section_of_another_class_is_refused():
    with pytest.raises(ValueError, match="inner must be a Inner, got {'rate': 1}"):
        Outer(inner={"rate": 1})


SECTIONS = st.builds(
    Outer,
    name=st.text(min_size=1, max_size=8),
    count=st.integers(1, 10**12),
    on=st.booleans(),
    file=st.none() | st.text(max_size=8),
    mode=st.sampled_from(["fast", "exact"]),
    inner=st.builds(
        Inner,
        rate=st.floats(0, 100, exclude_min=True) | st.integers(1, 100),
        sizes=st.none() | st.lists(st.integers(0, 9), min_size=1).map(tuple),
        kinds=st.lists(st.sampled_from("ab")).map(tuple),
    ),
)


@given(SECTIONS)
def test_a_dict_and_yaml_give_the_same_section_back(config):
    values = to_dict(config)
    assert from_dict(Outer, values) == config
    text = yaml.safe_dump(values, sort_keys=False)
    assert from_dict(Outer, yaml.safe_load(text)) == config


def test_a_dict_is_plain():
    values = to_dict(Outer(inner=Inner(sizes=(1, 2))))
    assert values == {
        "name": "run",
        "count": 3,
        "on": False,
        "file": None,
        "mode": "fast",
        "inner": {"rate": 0.5, "sizes": [1, 2], "kinds": ["a"]},
    }


def test_fields_left_out_keep_their_defaults():
    assert from_dict(Outer, {"inner": {"rate": 2}}) == Outer(inner=Inner(rate=2))
    assert from_dict(Outer, {}) == Outer()


def test_an_unknown_key_names_the_nearest_field():
    with pytest.raises(ValueError, match="^coutn is not a field .* mean 'count'"):
        from_dict(Outer, {"coutn": 3})
    with pytest.raises(ValueError, match=r"^inner\.size is not .* mean 'sizes'"):
        from_dict(Outer, {"inner": {"size": [1]}})


def test_an_unknown_key_that_is_near_none_names_them_all():
    with pytest.raises(ValueError, match="zzz is not .* fields: name, count, on, file"):
        from_dict(Outer, {"zzz": 3})
    with pytest.raises(ValueError, match="^7 is not a field"):
        from_dict(Outer, {7: 3})


@pytest.mark.parametrize("values", [None, 3, "fast", [1]])
def test_a_section_that_is_no_mapping_is_named(values):
    with pytest.raises(ValueError, match="^inner must be a mapping of fields"):
        from_dict(Outer, {"inner": values})
    with pytest.raises(ValueError, match="^the configuration must be a mapping"):
        from_dict(Outer, values)


def test_wrong_values_in_a_dict_are_refused_by_the_section():
    with pytest.raises(ValueError, match=r"^inner\.rate must .* got 'fast'"):
        from_dict(Outer, {"inner": {"rate": "fast"}})


def test_differences_name_fields_with_both_values():
    one = Outer(count=1, inner=Inner(rate=2.0, sizes=(1,)))
    other = Outer(count=4, inner=Inner(rate=2, sizes=(1, 2)))
    assert differences(one, other) == [
        "count: 1 and 4",
        "inner.sizes: [1] and [1, 2]",
    ]
    assert differences(one, one) == []
    # A section that stands for itself is compared by its fields.
    assert differences(one, replace(one, inner=Inner(sizes=(1,)))) == [
        "inner.rate: 2.0 and 0.5"
    ]


def test_ignored_fields_and_sections_are_not_compared():
    one = Outer(count=1, inner=Inner(rate=2.0, sizes=(1,)))
    other = Outer(count=4, inner=Inner(rate=3.0, sizes=(1, 2)))
    assert differences(one, other, ignore=("inner", "count")) == []
    assert differences(one, other, ignore=("inner.rate", "count")) == [
        "inner.sizes: [1] and [1, 2]"
    ]
    # A name is that of a whole path, not of any field called so.
    assert len(differences(one, other, ignore=("rate", "sizes"))) == 3


def test_an_overlay_replaces_leaves_and_keeps_the_rest():
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3, "f": 4}}, "g": [1, 2]}
    over = {"b": {"d": {"e": 5}, "new": 6}, "g": [9]}
    assert overlay(base, over) == {
        "a": 1,
        "b": {"c": 2, "d": {"e": 5, "f": 4}, "new": 6},
        "g": [9],
    }
    assert base["b"] == {"c": 2, "d": {"e": 3, "f": 4}}
    # What is no mapping on one side replaces what is one on the other.
    assert overlay({"a": {"b": 1}}, {"a": 2}) == {"a": 2}
    assert overlay({"a": 2}, {"a": {"b": 1}}) == {"a": {"b": 1}}
