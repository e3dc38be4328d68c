"""Prompts become padded ids of few lengths, and bad ones are named."""

import numpy as np
import pytest

from grpo_jax.models.limits import longest_prompt
from grpo_jax.rollout import encoding as texts


class ChatTokenizer:
    """Says what it was asked for; a token per character."""

    has_chat_template = True

    def is_templated(self, text):
        return "<|im_start|>" in text

    def encode_prompts(self, prompts):
        return [*map(self.encode_prompt, prompts)]

    def encode_prompt(self, prompt):
        if isinstance(prompt, str):
            return [ord(character) for character in prompt]
        return [0, *[ord(c) for m in prompt for c in f"{m['role']}:{m['content']}"], 1]


def test_a_string_is_the_message_of_a_user_for_a_chat_model(tiny_policy):
    ids = texts.encode_prompt(ChatTokenizer(), "hi")
    assert ids == [0, *map(ord, "user:hi"), 1]
    plain = texts.encode_prompt(tiny_policy.tokenizer, "hi")
    assert tiny_policy.tokenizer.decode(plain) == "hi" and len(plain) == 2


def test_messages_go_to_the_template_as_they_are():
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert texts.encode_prompt(ChatTokenizer(), messages) == [
        0,
        *map(ord, "system:auser:b"),
        1,
    ]


def rows(*prompts):
    return [{"prompt": prompt} for prompt in prompts]


def test_a_text_with_the_template_applied_already_is_refused():
    ready = "<|im_start|>user\nhi<|im_end|>"
    options = {"limit": 99, "vocab_size": 256}
    with pytest.raises(ValueError, match="already applied to the prompt of row 1"):
        texts.encode_rows(ChatTokenizer(), rows("hi", ready), **options)
    # Also where the first row holds messages.
    with pytest.raises(ValueError, match="already applied to the prompt of row 1"):
        texts.encode_rows(ChatTokenizer(), rows(messages("hi"), ready), **options)


def messages(text):
    return [{"role": "user", "content": text}]


def test_messages_that_spell_out_the_template_are_taken_and_told(caplog):
    quoted, options = messages("<|im_start|>?"), {"limit": 99, "vocab_size": 256}
    taken = texts.encode_rows(ChatTokenizer(), rows(messages("a"), quoted), **options)
    assert len(taken) == 2
    (message,) = caplog.messages
    assert "row 1 contains special tokens" in message


class RefusingTokenizer(ChatTokenizer):
    """Has a template that knows no system."""

    def encode_prompt(self, prompt):
        if not isinstance(prompt, str) and prompt[0]["role"] == "system":
            raise ValueError("the chat template refuses the messages: no system")
        if "\ud800" in prompt:
            raise ValueError("character 0 is no text")
        return super().encode_prompt(prompt)


def test_a_prompt_that_cannot_be_encoded_is_named():
    options = {"limit": 99, "vocab_size": 256}
    with_system = [{"role": "system", "content": "a"}, *messages("b")]
    refused = "row 2: the chat template refuses the messages: no system"
    with pytest.raises(ValueError, match=f"the prompt of {refused}"):
        given = rows("hi", messages("b"), with_system)
        texts.encode_rows(RefusingTokenizer(), given, **options)
    plain = RefusingTokenizer()
    plain.has_chat_template = False  # strings are encoded all at once
    with pytest.raises(ValueError, match="the prompt of row 1: character 0"):
        texts.encode_rows(plain, rows("a", "\ud800"), **options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (("ok", "abcdef"), "row 1 has 6 tokens, more than the 5 that"),
        (("abcdef", "ok", "abcdefg"), r"row 0 has 6 tokens.*\(2 such rows\)"),
        (("ok", ""), "row 1 has no token"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(prompts, message, tiny_policy):
    with pytest.raises(ValueError, match=message):
        texts.encode_rows(
            tiny_policy.tokenizer, rows(*prompts), limit=5, vocab_size=264
        )


def test_ids_outside_of_the_vocabulary_are_named(tiny_policy):
    with pytest.raises(ValueError, match="row 0 has a token id outside.* of 50"):
        texts.encode_rows(tiny_policy.tokenizer, rows("z"), limit=5, vocab_size=50)


@pytest.mark.parametrize(
    ("length", "limit", "padded"),
    [
        (1, 512, 16),
        (16, 512, 16),
        (17, 512, 32),
        (33, 512, 64),
        (300, 512, 512),
        (300, 400, 400),
        (5, 8, 8),
        (8, 8, 8),
        (9, 8, 9),
    ],
)
def test_padded_lengths_are_powers_of_two_up_to_the_limit(length, limit, padded):
    assert texts.bucket(length, limit=limit) == padded


def test_padding_is_on_the_right():
    ids, lengths = texts.pad([[1, 2, 3], [4]], length=4, pad_id=9)
    np.testing.assert_array_equal(ids, [[1, 2, 3, 9], [4, 9, 9, 9]])
    np.testing.assert_array_equal(lengths, [3, 1])


def test_a_prompt_leaves_room_for_its_completions():
    longest = longest_prompt
    assert longest(512, new_tokens=100, context=1000) == 512
    assert longest(512, new_tokens=600, context=1000) == 400
    with pytest.raises(ValueError, match="max_new_tokens 128 leaves no room.* of 128"):
        longest(512, new_tokens=128, context=128)


def test_unpadded_ids_keep_the_stop_token():
    tokens = np.array([[[5, 6, 0], [7, 0, 0]]])
    assert texts.unpad(tokens, np.array([[3, 1]])) == [[[5, 6, 0], [7]]]
