"""Text to token ids and back, with the model's chat template and stop tokens.

A thin wrapper over a `transformers` fast tokenizer, which is imported on first use.
"""

import copy
import datetime
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.models.config import ModelConfig
from grpo_jax.weights._template_date import with_date

Message = Mapping[str, Any]

# The text-only Gemma 3 models contain the image placeholder of the multimodal ones, one
# id past the embedding. No text is encoded to it.
_PLACEHOLDERS = ("<image_soft_token>",)


class Tokenizer:
    """The tokenizer of one model.

    Attributes:
        stop_ids: ids that end a completion, at least one for a model that can stop.
        pad_id: the id that fills unused positions; masks never depend on it.
        vocab_size: one more than the largest id that text can encode to.
        has_chat_template: whether message lists can be encoded.
    """

    def __init__(self, fast: Any, *, stop_ids: Iterable[int | None] = ()):
        """Wraps a PreTrainedTokenizerFast; its own end of sequence also stops."""
        self._fast = fast
        stops = dict.fromkeys([*stop_ids, fast.eos_token_id])
        self.stop_ids: tuple[int, ...] = tuple(i for i in stops if i is not None)
        vocabulary = fast.get_vocab()
        self.vocab_size: int = 1 + max(
            index for token, index in vocabulary.items() if token not in _PLACEHOLDERS
        )
        pads = (fast.pad_token_id, fast.eos_token_id, *self.stop_ids, 0)
        self.pad_id: int = next(index for index in pads if index is not None)
        self.has_chat_template: bool = bool(fast.chat_template)
        self._moment: datetime.datetime | None = None

    @classmethod
    def from_folder(cls, folder: pathlib.Path, config: ModelConfig) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder.

        A completion stops at the end tokens of generation_config.json, of the model's
        configuration and of the tokenizer itself.

        Raises:
            ValueError: no tokenizer.json, or a damaged one.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json. If it has another tokenizer format, "
                "convert it once with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        fast_class = import_fast_tokenizer()
        try:
            fast = fast_class.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as error:
            # The Rust parser raises bare Exception; this only adds the file's name.
            raise ValueError(f"cannot read the tokenizer {path}: {error}") from error
        stops = [*_generation_stops(folder), *config.eos_token_ids]
        return cls(fast, stop_ids=stops)

    def dated(self, moment: datetime.datetime) -> "Tokenizer":
        """A tokenizer whose chat template always sees this date and time.

        Some templates write the current date, so prompts would differ from day to day.
        """
        if not self.has_chat_template:
            return self
        copied = copy.copy(self)
        copied._moment = moment
        return copied

    @property
    def name(self) -> str:
        """Where the tokenizer is from, for messages; "the model" if nothing says so."""
        return self._fast.name_or_path or "the model"

    @property
    def response_template(self) -> dict[str, Any] | None:
        """How transformers reads an answer back, where the tokenizer says so."""
        return self._fast.response_template

    def chat_template(self, *, with_tools: bool = False) -> str:
        """The text of the chat template, with the date of `dated`.

        Some tokenizers have a template of its own for conversations with tools.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        tools = [{}] if with_tools else None
        template = self._fast.get_chat_template(tools=tools)
        return with_date(template, self._moment) if self._moment else template

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """The token ids of a prompt, which a completion continues.

        A string gets the special tokens that the tokenizer adds before a text, but not
        those that it adds at the end. A list of messages goes through the chat
        template. If the last message is the assistant's, the completion continues it.
        Otherwise the template opens the assistant's turn.

        If a text contains a special token, it becomes that token, as in transformers
        and TRL.

        Raises:
            ValueError: the text has characters without tokens, the messages have no
                chat template or are malformed, or the template refuses them.
        """
        if isinstance(prompt, str):
            return self.encode_prompts([prompt])[0]
        return self.encode_messages(prompt)

    def encode_prompts(
        self, prompts: Sequence[str | Sequence[Message]]
    ) -> list[list[int]]:
        """The token ids of each prompt, as `encode_prompt`; strings in one call."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts):
            return [self.encode_prompt(prompt) for prompt in prompts]
        if not texts:
            return []
        for text in texts:
            self._check_text(text)
        encoded = self._fast(texts)["input_ids"]
        return [ids[: len(ids) - self._appended] for ids in encoded]

    @functools.cached_property
    def _appended(self) -> int:
        """How many tokens the tokenizer adds at the end of a text."""
        added = self._fast("aA 0.", return_special_tokens_mask=True)
        mask = added["special_tokens_mask"]
        behind = (
            len(mask) - 1 - max((i for i, m in enumerate(mask) if not m), default=0)
        )
        return behind if 0 in mask else 0

    def _check_text(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} is {text[error.start]!a}, half of a "
                "surrogate pair; was the text cut, or read with another encoding?"
            ) from error
        if not self._writes_all and (lost := self._lost(text)):
            raise ValueError(
                f"the tokenizer has no token for {lost!a} and would drop it; replace "
                "these characters, or add tokens to tokenizer and model"
            )

    def _lost(self, text: str) -> str:
        """The characters of a text, other than spaces, that have no token.

        Tokenizers of published models have a token for each byte and lose nothing.
        """
        backend = self._fast.backend_tokenizer
        normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
        ids = backend.encode(text, add_special_tokens=False).ids
        known = [index for index in ids if index != self._fast.unk_token_id]
        written = {"▁", *backend.decode(known, skip_special_tokens=False)}
        distinct = dict.fromkeys(normal)
        return "".join(c for c in distinct if c not in written and not c.isspace())

    @functools.cached_property
    def _writes_all(self) -> bool:
        """Whether all characters have tokens, by a sample of one to four bytes each."""
        longer = [*range(0x800, 0xD800, 0x400), *range(0x10000, 0x20000, 0x1000)]
        return not self._lost("".join(map(chr, [*range(0x800), *longer])))

    def is_templated(self, text: str) -> bool:
        """Whether a text contains a special token that the chat template would add."""
        return any(mark in text for mark in self._marks)

    @functools.cached_property
    def _marks(self) -> list[str]:
        """The special tokens around a message, without the one that begins any text."""
        message = {"role": "user", "content": "-"}
        try:
            rendered = self.render([message], opens=True)
        except ValueError:
            return []  # the template refuses such a message
        special = self.special_tokens.values()
        return [t for t in special if t in rendered and t != self._fast.bos_token]

    def decode(self, ids: Iterable[int], *, keep: Iterable[int] = ()) -> str:
        """The text of token ids, without special tokens except those in `keep`."""
        left_out = self.special_tokens.keys() - set(keep)
        return self._fast.decode(
            [i for i in map(int, ids) if i not in left_out], skip_special_tokens=False
        )

    @functools.cached_property
    def special_tokens(self) -> dict[int, str]:
        """The special tokens, which no text has: id -> how it is written."""
        added = self._fast.added_tokens_decoder.items()
        return {index: token.content for index, token in added if token.special}

    def render(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        opens: bool = False,
    ) -> str:
        """The text that the chat template makes of messages.

        Args:
            messages: of a conversation, at least one.
            template: a chat template instead of the tokenizer's.
            tools: JSON schemas of the tools that the policy may call.
            opens: whether the text ends with the beginning of the assistant's turn.

        Raises:
            ValueError: the template refuses the messages.
        """
        options = {"template": template, "tools": tools, "opens": opens}
        return self._apply_template(messages, tokenize=False, **options)

    def encode_rendered(self, text: str) -> list[int]:
        """The token ids of a rendered text; a special token in it becomes that token.

        No special token is added, for the chat template writes its own.
        """
        return self._fast(text, add_special_tokens=False)["input_ids"]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer and its chat template in Hugging Face format."""
        folder = pathlib.Path(folder)
        self._fast.save_pretrained(str(folder))
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        # transformers 5 writes a class name that 4 does not know; both know this one.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def encode_messages(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """The token ids of messages, as `encode_prompt`; arguments as in `render`."""
        if not self.has_chat_template:
            raise ValueError(
                "prompt is a list of messages, but the tokenizer has no chat template; "
                "give prompts as strings, or an instruction-tuned model (--model)"
            )
        self.check_messages(messages)
        continued = messages[-1]["role"] == "assistant"
        options = {"template": template, "tools": tools, "opens": not continued}
        return self._apply_template(
            messages, tokenize=True, continues=continued, **options
        )

    def check_messages(self, messages: Sequence[Message]) -> None:
        """Checks that messages have a role and a content that can be written.

        Raises:
            ValueError: there are none, or one has no role or content, or its text has
                characters without tokens.
        """
        if not messages:
            raise ValueError("prompt is an empty list of messages; add one")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(
                message
            ):
                raise ValueError(
                    "every message of a prompt must be a dict with role and content, "
                    f"got {message!r}"
                )
            if isinstance(message["content"], str):
                self._check_text(message["content"])

    def _apply_template(
        self,
        messages: Sequence[Message],
        *,
        tokenize: bool,
        template: str | None,
        tools: Sequence[Mapping[str, Any]],
        opens: bool,
        continues: bool = False,
    ) -> Any:
        try:
            return self._fast.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=tokenize,
                tools=[dict(tool) for tool in tools] or None,
                chat_template=template or self.chat_template(with_tools=bool(tools)),
                add_generation_prompt=opens,
                continue_final_message=continues,
                return_dict=False,
            )
        except Exception as error:
            # A template is a program of the model's author: it may raise anything.
            said = " ".join(str(error).split())
            raise ValueError(
                f"the chat template refuses the messages: {said} "
                f"({type(error).__name__})"
            ) from error


def import_fast_tokenizer() -> Any:
    """The class PreTrainedTokenizerFast, with the log of transformers at errors."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def import_response_parser() -> Any:
    """The class ResponseParser, which reads an assistant's message out of a text."""
    from transformers.utils.chat_parsing import ResponseParser

    return ResponseParser


def _generation_stops(folder: pathlib.Path) -> list[int]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        stops = json.loads(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    if stops is None:
        return []
    stops = stops if isinstance(stops, list) else [stops]
    if not all(isinstance(index, int) for index in stops):
        raise ValueError(f"eos_token_id in {path} must be ids, got {stops}")
    return stops
