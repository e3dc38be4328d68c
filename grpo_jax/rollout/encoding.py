"""Prompts as right-padded token ids, checked before anything is compiled."""

import contextlib
import hashlib
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from grpo_jax.tasks.base import line_of
from grpo_jax.weights.tokenizer import Tokenizer

_SHORTEST = 16  # tokens of the smallest bucket

_LOG = logging.getLogger(__name__)


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[Mapping]) -> list[int]:
    """The token ids of a prompt, through the chat template if the model has one.

    A plain string is then the message of a user.
    """
    return tokenizer.encode_prompt(as_messages(tokenizer, prompt))


def as_messages(
    tokenizer: Tokenizer, prompt: str | Sequence[Mapping]
) -> str | Sequence[Mapping]:
    """The prompt; with a chat template, a string becomes the message of a user."""
    if isinstance(prompt, str) and tokenizer.has_chat_template:
        return [{"role": "user", "content": prompt}]
    return prompt


def encode_rows(
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, Any]],
    *,
    limit: int,
    vocab_size: int,
    encode: Callable[[Mapping[str, Any]], list[int]] | None = None,
) -> list[list[int]]:
    """The token ids of the prompts of all rows.

    Args:
      limit: most tokens of a prompt.
      encode: gives those of a row; by default its prompt through the chat template.

    If messages contain special tokens of the chat template as text, they become these
    tokens, as in transformers and TRL, and a warning is logged.

    Raises:
      ValueError: naming the first bad row, and how many there are. A prompt is bad if
        it cannot be encoded, the chat template refuses it, it has no token, more than
        `limit` or one that the model does not know. A string to which the chat template
        was already applied is refused, too.
    """
    _check_templated_once(tokenizer, rows)
    encoded = _encode(tokenizer, rows, encode)
    problems = [
        (number, problem)
        for number, ids in enumerate(encoded)
        if (problem := prompt_problem(ids, limit=limit, vocab_size=vocab_size))
    ]
    if problems:
        number, problem = problems[0]
        raise ValueError(
            f"the prompt of {_row(rows, number)} {problem}{_also(problems)}."
        )
    quoting = [n for n, row in enumerate(rows) if _quotes(tokenizer, row["prompt"])]
    if quoting:
        _LOG.warning(
            "the prompt of %s contains special tokens of the chat template, "
            "which the model reads as such%s",
            _row(rows, quoting[0]),
            _also(quoting),
        )
    return encoded


def prompt_problem(ids: Sequence[int], *, limit: int, vocab_size: int) -> str | None:
    """What is wrong with a prompt, as the end of a sentence; None for nothing."""
    if not ids:
        return "has no token"
    if len(ids) > limit:
        return (
            f"has {len(ids)} tokens, more than the {limit} that max_prompt_tokens and "
            "the model's context less max_new_tokens allow; raise max_prompt_tokens or "
            "shorten the prompt"
        )
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        return (
            f"has a token id outside the model's vocabulary of {vocab_size}; does the "
            "tokenizer belong to the model?"
        )
    return None


def prompts_sha256(encoded: Sequence[Sequence[int]]) -> str:
    """SHA-256, in hexadecimal, of the token ids of all prompts."""
    digest = hashlib.sha256()
    for ids in encoded:
        digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.hexdigest()


def bucket(length: int, *, limit: int) -> int:
    """The padded length for `length` tokens: a power of two from 16 on, or `limit`.

    Few lengths mean few compilations. Padding costs little: a prompt is computed once
    for its whole group.
    """
    return min(max(1 << (length - 1).bit_length(), _SHORTEST), max(limit, length))


def pad(
    encoded: Sequence[Sequence[int]], *, length: int, pad_id: int
) -> tuple[Int[np.ndarray, "N P"], Int[np.ndarray, " N"]]:
    """Right-padded ids and their lengths."""
    ids = np.full((len(encoded), length), pad_id, np.int32)
    for row, tokens in zip(ids, encoded, strict=True):
        row[: len(tokens)] = tokens
    return ids, np.array([len(tokens) for tokens in encoded], np.int32)


def unpad(
    tokens: Int[np.ndarray, "N G T"], lengths: Int[np.ndarray, "N G"]
) -> list[list[list[int]]]:
    """The token ids of completions, a list per group, stop token included."""
    return [
        [row[:length].tolist() for row, length in zip(*group, strict=True)]
        for group in zip(tokens, lengths, strict=True)
    ]


def _encode(
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, Any]],
    encode: Callable[[Mapping[str, Any]], list[int]] | None,
) -> list[list[int]]:
    prompts = [as_messages(tokenizer, row["prompt"]) for row in rows]
    if encode is None and all(isinstance(prompt, str) for prompt in prompts):
        with contextlib.suppress(ValueError):  # reported below, with its row
            return tokenizer.encode_prompts(prompts)
    encoded = []
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        try:
            encoded.append(encode(row) if encode else tokenizer.encode_prompt(prompt))
        except ValueError as error:
            raise ValueError(f"the prompt of {_row(rows, number)}: {error}") from error
    return encoded


def _quotes(tokenizer: Tokenizer, prompt: str | Sequence[Mapping]) -> bool:
    return not isinstance(prompt, str) and any(
        tokenizer.is_templated(message["content"])
        for message in prompt
        if isinstance(message["content"], str)
    )


def _also(found: Sequence[Any]) -> str:
    return f" ({len(found)} such rows)" if len(found) > 1 else ""


def _check_templated_once(
    tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]]
) -> None:
    if not tokenizer.has_chat_template:
        return
    for number, row in enumerate(rows):
        prompt = row["prompt"]
        if isinstance(prompt, str) and tokenizer.is_templated(prompt):
            raise ValueError(
                f"the chat template was already applied to the prompt of "
                f"{_row(rows, number)}, and would be applied a second time; give the "
                'messages, [{"role": "user", "content": ...}], or the text alone.'
            )


def _row(rows: Sequence[Mapping[str, Any]], number: int) -> str:
    """A row by its number from 0, and by its line where it comes from a file."""
    line = line_of(rows, number)
    return f"row {number}" if line is None else f"row {number} ({line})"
