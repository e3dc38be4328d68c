"""What makes another reward of it is told by its name; what does not is silent."""

import functools
import hashlib
import inspect
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rewards.source import changed_rewards, describe_rewards

FACTOR = 2.0


def scaled(completions, scale=1.0, *, words=(), **_):
    return [scale * len(text) for text in completions]


def by_module(completions, **_):
    return [FACTOR * helped(text) for text in completions]


def helped(text):
    return len(text)


class Judge:
    def __init__(self, limit):
        self.limit = limit

    def __call__(self, completions, **_):
        return [min(len(text), self.limit) for text in completions]

    def score(self, completions, **_):
        return self(completions)


def with_closure(limit):
    def closure(completions, **_):
        return [min(len(text), limit) for text in completions]

    return closure


def with_default(limit):
    def default(completions, limit=limit, **_):
        return [min(len(text), limit) for text in completions]

    return default


def wrapped(limit):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(completions, **keywords):
            return function([text[:limit] for text in completions], **keywords)

        return wrapper

    return decorate(scaled)


MAKERS = {
    "keyword": lambda value: functools.partial(scaled, scale=value),
    "position": lambda value: functools.partial(scaled, ["a"], value),
    "other": lambda value: functools.partial(scaled, anything=value),
    "twice": lambda value: functools.partial(functools.partial(scaled, value), words=1),
    "object": Judge,
    "method": lambda value: Judge(value).score,
    "closure": with_closure,
    "default": with_default,
    "wrapper": wrapped,
}
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.frozensets(st.integers(), max_size=3)
    ),
    max_leaves=5,
)


def told(old, new):
    before = json.loads(json.dumps(describe_rewards([old])))
    return changed_rewards([new], before)


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@settings(max_examples=15)
@given(old=plain, new=plain)
def test_another_value_is_told_by_its_name_and_the_same_one_is_not(make, old, new):
    assert told(make(old), make(old)) == []
    same = repr(old) == repr(new) or (old == new and isinstance(old, frozenset))
    assert bool(told(make(old), make(new))) == (not same)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        ("keyword", "scaled (scale: 0.5 then, 2 now)"),
        ("position", "scaled (scale: 0.5 then, 2 now)"),
        ("other", "scaled (anything: 0.5 then, 2 now)"),
        ("object", "Judge (limit: 0.5 then, 2 now)"),
        ("method", "score (limit: 0.5 then, 2 now)"),
        ("closure", "closure (limit: 0.5 then, 2 now)"),
        ("default", "default (limit: 0.5 then, 2 now)"),
        ("wrapper", "scaled (limit: 0.5 then, 2 now)"),
    ],
)
def test_what_differs_is_named_with_its_values(make, name):
    (text,) = told(MAKERS[make](0.5), MAKERS[make](2))
    assert text == f"other reward functions than before: {name}"


def test_texts_are_compared_and_never_written_down():
    old, new = (functools.partial(scaled, words=f"sk-{n}") for n in "12")
    assert "sk-" not in json.dumps(describe_rewards([old]))
    assert told(old, new) == ["other reward functions than before: scaled (words)"]


def test_constants_and_helpers_of_its_module_are_part_of_a_function(monkeypatch):
    before = describe_rewards([by_module])
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    (text,) = changed_rewards([by_module], before)
    assert text.endswith("by_module (FACTOR: 2.0 then, 3.0 now)")
    monkeypatch.undo()
    monkeypatch.setattr(helped, "__code__", (lambda text: len(text) + 1).__code__)
    (text,) = changed_rewards([by_module], before)
    assert text.endswith("by_module (helped().code)")


def test_other_code_other_names_and_other_numbers_of_functions_are_told(monkeypatch):
    before = describe_rewards([scaled, by_module])
    assert changed_rewards([scaled, by_module], before) == []
    (text,) = changed_rewards([scaled, Judge(1)], before)
    assert text.endswith(": by_module, Judge")
    getsource = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda thing: getsource(thing) + "#")
    (text,) = changed_rewards([scaled], {"scaled": before["scaled"]})
    assert text.endswith("before: scaled")


def test_a_digest_of_the_code_alone_is_compared_with_the_code_alone():
    digest = hashlib.sha256(inspect.getsource(scaled).encode()).hexdigest()
    partial = functools.partial(scaled, scale=3)
    for before in (digest, None):
        assert changed_rewards([partial], {"scaled": before}) == []
    assert changed_rewards([partial], {"scaled": "0"}) != []


def test_functions_without_source_and_that_call_each_other_do_no_harm():
    typed = {"__name__": "typed"}
    exec("def lost(**_): return found()\ndef found(): return lost()", typed)
    functions = [typed["lost"], len, max]
    assert describe_rewards(functions) == {"lost": {}, "len": {}, "max": {}}
