"""What a chat template writes between turns, found by rendering conversations.

A template is a program, so little can be read off its text. Conversations of known
words are rendered. What follows a turn is what one rendering has beyond another.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grpo_jax.weights.tokenizer import Message, Tokenizer

# Words that no template writes of its own accord. They have letters and digits only,
# which pass through JSON unchanged.
_ASKED, _ANSWERED, _THOUGHT, _RESULT = "kwask0", "kwans0", "kwthink0", "kwres0"
_TOOL, _KEY, _VALUE = "kwtool0", "kwkey0", "kwval0"

# What templates are known to do to earlier turns: where, and what to write instead.
_REWRITES = (
    # Qwen3, Qwen3.5, GLM 4.5: only turns after the last question keep their thought.
    (re.compile(r"loop\.index0\s*>\s*ns\.last_\w*index"), "true"),
    # Qwen3: only the last turn has a thought that is empty.
    (
        re.compile(r"loop\.last or \(not loop\.last and reasoning_content\)"),
        "reasoning_content",
    ),
)
# DeepSeek-R1, QwQ: no turn keeps its thought.
_CUTS = ((re.compile(r"""(['"])</think>\1 in content"""), "false"),)


class Turns:
    """How a chat template joins the policy's turns and the messages between them.

    Attributes:
        template: the text of the template. If the tokenizer's own rewrites earlier
            turns in a known way, a variant that leaves them as they were.
        is_variant: whether it is such a variant.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]):
        """Finds a template that is append-only for users' turns, or results of tools.

        Raises:
            ValueError: the template rewrites earlier turns, or has no place for calls.
        """
        self._tokenizer, self._tools = tokenizer, tools
        stops = {tokenizer.decode([i], keep=[i]): i for i in tokenizer.stop_ids}
        self._ends = {text: index for text, index in stops.items() if text}
        self.template: str = tokenizer.chat_template(with_tools=bool(tools))
        if tools and not self._keeps_calls():
            raise ValueError(
                f"the chat template of {tokenizer.name} has no place for calls of "
                "tools and their results; take a model that was trained to call tools, "
                "or an environment that reads the policy's text"
            )
        self._user_problem: str | None = None
        self._choose()

    def suffix(self, messages: Sequence[Message]) -> list[int]:
        """The ids from the end of an answer, that included, to where the next begins.

        Raises:
            ValueError: the template refuses the messages, or rewrites the answer.
        """
        names = [m.get("name") or _TOOL for m in messages if m["role"] == "tool"]
        tool = str(names[0]) if names else None
        if len(names) < len(messages) and self._user_problem:
            raise ValueError(self._user_problem)
        start = _start(tool)
        closed = self._closed(tool)
        text = self.render([*start, *messages], opens=True)
        if not text.startswith(closed):
            raise ValueError(self._blame(_difference(closed, text)))
        end = next((e for e in self._ends if closed.endswith(e)), "")
        return self._tokenizer.encode_rendered(end + text[len(closed) :])

    def render(self, messages: Sequence[Message], *, opens: bool = False) -> str:
        """The text of messages; `opens` adds the beginning of the policy's turn."""
        return self._tokenizer.render(
            messages, template=self.template, tools=self._tools, opens=opens
        )

    def opening(self) -> str:
        """What stands between a question and the policy's answer."""
        closed = self.render([_user()])
        opened = self.render([_user()], opens=True)
        return opened[len(os.path.commonprefix([closed, opened])) :]

    def example(self) -> tuple[str, dict[str, Any]]:
        """The text of an answer that calls a tool, up to its end, and the call."""
        opened = self.render([_user()], opens=True)
        text = self._closed(_TOOL)
        return text[len(os.path.commonprefix([opened, text])) :], _call(_TOOL)

    def _choose(self) -> None:
        """Takes the first variant that is append-only for all messages, or for tools.

        Many templates keep thoughts from a call to its result, but not from one
        question to the next. That is enough where only tools answer.
        """
        own = self.template
        calling = [_conversation(thought=t, tool=_TOOL) for t in (False, True)]
        asking = [_conversation(thought=t, tool=None) for t in (False, True)]
        found = []
        for self.template in _variants(own):
            of_users = self._problem(asking)
            of_tools = self._problem(calling) if self._tools else of_users
            found.append((of_tools, of_users, self.template))
        # min() takes the first of equals.
        best = min(found, key=lambda each: (each[0] is not None, each[1] is not None))
        of_tools, of_users, self.template = best
        if of_tools:
            raise ValueError(self._blame(found[0][0] or of_tools))
        self._user_problem = of_users and self._blame(of_users)
        self.is_variant: bool = self.template != own

    def _problem(self, conversations: Sequence[Sequence[Message]]) -> str | None:
        """What the template does to earlier turns; None if it leaves them alone."""
        opens = False
        try:
            for conversation in conversations:
                full = self.render(conversation, opens=True)
                turns = [i for i, m in enumerate(conversation) if _is_answer(m)]
                asked = [self.render(conversation[:i], opens=True) for i in turns]
                closed = [self._trim(conversation[: i + 1]) for i in turns]
                thoughts = sum(_THOUGHT in m["content"] for m in conversation)
                calls = sum("tool_calls" in m for m in conversation)
                if not calls and full.count(_THOUGHT) < thoughts:
                    return "drops what the policy thinks between <think> and </think>"
                for text in closed:
                    if not full.startswith(text):
                        return _difference(text, full)
                pairs = zip(asked, closed, strict=True)
                opens |= all(end.startswith(begin) for begin, end in pairs)
        except ValueError as error:
            return f"cannot write several turns ({error})"
        return None if opens else "opens an answer otherwise than it writes one"

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def _closed(self, tool: str | None) -> str:
        return self._trim(_start(tool))

    def _trim(self, messages: Sequence[Message]) -> str:
        """The text of messages up to the end of the last, which is an answer."""
        text = self.render(messages)
        word = _VALUE if "tool_calls" in messages[-1] else _ANSWERED
        place = text.rfind(word)
        if place < 0:
            raise ValueError("it drops a part of the answer")
        # Drawing stops at the first stop token. Without any, a call ends with the text.
        place += len(word)
        ends = [
            text.index(end, place) + len(end)
            for end in self._ends
            if end in text[place:]
        ]
        called = "tool_calls" in messages[-1]
        return text[: min(ends, default=len(text) if called else place)]

    def _keeps_calls(self) -> bool:
        """Whether all parts of a call and of its result are in the rendered text."""
        try:
            text = self.render([*_start(_TOOL), _answer_to(_TOOL)])
        except ValueError:
            return False
        return all(word in text for word in (_TOOL, _KEY, _VALUE, _RESULT))

    def _blame(self, problem: str) -> str:
        return (
            f"the chat template of {self._tokenizer.name} {problem}. Over several "
            "turns the policy would train on a text that it never reads. Put a "
            "chat_template.jinja that keeps earlier turns as they were into the "
            "tokenizer's folder"
        )


def _variants(template: str) -> Iterator[str]:
    """The template, and what known patches make of it."""
    seen = set()
    for patches in ((), _REWRITES, _CUTS):
        variant = template
        for pattern, instead in patches:
            variant = pattern.sub(instead, variant)
        if variant not in seen:
            seen.add(variant)
            yield variant


def _user() -> dict[str, Any]:
    return {"role": "user", "content": _ASKED}


def _call(tool: str) -> dict[str, Any]:
    function = {"name": tool, "arguments": {_KEY: _VALUE}}
    return {"type": "function", "function": function}


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def _answer_to(tool: str | None) -> dict[str, Any]:
    """The message that follows a turn of the policy."""
    if tool is None:
        return _user()
    return {"role": "tool", "name": tool, "content": _RESULT}


def _start(tool: str | None, *, thought: bool = False) -> list[dict[str, Any]]:
    """A question, and an answer that calls a tool if there is one."""
    begin = f"<think>\n{_THOUGHT}\n</think>\n\n" if thought else ""
    answer: dict[str, Any] = {"role": "assistant", "content": f"{begin}{_ANSWERED}"}
    if tool is not None:
        answer = {"role": "assistant", "content": begin, "tool_calls": [_call(tool)]}
    return [_user(), answer]


def _conversation(*, thought: bool, tool: str | None) -> list[dict[str, Any]]:
    """Two turns of the policy, and what follows each."""
    start = _start(tool, thought=thought)
    return [*start, _answer_to(tool), start[-1], _answer_to(tool)]


def _difference(before: str, after: str) -> str:
    """How a text was changed, for an error."""
    same = len(os.path.commonprefix([before, after]))
    was, becomes = before[same : same + 40], after[same : same + 40]
    return f"rewrites earlier turns ({was!r} becomes {becomes!r})"
