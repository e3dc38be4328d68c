"""Model text made safe to show: nothing in it can move a cursor or hide a letter.

The output of a model is not trusted. It may hold terminal escapes, bidirectional
overrides and half surrogates. All of it passes `escape_control_chars` before it is
shown.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

# A prompt is a text, or chat messages with "role" and "content".
Prompt = str | Sequence[Mapping[str, Any]]

# Control, format (bidirectional overrides), surrogate, line and paragraph separators.
_UNSAFE = frozenset(["Cc", "Cf", "Cs", "Zl", "Zp"])
# Newline and tab keep the layout; the (non-)joiners belong to many scripts and emoji.
_KEPT = frozenset("\n\t\u200c\u200d")


def escape_control_chars(text: str) -> str:
    r"""The text with every control and format character written as an escape.

    >>> escape_control_chars("\x1b[31mred")
    '\\x1b[31mred'
    """

    def escaped(char: str) -> str:
        if char in _KEPT or unicodedata.category(char) not in _UNSAFE:
            return char
        code = ord(char)
        if code < 0x100:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return "".join(map(escaped, text.replace("\r\n", "\n")))


def prompt_text(prompt: Prompt) -> str:
    """The prompt as one text; each chat message has its role before it."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def duration_text(seconds: float) -> str:
    """A duration in its two largest units, such as `45s`, `3m20s` or `2h05m`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
