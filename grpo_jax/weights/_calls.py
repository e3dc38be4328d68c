"""Reads the calls of tools out of a turn of the policy.

How a model writes calls is found by rendering one: the format that reads it back is the
model's. transformers does the reading (`transformers.utils.chat_parsing`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.weights._turns import Turns
from grpo_jax.weights.tokenizer import Tokenizer, import_response_parser

# Where most families open a call. One that no format can open was not written right.
_TAG = "<tool_call>"
_NAMED = {"name": "{name}", "arguments": "{content}"}
_PARAMETER = r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
# How families of models write a call, as fields of a response template.
_KNOWN: tuple[dict[str, Any], ...] = (
    # Qwen2.5, Qwen3: {"name": ..., "arguments": {...}} in a tag.
    {
        "open": _TAG,
        "close_pattern": r"</tool_call>\s*",
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    },
    # Qwen3.5, 3.6, 3.8: a tag for the function, and one for each parameter. Only the
    # schema of the tool says whether a value is a number or a text.
    {
        "open_pattern": _TAG + r"\s*<function=(?P<name>[^>\n]+)>",
        "close_pattern": r"</function>\s*</tool_call>\s*",
        "content": "xml-inline",
        "content_args": {"tag_pattern": _PARAMETER},
        "transform": {"type": "function", "function": _NAMED},
    },
    # Llama 3.1, 3.2: {"name": ..., "parameters": {...}} is the whole turn.
    {
        "open_pattern": r"^\s*(?:<\|python_tag\|>\s*)?\{\s*"
        r'(?:"type":\s*"function",\s*)?"name":\s*"(?P<name>[^"\\]+)",\s*'
        r'"parameters":\s*',
        "close_pattern": r"\}\s*(?:ENDS)",
        "content": "json",
        "transform": {"type": "function", "function": _NAMED},
    },
)


class Reader:
    """Reads the message out of a turn of the policy that may call tools."""

    def __init__(
        self, tokenizer: Tokenizer, turns: Turns, tools: Sequence[Mapping[str, Any]]
    ):
        """Finds the format of calls: the tokenizer's own, or a known one.

        Raises:
            ValueError: no format reads back the call that the template writes.
        """
        self._tokenizer, self._tools = tokenizer, [dict(tool) for tool in tools]
        self._parser = import_response_parser()
        self._opening = turns.opening()
        stops = (tokenizer.decode([i], keep=[i]) for i in tokenizer.stop_ids)
        self._ends = [end for end in stops if end]
        text, call = turns.example()
        end = next((end for end in self._ends if text.endswith(end)), "")
        own = tokenizer.response_template
        found: dict[str, Any] = {}
        for fields in [own] if own else map(self._template, _KNOWN):
            self._format = fields
            self._keep = self._special_tokens(text)
            found = self._read(text.removesuffix(end), end)
            if found.get("tool_calls") == [call]:
                return
        reader = (
            "its response_template does not read" if own else "no known format reads"
        )
        said = f" ({found['malformed']})" if own and "malformed" in found else ""
        raise ValueError(
            f"the chat template of {tokenizer.name} writes a call of a tool as "
            f"{text!r}, and {reader} it back{said}. Describe the format as "
            "response_template in tokenizer_config.json, as transformers "
            "documents it"
        )

    def message(self, ids: list[int]) -> dict[str, Any]:
        """The message of a turn, as `Chat.message` describes it."""
        stopped = bool(ids) and ids[-1] in self._tokenizer.stop_ids
        text = self._tokenizer.decode(ids[:-1] if stopped else ids, keep=self._keep)
        if not stopped:
            return {"role": "assistant", "content": text}
        return self._read(text, self._tokenizer.decode(ids[-1:], keep=ids[-1:]))

    def _template(self, calls: Mapping[str, Any]) -> dict[str, Any]:
        """The response template of a known format."""
        ends = "|".join(map(re.escape, self._ends))
        close = calls["close_pattern"].replace("ENDS", ends)
        return {
            "defaults": {"role": "assistant"},
            # The template may have opened a thought, which the parser has to see.
            "start_anchor": self._opening.partition("<think>")[0] or "-",
            "fields": {
                "reasoning_content": {
                    "open": "<think>",
                    "close_pattern": r"</think>\s*",
                },
                "tool_calls": {**calls, "close_pattern": close, "repeats": True},
                "content": {"close_pattern": ends},
            },
        }

    def _special_tokens(self, text: str) -> list[int]:
        """The special tokens that calls are written with; the reader has to see them.

        Args:
            text: of a call.
        """
        fields = json.dumps(self._format["fields"], ensure_ascii=False)
        written = text + fields.replace("\\", "")
        special = self._tokenizer.special_tokens.items()
        return [index for index, token in special if token in written]

    def _read(self, text: str, end: str) -> dict[str, Any]:
        """The message of a text that a stop token ended."""
        try:
            parser = self._parser(self._format, prefix=self._opening, tools=self._tools)
            events = parser.feed(text + end)
            message, last = parser.finalize()
            events += last
            self._check(events, end)
            calls = [_checked(call) for call in message.pop("tool_calls", ())]
            # The parser itself keeps only the last of several pieces of text.
            closed = [e for e in events if e["type"] == "region_close"]
            pieces = [e["value"] for e in closed if e["field"] == "content"]
            if all(isinstance(piece, str) for piece in pieces):
                message["content"] = "\n".join(pieces)
            message = {key: self._cleaned(value) for key, value in message.items()}
        except Exception as error:
            # A parser meets all that a policy writes, in a format that another author
            # described: it may raise anything, such as RecursionError.
            said = f"{' '.join(str(error).split())} ({type(error).__name__})"
            return {"role": "assistant", "content": text, "malformed": said}
        message = {"role": "assistant", "content": "", **message}
        return {**message, "tool_calls": calls} if calls else message

    def _check(self, events: Sequence[Mapping[str, Any]], end: str) -> None:
        """Checks what a parser lets pass: what is not closed, opened, or no parameter.

        Raises:
            ValueError: a call is malformed.
        """
        texts = {"tool_calls": "", "content": ""}
        for event in events:
            if event["type"] == "region_chunk" and event["field"] in texts:
                texts[event["field"]] += event["text"]
        body = texts["tool_calls"]
        if end and end in body:
            raise ValueError("a call is not closed")
        written = json.dumps(self._format["fields"])
        if _TAG in written and _TAG in texts["content"]:
            raise ValueError(f"no call begins behind {_TAG}")
        if json.dumps(_PARAMETER) in written:
            beside = re.sub(_PARAMETER, "", body, flags=re.DOTALL).strip()
            if beside:
                raise ValueError(f"a call has {beside!r} beside its parameters")

    def _cleaned(self, value: Any) -> Any:
        """A text without the special tokens that the reader had to see."""
        if isinstance(value, str):
            kept = (self._tokenizer.special_tokens[index] for index in self._keep)
            for token in (*self._ends, *kept):
                value = value.replace(token, "")
        return value


def _checked(call: Any) -> dict[str, Any]:
    """A call in the form of chat templates.

    Raises:
        ValueError: it has no name, or its arguments are no object of JSON.
    """
    function = call.get("function", call)
    name, arguments = function["name"], function.get("arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a tool is {name!r}")
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name} are no object: {arguments!r}")
    # JSON of Python may have NaN and halves of surrogate pairs, which no file takes.
    json.dumps([name, arguments], allow_nan=False, ensure_ascii=False).encode()
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
