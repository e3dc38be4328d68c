"""Messages read out of drawn ids: calls, thoughts, and what is no call."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.weights.chat import Chat

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "b": {"type": "string"},
                "items": {"type": "array", "items": {"type": "integer"}},
            },
        },
    },
}
QWEN, LLAMA = (
    '<tool_call>\n{"name": "add", "arguments": %s}\n</tool_call>',
    ('{"name": "add", "parameters": %s}'),
)
ENDS = {"qwen2_5": "<|im_end|>", "qwen3_5": "<|im_end|>", "llama3_2": "<|eot_id|>"}


def call(**arguments):
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


@pytest.fixture(scope="session")
def read(tools):
    """The message that a family's chat reads out of a text."""
    chats = {}

    def read(family, text, *, end=None):
        if family not in chats:
            tokenizer = tools.chat_tokenizer(family)
            chats[family] = Chat(tokenizer, [ADD]), tokenizer
        chat, tokenizer = chats[family]
        return chat.message(
            tokenizer.encode_rendered(text + (ENDS[family] if end is None else end))
        )

    return read


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen2_5", QWEN % '{"a": 1, "b": "x"}'),
        (
            "qwen2_5",
            '<tool_call>{"arguments":{"a":1,"b":"x"},"name":"add"}</tool_call>',
        ),
        ("llama3_2", LLAMA % '{"a": 1, "b": "x"}'),
        ("llama3_2", "<|python_tag|>" + LLAMA % '{"a": 1, "b": "x"}'),
        (
            "llama3_2",
            '{"type": "function", "name": "add", "parameters": {"a": 1, "b": "x"}}',
        ),
        (
            "qwen3_5",
            "</think>\n\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
            "<parameter=b>\nx\n</parameter>\n</function>\n</tool_call>",
        ),
    ],
)
def test_a_call_is_read_in_the_format_of_the_family(read, family, text):
    message = {"role": "assistant", "content": "", "tool_calls": [call(a=1, b="x")]}
    assert read(family, text) == message
    # Without its last token, the turn was cut: the call may not be complete.
    cut = read(family, text, end="")
    assert cut.keys() == {"role", "content"}
    assert '"add"' in cut["content"] or "=add>" in cut["content"]


def test_text_thoughts_and_several_calls(read):
    calls = QWEN % '{"a": 1}' + "\n" + QWEN % '{"a": 2}'
    text = f"<think>\nTwo numbers.\n</think>\n\nI add.\n{calls}\nAnd wait."
    assert read("qwen2_5", text) == {
        "role": "assistant",
        "content": "I add.\nAnd wait.",
        "reasoning_content": "Two numbers.",
        "tool_calls": [call(a=1), call(a=2)],
    }
    # A thought that the prompt has opened.
    message = read("qwen3_5", "Two numbers.\n</think>\n\nIt is 3.")
    assert message["content"] == "It is 3."
    assert message["reasoning_content"] == "Two numbers."
    # Other tokens end a turn as well.
    message = read("qwen2_5", QWEN % "{}", end="<|endoftext|>")
    assert message["tool_calls"] == [call()]
    message = read("llama3_2", LLAMA % "{}", end="<|eom_id|>")
    assert message["tool_calls"] == [call()]


def test_values_of_parameters_have_the_types_of_the_schema(read):
    parameters = {"a": "12", "b": "12", "items": "[1, 2]", "other": "12"}
    written = "".join(
        f"<parameter={key}>\n{value}\n</parameter>\n"
        for key, value in parameters.items()
    )
    text = (
        f"\n</think>\n\n<tool_call>\n<function=add>\n{written}</function>\n</tool_call>"
    )
    (found,) = read("qwen3_5", text)["tool_calls"]
    assert found == call(a=12, b="12", items=[1, 2], other="12")


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen2_5", QWEN % '{"a": 1'),
        ("qwen2_5", QWEN % "[1]"),
        ("qwen2_5", QWEN % '"a"'),
        ("qwen2_5", QWEN % '{"a": NaN}'),
        ("qwen2_5", QWEN % '{"b": "\\ud83d"}'),
        ("qwen2_5", QWEN % ("[" * 50_000)),
        ("qwen2_5", QWEN % '{"a": 1}' + "<tool_call>\n{}\n</tool_call>"),
        ("qwen2_5", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("qwen2_5", '<tool_call>{"arguments": {}}</tool_call>'),
        ("qwen2_5", "<tool_call>add</tool_call>"),
        ("qwen2_5", '<tool_call>\n{"name": "add", "arguments": {}}\n'),
        ("llama3_2", LLAMA % "{"),
        ("llama3_2", LLAMA % "[1]"),
        ("llama3_2", LLAMA % "{}" + "; " + LLAMA % "{}"),
        ("llama3_2", LLAMA % "{}" + " is my call."),
        ("qwen3_5", "\n</think>\n\n<tool_call>\nadd\n</tool_call>"),
        ("qwen3_5", "\n</think>\n\n<tool_call>\n<function=add>\n</tool_call>"),
        (
            "qwen3_5",
            "\n</think>\n\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</function>\n"
            "</tool_call>",
        ),
        ("qwen3_5", "\n</think>\n\n<tool_call>\n<function=add>\n</function>\n"),
    ],
)
def test_a_call_that_cannot_be_read_is_text_and_says_so(read, family, text):
    message = read(family, text)
    assert message.pop("malformed")
    assert message == {"role": "assistant", "content": text}


