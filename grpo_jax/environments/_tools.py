"""Tools: plain functions that the policy may call, by TRL's convention.

Their schemas come from type hints and Google docstrings. What a call returns, or why
it failed, becomes a message of the role "tool".
"""

import copy
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from grpo_jax.environments.base import Message

# A function with type hints and a docstring; plain or `async def`.
Tool = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """A call that the policy wrote: the name of a tool, and its arguments."""

    name: str
    arguments: Any  # a mapping, or whatever else was written
    problem: str = ""  # why it cannot be made


def json_schema(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a function, as chat templates take it.

    Raises:
        ValueError: it has no docstring, an argument without a type hint or without a
            description, or a type that JSON does not have.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # on the lack of torch
    from transformers.utils.chat_template_utils import get_json_schema

    name = tool_name(tool)
    try:
        return get_json_schema(tool)
    except Exception as error:  # two classes that transformers does not export
        raise ValueError(
            f"tool {name!r} has no schema: {error} Give each argument a type hint, and "
            "a line under `Args:` in the docstring."
        ) from error


def tool_name(tool: Tool) -> str:
    """The name by which the policy calls a function.

    Raises:
        ValueError: it is no function or method, so it has no name and no docstring.
    """
    if not inspect.isroutine(tool):
        raise ValueError(
            f"a tool must be a function or a method, got {tool!r:.80}. Wrap it in a "
            "function with type hints and a docstring."
        )
    return tool.__name__


def by_name(tools: Iterable[Tool], *, of: str) -> dict[str, Tool]:
    """The tools by their names, in the order given.

    Args:
        of: whose tools they are, for messages.

    Raises:
        ValueError: two of them have the same name.
    """
    named: dict[str, Tool] = {}
    for tool in tools:
        name = tool_name(tool)
        if name in named:
            raise ValueError(
                f"{of} has two tools named {name!r}; the policy could not tell them "
                "apart. Rename one."
            )
        named[name] = tool
    return named


def calls_of(message: Message) -> list[Call]:
    """The calls in an assistant's message, in order; none if there are none.

    A call whose type is not "function" has a problem, which is its result.
    """
    calls = []
    for written in message.get("tool_calls") or ():
        kind = written.get("type", "function")
        if kind != "function":
            name = written.get("name", "unknown")
            calls.append(Call(name, {}, f"Unsupported tool call type: {kind}"))
            continue
        function = written["function"]
        calls.append(Call(str(function["name"]), function.get("arguments", {})))
    return calls


def result_content(value: Any) -> str | list[Any]:
    """The content of a tool's result: `str` of it, or a copy of a list, as in TRL.

    Content blocks give their texts. A list that JSON cannot hold is shown as text.

    Raises:
        ValueError: blocks of another kind, such as images, which text models lack.
    """
    if is_blocks(value):
        return blocks_text(value)
    if not isinstance(value, list):
        return str(value)
    try:
        json.dumps(value, sort_keys=True, default=str)
        # The tool may go on changing its own.
        return copy.deepcopy(value)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def error_text(message: str) -> str:
    """What the policy reads of a call that failed, as in TRL."""
    return str({"error": message})


def is_blocks(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    """Whether a value is a list of content blocks, such as texts and images."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(block, Mapping) and "type" in block for block in value)
    )


def blocks_text(blocks: Sequence[Mapping[str, Any]]) -> str:
    """The texts of content blocks, one after another.

    Raises:
        ValueError: a block is not a text.
    """
    kinds = sorted({str(block["type"]) for block in blocks} - {"text"})
    if kinds:
        raise ValueError(
            f"content of the type {', '.join(kinds)} cannot be shown to a text model; "
            'give {"type": "text", "text": ...} blocks, or a text.'
        )
    return "".join(block["text"] for block in blocks)
