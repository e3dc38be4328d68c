"""Turn by turn, ids are those that the template makes of the whole conversation."""

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.weights.chat import Chat

FAMILIES = ["smollm2", "qwen2_5", "qwen3", "qwen3_5", "llama3_2", "gemma3"]
CALLING = ["qwen2_5", "qwen3", "qwen3_5", "llama3_2"]
MOMENT = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
            "required": ["a"],
        },
    },
}


@pytest.fixture(scope="module")
def chats(tools):
    """The chat and the tokenizer of a family, built once."""
    built = {}

    def chat(family, *given):
        key = family, bool(given)
        if key not in built:
            tokenizer = tools.chat_tokenizer(family).dated(MOMENT)
            built[key] = Chat(tokenizer, given), tokenizer
        return built[key]

    return chat


def call(**arguments):
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


def calls(*arguments, content=""):
    tool_calls = [call(**given) for given in arguments]
    return {"role": "assistant", "content": content, "tool_calls": tool_calls}


def says(content, role="assistant"):
    return {"role": role, "content": content}


def result(content):
    return {"role": "tool", "name": "add", "content": content}


QUESTIONS = [
    says("What is 2+3?", "user"),
    says("It is 5."),
    says("  And\n\n4 + 4? é🙂 ", "user"),
    says("8"),
    says("", "user"),
    says("What?"),
    says("Nothing.", "user"),
    says("Good."),
]
THOUGHTS = [
    says(m["content"] and f"<think>\nwhy{i}\n</think>\n\n{m['content']}")
    if m["role"] == "assistant"
    else m
    for i, m in enumerate(QUESTIONS)
]
TOOLS = [
    says("Add.", "user"),
    calls({"a": 1, "b": "75001"}),
    result("3\n"),
    calls({"a": -4}),
    result('{"error": "no b"}'),
    says("It is 9."),
    says("Again.", "user"),
    calls({"a": 2, "b": 'q"<b>\n x'}),
    result(""),
    says("Done."),
]
SEVERAL = [
    says("Be brief.", "system"),
    says("Add.", "user"),
    calls({"a": 1}, {"a": 2}, content="I add."),
    result("3"),
    result("4"),
    calls({"a": 3}, content="<think>\nonce more\n</think>\n\n"),
    result("5"),
    says("Done."),
]


def thinking(messages):
    """The messages, in which each turn of the policy begins with a thought."""
    return [
        {**m, "content": f"<think>\nhm {i}\n</think>\n\n{m['content']}"}
        if m["role"] == "assistant" and "<think>" not in m["content"]
        else m
        for i, m in enumerate(messages)
    ]


def whole(chat, tokenizer, messages):
    """The text of all messages, by the template in use."""
    return tokenizer.render(messages, template=chat.template, tools=chat.tools)


