"""Templates that rewrite earlier turns get a known variant, or are refused by name."""

import re

import pytest

from grpo_jax.weights.chat import Chat

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
RESULT = [{"role": "tool", "name": "add", "content": "3"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def changed(tools):
    """A family's tokenizer, some texts in its template replaced."""

    def changed(family, *pairs):
        template = tools.chat_fast(family).chat_template
        for old, new in pairs:
            assert old in template
            template = template.replace(old, new)
        return tools.chat_tokenizer(family, chat_template=template, name_or_path="mine")

    return changed


@pytest.mark.parametrize("family", ["smollm2", "qwen2_5", "llama3_2", "gemma3"])
def test_an_append_only_template_stays_as_it_is(tools, family):
    chat = Chat(tools.chat_tokenizer(family))
    assert not chat.is_variant
    assert chat.template == tools.chat_fast(family).chat_template


def test_a_variant_differs_where_turns_were_rewritten_only(tools):
    chat = Chat(tools.chat_tokenizer("qwen3"), [TOOL])
    own = tools.chat_fast("qwen3").chat_template
    assert chat.is_variant
    assert chat.template == own.replace(
        "loop.index0 > ns.last_query_index", "true"
    ).replace("loop.last or (not loop.last and reasoning_content)", "reasoning_content")


def test_an_unknown_rewriting_is_refused_with_what_it_does(changed):
    tokenizer = changed(
        "qwen3", ("loop.index0 > ns.last_query_index", "not messages[loop.index0 + 1:]")
    )
    with pytest.raises(ValueError) as error:
        Chat(tokenizer)
    said = str(error.value)
    assert said.startswith("the chat template of mine ")
    assert "rewrites earlier turns ('<think>" in said or "drops what the policy" in said
    assert "chat_template.jinja" in said


def test_thoughts_that_are_lost_between_questions_may_stay_between_calls(changed):
    """Such a template does for tools; a user's message is refused when it comes."""
    # What Qwen3's does, in other words.
    tokenizer = changed(
        "qwen3",
        ("loop.index0 > ns.last_query_index", "ns.last_query_index < loop.index0"),
        ("loop.last or (not loop.last and reasoning_content)", "reasoning_content"),
        ("'</think>' in content", "content.count('</think>')"),
    )
    chat = Chat(tokenizer, [TOOL])
    assert chat.suffix([], RESULT)
    with pytest.raises(ValueError, match="the chat template of mine drops what"):
        chat.suffix([], USER)
    with pytest.raises(ValueError, match="the chat template of mine drops what"):
        Chat(tokenizer)


def test_a_template_whose_prompts_differ_from_its_answers_is_refused(changed):
    tokenizer = changed("smollm2", ("assistant\\n", "assistant:\\n"))
    with pytest.raises(ValueError, match="opens an answer otherwise than it writes"):
        Chat(tokenizer)


@pytest.mark.parametrize("family", ["smollm2", "gemma3", "deepseek_r1"])
def test_a_template_without_a_place_for_calls_refuses_tools_by_name(tools, family):
    tokenizer = tools.chat_tokenizer(family, name_or_path="mine")
    with pytest.raises(ValueError, match="template of mine has no place for calls"):
        Chat(tokenizer, [TOOL])


@pytest.mark.parametrize(
    "lost", ["m.content + '\\n</tool_response>'", "c.function.name", "c.function.arg"]
)
def test_each_part_of_a_call_has_to_be_written(changed, lost):
    instead = {"m": "'\\n</tool_response>'", "c": "'x' + 'y'"}[lost[0]]
    if lost.endswith("arg"):
        lost, instead = "c.function.arguments | tojson", "'{}'"
    tokenizer = changed("qwen2_5", (lost, instead))
    with pytest.raises(ValueError, match="has no place for calls"):
        Chat(tokenizer, [TOOL])


def test_a_template_that_refuses_several_turns_is_refused(changed):
    raising = "{{- raise_exception('one turn') -}}"
    stop = "{%- if messages | length > 2 -%}" + raising + "{%- endif -%}"
    tokenizer = changed("smollm2", ("{%- for", stop + "{%- for"))
    with pytest.raises(ValueError, match=r"cannot write several turns \(.*one turn"):
        Chat(tokenizer)


def test_messages_that_a_template_refuses_are_told(tools):
    chat = Chat(tools.chat_tokenizer("gemma3"))
    with pytest.raises(ValueError, match="refuses the messages: roles must alternate"):
        chat.suffix([], USER * 2)


def test_a_prompt_that_changes_what_follows_is_refused(changed):
    """As SmolLM3's, whose turns begin otherwise if the system's message says so."""
    opening = "{{- '<|im_start|>assistant\\n' -}}"
    changing = (
        "{{- '<|im_start|>assistant\\n' + ('<think>\\n' if '/think' in "
        "messages[0].content else '') -}}"
    )
    tokenizer = changed("smollm2", (opening, changing))
    chat = Chat(tokenizer)
    assert chat.prompt(USER)
    system = [{"role": "system", "content": "/think"}, *USER]
    with pytest.raises(ValueError, match="the chat template of mine"):
        chat.prompt(system)


def test_a_turn_ends_at_the_first_stop_token(changed):
    """As Phi-3's, which writes the end of a text when no answer is to follow."""
    over = "<|endoftext|><|im_end|>"
    closing = "{%- if not add_generation_prompt -%}" + over + "{%- endif -%}"
    tokenizer = changed("smollm2", ("{%- if add_gen", closing + "{%- if add_gen"))
    chat = Chat(tokenizer)
    end, text = tokenizer.encode_rendered("<|im_end|>"), "\n<|im_start|>user\nHi"
    assert chat.suffix(end, USER)[:3] == tokenizer.encode_rendered(text)[:3]


def test_an_end_that_belongs_to_the_next_message_is_written_once(changed):
    """As GLM's: the policy stops by drawing what begins the user's turn."""
    tokenizer = changed(
        "smollm2",
        ("'<|im_start|>' + m.role", "'<|endoftext|>' + m.role"),
        ("+ m.content + '<|im_end|>\\n'", "+ m.content"),
        ("{{- '<|im_start|>assistant\\n'", "{{- '<|endoftext|>assistant\\n'"),
    )
    chat = Chat(tokenizer)
    drawn = tokenizer.encode_rendered("Yes<|endoftext|>")
    text = "user\nHi<|endoftext|>assistant\n"
    assert chat.suffix(drawn, USER) == tokenizer.encode_rendered(text)
    assert chat.suffix(drawn[:-1], USER) == tokenizer.encode_rendered(
        "<|endoftext|>" + text
    )


def test_what_follows_a_cut_answer_is_written_although_it_ends_alike(changed):
    tokenizer = changed(
        "smollm2",
        ("'<|im_start|>' + m.role", "'#' + m.role"),
        ("+ m.content + '<|im_end|>\\n'", "+ m.content"),
        ("{{- '<|im_start|>assistant\\n'", "{{- '#assistant\\n'"),
    )
    suffix = Chat(tokenizer).suffix(tokenizer.encode_rendered("#"), USER)
    assert tokenizer.decode(suffix) == "#user\nHi#assistant\n"


def test_a_call_may_end_without_a_stop_token(changed):
    """As GLM's, where the policy stops by drawing what begins the result of a tool."""
    tokenizer = changed(
        "qwen2_5",
        (
            "{{- called(m.tool_calls) -}}{{- '<|im_end|>\\n' -}}",
            "{{- called(m.tool_calls) -}}",
        ),
        ("'<|im_start|>user' -}}{%- endif", "'<|endoftext|>user' -}}{%- endif"),
    )
    chat = Chat(tokenizer, [TOOL])
    drawn = tokenizer.encode_rendered(CALL + "<|endoftext|>")
    assert chat.message(drawn)["tool_calls"]
    text = tokenizer.decode(chat.suffix(drawn, RESULT))
    assert text.startswith("user\n<tool_response>\n3\n</tool_response>")
    text = tokenizer.decode(chat.suffix(drawn[:-1], RESULT), keep=tokenizer.stop_ids)
    assert text.startswith("<|endoftext|>user\n<tool_response>")


def test_what_is_written_may_depend_on_the_tools_and_on_the_call(changed):
    """As gpt-oss's, which names the tool before its result."""
    wrote = "loop.previtem.tool_calls[0].function.name + (' of many' if tools else '')"
    tokenizer = changed(
        "qwen2_5", ("'\\n<tool_response>\\n'", f"{wrote} + '\\n<tool_response>\\n'")
    )
    text = tokenizer.decode(Chat(tokenizer, [TOOL]).suffix([], RESULT))
    assert "useradd of many\n<tool_response>\n3" in text


def test_a_message_that_makes_a_template_rewrite_is_refused_when_it_comes(changed):
    tokenizer = changed(
        "smollm2",
        ("m.role + '\\n' + m.content", "m.role + '\\n' + (said or m.content)"),
        ("{%- for", "{%- set said = 'x' if messages[-1].content == 'x' -%}{%- for"),
    )
    chat = Chat(tokenizer)
    assert chat.suffix([], USER)
    with pytest.raises(ValueError, match="mine rewrites earlier turns"):
        chat.suffix([], [{"role": "user", "content": "x"}])


def test_an_end_that_takes_the_space_behind_it_is_tokenized_with_it(tools):
    from tokenizers import AddedToken

    fast = tools.chat_tokenizer("smollm2")._fast
    fast.backend_tokenizer.add_special_tokens(
        [AddedToken("<|over|>", special=True, rstrip=True)]
    )
    template = re.sub(r"<\|im_end\|>(?=\\n)", "<|over|>", fast.chat_template)
    tokenizer = tools.chat_tokenizer("smollm2", chat_template=template)
    tokenizer = type(tokenizer)(fast, stop_ids=[fast.get_vocab()["<|over|>"]])
    fast.chat_template = template
    chat = Chat(tokenizer)
    text = tokenizer.render([*USER, {"role": "assistant", "content": "Yes"}, *USER])
    drawn = tokenizer.encode_rendered("Yes<|over|>")
    suffix = chat.suffix(drawn, USER)
    whole = tokenizer.encode_rendered(text)
    place = whole.index(drawn[-1], len(chat.prompt(USER)))
    behind = whole[place + 1 :]
    assert suffix[: len(behind)] == behind
