"""Model text made safe to show: nothing in it can move a cursor or hide a letter.

The output of a model is not trusted. It may hold terminal escapes, bidirectional
overrides and half surrogates. All of it passes `escape_control_chars` before it is
shown. Conversations become text here, for all who show them.
"""

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# A prompt or a completion: a text, or chat messages with "role" and "content".
Messages = str | Sequence[Mapping[str, Any]]
Kind = Literal["thought", "text", "call", "problem"]

# What stands between the role and the text of a piece.
_VERBS: Mapping[Kind, str] = {
    "thought": " thinks",
    "text": "",
    "call": " calls",
    "problem": " wrote a call that cannot be read",
}

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


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a message.

    Attributes:
      role: who wrote the message: "assistant", "user", or "tool" with its name.
      kind: "thought" for what the policy wrote before its answer, "call" for a call of
        a tool, "problem" for the reason why a call cannot be read; all else is "text".
      drawn: whether the message is the policy's. In a completion, all else was given
        to it, and masked.
    """

    role: str
    kind: Kind
    text: str
    drawn: bool


def parts_of(messages: Sequence[Mapping[str, Any]]) -> list[list[Part]]:
    """The pieces of each message, in the order in which a model writes them.

    A message has at least one piece. Control characters are escaped.
    """
    return [list(_parts(message)) for message in messages]


def _parts(message: Mapping[str, Any]) -> Iterator[Part]:
    role, name = str(message["role"]), message.get("name")
    drawn = role == "assistant"
    calls = message.get("tool_calls") or ()
    content = _content_text(message.get("content"))
    pieces: list[tuple[Kind, str]] = []
    if thought := message.get("reasoning_content"):
        pieces.append(("thought", str(thought)))
    if content or not (calls or pieces):
        pieces.append(("text", content))
    for call in calls:
        pieces.append(("call", _call_text(call)))
    if problem := message.get("malformed"):
        pieces.append(("problem", str(problem)))
    label = escape_control_chars(role if name is None else f"{role} {name}")
    for kind, text in pieces:
        yield Part(role=label, kind=kind, text=escape_control_chars(text), drawn=drawn)


def _content_text(content: Any) -> str:
    """The text of a message; of content blocks, the text of each and the others' type.

    Images and the like have no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(
        str(block.get("text", f"[{block.get('type', 'no text')}]")) for block in content
    )


def _call_text(call: Mapping[str, Any]) -> str:
    """A call as `name(key=value, ...)`; arguments that are no object as they are."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, Mapping):
        arguments = ", ".join(f"{k}={_value_text(v)}" for k, v in arguments.items())
    elif not isinstance(arguments, str):
        arguments = _value_text(arguments)
    return f"{function.get('name', '?')}({arguments})"


def _value_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def readable_text(messages: Messages) -> str:
    """A prompt or a completion as one text, control characters escaped.

    Each message has its role before it, and a tool's result the name of the tool. A
    call is a line such as `assistant calls: search(query="weather")`.
    """
    if isinstance(messages, str):
        return escape_control_chars(messages)
    return "\n".join(
        f"{part.role}{_VERBS[part.kind]}: {part.text}"
        for message in parts_of(messages)
        for part in message
    )


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