def turn_by_turn(chat, tokenizer, messages):
    """Prompt, answer, suffix, answer ...; answers as the template writes them."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    ids = chat.prompt(messages[: answers[0]])
    for i, after in zip(answers, [*answers[1:], None], strict=True):
        options = {"template": chat.template, "tools": chat.tools}
        before = tokenizer.render(messages[:i], opens=True, **options)
        text = tokenizer.render(messages[: i + 1], **options)
        assert text.startswith(before)
        answer = tokenizer.encode_rendered(text[len(before) :])
        end = next(n for n, index in enumerate(answer) if index in tokenizer.stop_ids)
        answer = answer[: end + 1]
        assert chat.message(answer).get("tool_calls") == messages[i].get("tool_calls")
        ids += answer
        if after is not None:
            ids += chat.suffix(answer, messages[i + 1 : after])
    return ids


def assert_equal_turn_by_turn(tokenizer, messages, given=()):
    chat = Chat(tokenizer, given)
    ids = turn_by_turn(chat, tokenizer, messages)
    expected = tokenizer.encode_rendered(whole(chat, tokenizer, messages))
    assert ids == expected[: len(ids)]
    # What the template may write behind the end of the last turn.
    assert tokenizer.decode(expected[len(ids) :]).strip() == ""
    assert ids.count(tokenizer._fast.bos_token_id) <= 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("system", [[], [says("Be brief.", "system")]])
def test_turns_of_a_user_are_those_of_the_whole_conversation(tools, family, system):
    tokenizer = tools.chat_tokenizer(family).dated(MOMENT)
    messages = [*system, *QUESTIONS]
    if family == "qwen3_5":  # its prompts open a thought
        messages = thinking(messages)
    assert_equal_turn_by_turn(tokenizer, messages)


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_r1"])
def test_thoughts_of_earlier_turns_are_kept(tools, family):
    tokenizer = tools.chat_tokenizer(family).dated(MOMENT)
    chat = Chat(tokenizer)
    ids = turn_by_turn(chat, tokenizer, thinking(QUESTIONS))
    assert tokenizer.decode(ids).count("hm ") == 4
    assert chat.is_variant == (family in ("qwen3", "qwen3_5", "deepseek_r1"))
    assert_equal_turn_by_turn(tokenizer, thinking(QUESTIONS))


@pytest.mark.parametrize("family", CALLING)
@pytest.mark.parametrize("messages", [TOOLS, SEVERAL])
@pytest.mark.parametrize("thoughts", [False, True])
def test_results_of_tools_are_those_of_the_whole_conversation(
    tools, family, messages, thoughts
):
    if family == "llama3_2" and (messages is SEVERAL or thoughts):
        pytest.skip("one call a turn, and nothing beside it")
    if family == "qwen3_5":
        thoughts = True
    tokenizer = tools.chat_tokenizer(family).dated(MOMENT)
    messages = thinking(messages) if thoughts else messages
    assert_equal_turn_by_turn(tokenizer, messages, [ADD])


def test_an_answer_without_the_end_of_its_turn_gets_it(tools):
    tokenizer = tools.chat_tokenizer("qwen2_5")
    chat = Chat(tokenizer)
    end, other = tokenizer.encode_rendered("<|im_end|><|endoftext|>")
    assert tokenizer.stop_ids == (end, other)
    drawn = tokenizer.encode_rendered("It is 5.")
    text = "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    following = tokenizer.encode_rendered(text)
    user = [says("And?", "user")]
    assert chat.suffix([*drawn, end], user) == following
    # Cut by a limit, ended by another stop token, or empty.
    assert chat.suffix(drawn, user) == [end, *following]
    assert chat.suffix([*drawn, other], user) == [end, *following]
    assert chat.suffix([], user) == [end, *following]


MARKS = ["", "<|im_end|>", "<|im_start|>", "<think>", "</tool_call>", "\n", " "]


@settings(deadline=None)
@given(texts=st.lists(st.text(max_size=12), min_size=3, max_size=3), data=st.data())
def test_no_text_of_a_message_breaks_the_equality(chats, texts, data):
    texts = [t + data.draw(st.sampled_from(MARKS)) + t[::-1] for t in texts]
    messages = [says(texts[0], "user"), says("It is 5."), says(texts[1], "user")]
    messages += [says("8"), says(texts[2], "user"), says("No.")]
    for family in ("smollm2", "qwen2_5", "gemma3"):
        chat, tokenizer = chats(family)
        ids = turn_by_turn(chat, tokenizer, messages)
        expected = tokenizer.encode_rendered(whole(chat, tokenizer, messages))
        assert ids == expected[: len(ids)]


@settings(deadline=None)
@given(text=st.text(max_size=20), data=st.data())
def test_no_result_of_a_tool_breaks_the_equality(chats, text, data):
    text += data.draw(st.sampled_from(MARKS))
    plain = [says("Add.", "user"), calls({"a": 1}), result(text), says("So.")]
    for family in CALLING:
        chat, tokenizer = chats(family, ADD)
        messages = thinking(plain) if family == "qwen3_5" else plain
        ids = turn_by_turn(chat, tokenizer, messages)
        expected = tokenizer.encode_rendered(whole(chat, tokenizer, messages))
        assert ids == expected[: len(ids)]


def test_half_of_a_surrogate_pair_is_refused(tools):
    chat = Chat(tools.chat_tokenizer("qwen2_5"))
    for messages in [[says("\ud83d", "user")], [], [{"role": "user"}]]:
        with pytest.raises(ValueError, match="surrogate pair|empty list|role and cont"):
            chat.suffix([1], messages)
        with pytest.raises(ValueError, match="surrogate pair|empty list|role and cont"):
            chat.prompt(messages)


def test_prompts_are_those_of_the_tokenizer(tools):
    tokenizer = tools.chat_tokenizer("qwen2_5")
    chat, called = Chat(tokenizer), Chat(tokenizer, [ADD])
    for prompt in ["Two", QUESTIONS[:1], QUESTIONS[:2], QUESTIONS[:3]]:
        assert chat.prompt(prompt) == tokenizer.encode_prompt(prompt)
    gemma = tools.chat_tokenizer("gemma3")
    assert Chat(gemma).prompt(QUESTIONS[:2]) == gemma.encode_prompt(QUESTIONS[:2])
    text = tokenizer.decode(called.prompt(QUESTIONS[:1]))
    assert '"description": "Adds two numbers."' in text
    assert called.prompt("Two") == tokenizer.encode_prompt("Two")


def test_without_a_chat_template_messages_are_plain_text(tools):
    tokenizer = tools.chat_tokenizer("llama3_2", chat_template=None)
    chat = Chat(tokenizer)
    assert chat.template is None
    texts = [says("Guess.", "system"), says("Now: ", "user")]
    assert chat.prompt("Now: ") == tokenizer.encode_prompt("Now: ")
    assert chat.prompt(texts) == tokenizer.encode_prompt("Guess.\nNow: ")
    drawn = tokenizer.encode_rendered("7<|eot_id|>")
    higher = tokenizer.encode_rendered("\nHigher: ")
    assert chat.suffix(drawn, [says("\nHigher: ", "user")]) == higher
    assert chat.message(drawn) == says("7")
    with pytest.raises(ValueError, match="has no chat template, so its model cannot"):
        Chat(tokenizer, [ADD])


def test_a_text_that_begins_with_bos_has_one_when_the_tokenizer_adds_it_too(tools):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tools.chat_tokenizer("llama3_2").dated(MOMENT)
    fast = tokenizer._fast
    bos = fast.bos_token_id
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    assert tokenizer.encode_prompt("a")[0] == bos
    chat = Chat(tokenizer, [ADD])
    ids = turn_by_turn(chat, tokenizer, TOOLS)
    assert ids[0] == bos
    assert ids.count(bos) == 1
