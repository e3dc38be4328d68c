import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.reporting.text import (
    duration_text,
    escape_control_chars,
    parts_of,
    readable_text,
)


@given(st.text(st.characters(codec=None)))
def test_visible_text_holds_no_control_format_or_surrogate_character(text):
    kept = "\n\t\u200c\u200d"
    for char in escape_control_chars(text):
        assert (
            char in kept
            or unicodedata.category(char)[0] != "C"
            or (unicodedata.category(char) in ("Cn", "Co"))
        )
    escape_control_chars(text).encode("utf-8")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\u202e000,1", "\\u202e000,1"),
        ("a\x00b\rc\r\nd", "a\\x00b\\x0dc\nd"),
        ("\ud83d", "\\ud83d"),
        ("\U000e0041", "\\U000e0041"),
        ("two\nlines\t[bold] </script> é 漢", "two\nlines\t[bold] </script> é 漢"),
    ],
)
def test_visible_text_writes_out_what_could_act_and_keeps_the_rest(text, shown):
    assert escape_control_chars(text) == shown


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_chat_prompt_names_the_role_of_each_message():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
    ]
    assert readable_text(turns) == "system: Be brief.\nuser: 2+2?"
    assert readable_text("2+2?\x1b") == "2+2?\\x1b"


def test_a_conversation_is_readable_with_its_calls_and_results():
    search = call("search", {"query": "a\nb", "k": 3, "deep": None})
    turns = [
        {"role": "assistant", "content": "Let me see.", "tool_calls": [search]},
        {"role": "tool", "name": "search", "content": "\x1b[31mred"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Red."},
    ]
    assert readable_text(turns).split("\n") == [
        "assistant: Let me see.",
        'assistant calls: search(query="a\\nb", k=3, deep=null)',
        "tool search: \\x1b[31mred",
        "user: And?",
        "assistant: Red.",
    ]
    # What the policy did not draw is known for each piece.
    drawn = [[part.drawn for part in parts] for parts in parts_of(turns)]
    assert drawn == [[True, True], [False], [False], [True]]


def test_thoughts_come_before_and_unreadable_calls_after_the_text():
    turn = {"role": "assistant", "content": "<call", "reasoning_content": "Hm."}
    turn |= {"malformed": "it was cut"}
    assert readable_text([turn]).split("\n") == [
        "assistant thinks: Hm.",
        "assistant: <call",
        "assistant wrote a call that cannot be read: it was cut",
    ]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"content": "", "tool_calls": [call("f", {})]}, "assistant calls: f()"),
        ({"content": None, "tool_calls": [call("f", "x\0")]}, "calls: f(x\\x00)"),
        ({"content": None, "tool_calls": [call("f", [1, "a"])]}, 'f([1, "a"])'),
        ({"tool_calls": [{"name": "f", "arguments": {"a": 1}}]}, "f(a=1)"),
        (
            {"content": [{"type": "text", "text": "hi"}, {"type": "image"}]},
            "hi\n[image]",
        ),
        ({"content": ""}, "assistant: "),
        ({}, "assistant: "),
    ],
)
def test_whatever_stands_in_a_message_is_shown(message, shown):
    assert readable_text([{"role": "assistant", **message}]).endswith(shown)


TEXT = st.text(st.characters(codec=None), max_size=9)
VALUES = st.recursive(
    st.none() | st.integers() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2)
    ),
    max_leaves=4,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": TEXT, "content": st.none() | TEXT},
        optional={
            "name": TEXT,
            "reasoning_content": TEXT,
            "malformed": TEXT,
            "tool_calls": st.lists(st.builds(call, TEXT, VALUES), max_size=2),
        },
    ),
    max_size=3,
)


@given(MESSAGES)
def test_no_conversation_brings_a_character_that_acts(messages):
    text = readable_text(messages)
    assert escape_control_chars(text) == text
    assert all(parts_of(messages))  # every message has a piece that says who speaks


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0s"), (59.9, "59s"), (60, "1m00s"), (3599, "59m59s"), (7500, "2h05m")]
    + [(86400 + 3 * 3600, "1d03h")],
)
def test_durations_keep_their_two_largest_units(seconds, shown):
    assert duration_text(seconds) == shown
