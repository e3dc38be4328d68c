import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.reporting.text import duration_text, escape_control_chars, prompt_text


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


def test_chat_prompt_names_the_role_of_each_message():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
    ]
    assert prompt_text(turns) == "system: Be brief.\nuser: 2+2?"
    assert prompt_text("2+2?") == "2+2?"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0s"), (59.9, "59s"), (60, "1m00s"), (3599, "59m59s"), (7500, "2h05m")]
    + [(86400 + 3 * 3600, "1d03h")],
)
def test_durations_keep_their_two_largest_units(seconds, shown):
    assert duration_text(seconds) == shown