def test_text_is_no_call(read):
    for family in ENDS:
        for text in ("It is 5.", "", '{"name": "Ada", "age": 36}', "[add(1)]"):
            opened = "\n</think>\n\n" if family == "qwen3_5" else ""
            expected = {"role": "assistant", "content": text}
            assert read(family, opened + text) == expected
    # Special tokens in it are left out.
    assert read("qwen2_5", "It<|im_start|> is 5.")["content"] == "It is 5."
    assert read("llama3_2", "<|python_tag|>It is 5.")["content"] == "It is 5."


@settings(max_examples=60, deadline=None)
@given(
    arguments=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=4,
        ),
        max_size=3,
    )
)
def test_all_arguments_of_json_are_read_back(read, arguments):
    for family, form in (("qwen2_5", QWEN), ("llama3_2", LLAMA)):
        message = read(family, form % json.dumps(arguments))
        assert message["tool_calls"] == [call(**arguments)]


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(
            "<tool_call> </tool_call> <function=add> </function> <parameter=a> "
            '</parameter> <think> </think> {"name": "add", "arguments": "parameters": '
            "{} } { 1 \n add <|im_start|> <|python_tag|>".split(" ")
        )
        | st.text(max_size=3),
        max_size=12,
    )
)
def test_whatever_the_policy_draws_is_a_message(read, pieces):
    for family in ENDS:
        message = read(family, "".join(pieces))
        assert message["role"] == "assistant"
        assert isinstance(message["content"], str)
        assert not ("malformed" in message and "tool_calls" in message)
        for found in message.get("tool_calls", []):
            assert found["type"] == "function"
            assert isinstance(found["function"]["name"], str)
            assert isinstance(found["function"]["arguments"], dict)


def test_special_tokens_of_a_call_reach_the_reader(tools):
    """Some files make <tool_call> a special token, which decoding would drop."""
    from tokenizers import AddedToken

    plain = tools.chat_tokenizer("qwen2_5")
    tags = [AddedToken(t, special=True) for t in ("<tool_call>", "</tool_call>")]
    plain._fast.add_special_tokens({"additional_special_tokens": tags})
    tokenizer = type(plain)(plain._fast, stop_ids=plain.stop_ids)
    ids = tokenizer.encode_rendered(QWEN % '{"a": 1}' + "<|im_end|>")
    assert "<tool_call>" not in tokenizer.decode(ids)
    chat = Chat(tokenizer, [ADD])
    assert chat.message(ids)["tool_calls"] == [call(a=1)]
    assert "<tool_call>" not in Chat(tokenizer).message(ids)["content"]
    broken = tokenizer.encode_rendered(QWEN % "{" + "<|im_end|>")
    assert chat.message(broken)["content"] == QWEN % "{"


def test_the_tokenizers_own_response_template_is_used(tools):
    own = {
        "start_anchor": "<|im_start|>assistant\n",
        "defaults": {"role": "assistant"},
        "fields": {
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "thinking": {"open": "<hm>", "close": "</hm>"},
            "content": {"close": "<|im_end|>"},
        },
    }
    tokenizer = tools.chat_tokenizer("qwen2_5", response_template=own)
    chat = Chat(tokenizer, [ADD])
    text = "<hm>so</hm>I add.\n" + QWEN % '{"a": 1}' + "<|im_end|>"
    assert chat.message(tokenizer.encode_rendered(text)) == {
        "role": "assistant",
        "content": "I add.",
        "thinking": "so",
        "tool_calls": [call(a=1)],
    }
    wrong = {**own, "fields": {"content": {}, "tool_calls": {"open": "<none>"}}}
    tokenizer = tools.chat_tokenizer("qwen2_5", response_template=wrong)
    with pytest.raises(ValueError, match="its response_template does not read"):
        Chat(tokenizer, [ADD])


def test_calls_in_an_unknown_format_are_refused_by_name(tools):
    template = tools.chat_fast("qwen2_5").chat_template.replace("tool_call>", "use>")
    tokenizer = tools.chat_tokenizer("qwen2_5", chat_template=template)
    Chat(tokenizer)
    with pytest.raises(ValueError, match="no known format reads it back.*response_tem"):
        Chat(tokenizer, [ADD])


def test_a_call_that_is_not_closed_is_none_in_any_format(tools):
    # This parser takes what it finds, to the end of the text.
    calls = {
        "open_pattern": r'<tool_call>\s*{"name": "(?P<name>\w+)"',
        "close": "</tool_call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {"tag_pattern": r'"(?P<key>\w+)": "(?P<value>\w*)"'},
        "transform": {
            "type": "function",
            "function": {"name": "{name}", "arguments": "{content}"},
        },
    }
    fields = {"tool_calls": calls, "content": {"close": "<|im_end|>"}}
    own = {"start_anchor": "<|im_start|>assistant\n", "fields": fields}
    tokenizer = tools.chat_tokenizer("qwen2_5", response_template=own)
    chat, text = Chat(tokenizer, [ADD]), QWEN % '{"b": "x"}' + "<|im_end|>"
    assert chat.message(tokenizer.encode_rendered(text))["tool_calls"] == [call(b="x")]
    text = text.replace("</tool_call>", "")
    assert chat.message(tokenizer.encode_rendered(text))["malformed"]
