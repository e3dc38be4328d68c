"""Conversations in token ids, of which those that the policy drew are never changed.

A conversation is the prompt, and then by turns an answer of the policy and a suffix:
the end of its turn, the messages that follow, and the beginning of its next turn.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.weights._calls import Reader
from grpo_jax.weights._turns import Turns
from grpo_jax.weights.tokenizer import Message, Tokenizer


class Chat:
    """The chat template of a model, over several turns.

    If a template writes a conversation by appending to it, then
    `prompt + answer + suffix + answer` are the ids that it makes of all messages. A
    template that rewrites earlier turns is replaced by a variant that does not, or
    refused. Qwen3's, for one, drops the thoughts of all turns before the last question.

    Without a chat template, prompts and messages are plain text, one after the other.

    Attributes:
        tools: JSON schemas of the tools that the policy may call.
        is_variant: whether the template had to be changed.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] = ()):
        """Checks the template and, where there are tools, that it can write calls.

        Args:
            tokenizer: of the model.
            tools: JSON schemas, as `transformers.utils.get_json_schema` makes them.

        Raises:
            ValueError: the template rewrites earlier turns; or there are tools, and it
                has no place for calls, or writes calls in an unknown way.
        """
        self.tools: tuple[Mapping[str, Any], ...] = tuple(tools)
        self._tokenizer = tokenizer
        self._turns: Turns | None = None
        self._reader: Reader | None = None
        if tokenizer.has_chat_template:
            self._turns = Turns(tokenizer, self.tools)
            if tools:
                self._reader = Reader(tokenizer, self._turns, self.tools)
        elif tools:
            raise ValueError(
                f"the tokenizer of {tokenizer.name} has no chat template, so its model "
                "cannot be told of tools; take an instruction-tuned model, or an "
                "environment that reads the policy's text"
            )
        self.is_variant: bool = self._turns is not None and self._turns.is_variant

    def prompt(self, messages: str | Sequence[Message]) -> list[int]:
        """The ids of a prompt with its tools, up to where the policy's turn begins.

        As `Tokenizer.encode_prompt`. Without a chat template, the texts of messages are
        joined by newlines.

        Raises:
            ValueError: as `Tokenizer.encode_prompt`.
        """
        if isinstance(messages, str):
            return self._tokenizer.encode_prompt(messages)
        if self._turns is None:
            return self._tokenizer.encode_prompt(self._plain_text(messages))
        return self._tokenizer.encode_messages(
            messages, template=self._turns.template, tools=self.tools
        )

    def suffix(
        self, answer_ids: Sequence[int], messages: Sequence[Message]
    ) -> list[int]:
        """The ids between an answer as it was drawn and the policy's next turn.

        They begin with the end of the turn, unless the answer ends with this very
        token. An answer that was cut, or ended by another stop token, gets it.

        Args:
            answer_ids: the policy's turn, with the token that ended it.
            messages: what it reads next: results of tools, or messages of a user.

        Raises:
            ValueError: a message is malformed, its text has characters without tokens,
                or the template refuses it.
        """
        self._tokenizer.check_messages(messages)
        if self._turns is None:
            return self._tokenizer.encode_rendered(self._plain_text(messages))
        ids = self._turns.suffix(messages)
        last = int(answer_ids[-1]) if len(answer_ids) else None
        ended = last in self._tokenizer.stop_ids and ids[:1] == [last]
        return ids[1:] if ended else ids

    def message(self, ids: Iterable[int]) -> dict[str, Any]:
        """The message that a turn of the policy is, as it was drawn.

        Without tools, its content is all that the policy wrote. With tools, calls are
        in "tool_calls" and a thought is in "reasoning_content". There are no calls in a
        turn that no stop token ended, nor in one with a call that cannot be read: the
        content is then the whole text. For a call that cannot be read, "malformed" has
        the reason.

        Returns:
            A dict with "role" and "content". The other keys exist where they apply.
        """
        ids = [int(index) for index in ids]
        if self._reader is None:
            return {"role": "assistant", "content": self._tokenizer.decode(ids)}
        return self._reader.message(ids)

    def _plain_text(self, messages: Sequence[Message]) -> str:
        self._tokenizer.check_messages(messages)
        return "\n".join(str(message["content"]) for message in messages)
