"""Encoding prompts, decoding completions, stop tokens, and the files of a tokenizer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.weights import Tokenizer
from grpo_jax.weights.tokenizer import import_fast_tokenizer

# Ids of TOKENS in conftest.py: specials 0-2, a-z from 3, digits from 29, "Ġ" 39,
# then "th", "the" and "12".
SPACE, THE = 39, 41
MESSAGES = [{"role": "user", "content": "the"}]


def letters(text):
    return [3 + ord(letter) - ord("a") for letter in text]


@pytest.fixture(scope="module")
def tokenizer(tools):
    return Tokenizer(tools.make_fast(), stop_ids=[2, None, 1])


@pytest.fixture
def folder(tmp_path, tools):
    tools.make_fast().save_pretrained(tmp_path)
    return tmp_path


def test_a_string_is_encoded_as_it_is(tokenizer):
    assert tokenizer.encode_prompt("the cat") == [THE, SPACE, *letters("cat")]


def test_a_string_gets_the_special_tokens_that_the_tokenizer_adds(tools):
    from tokenizers.processors import TemplateProcessing

    fast = tools.make_fast()
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert Tokenizer(fast).encode_prompt("the") == [0, THE]


@pytest.mark.parametrize("behind", ["", " </s>", " </s> </s>"])
@pytest.mark.parametrize("before", ["", "<s> "])
def test_no_prompt_ends_in_what_the_tokenizer_puts_behind_texts(tools, before, behind):
    from tokenizers.processors import TemplateProcessing

    fast = tools.make_fast()
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before}$A{behind}", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer, begin = Tokenizer(fast), [0] if before else []
    expected = [[*begin, THE], begin, [*begin, THE, 1]]
    assert tokenizer.encode_prompts(["the", "", "the</s>"]) == expected
    assert tokenizer.encode_prompt("the") == expected[0]


def test_messages_go_through_the_template_and_open_the_turn_of_the_assistant(tokenizer):
    # <s>user the</s><s>assistant_
    user, assistant = letters("user"), letters("assistant")
    expected = [0, *user, SPACE, THE, 1, 0, *assistant, SPACE]
    assert tokenizer.encode_prompt([{"role": "user", "content": "the"}]) == expected


def test_a_last_message_of_the_assistant_is_continued(tokenizer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "the"},
    ]
    assistant = letters("assistant")
    expected = [0, *letters("user"), SPACE, *letters("a"), 1, 0, *assistant, SPACE, THE]
    assert tokenizer.encode_prompt(messages) == expected


def test_messages_need_a_template(tools):
    tokenizer = Tokenizer(tools.make_fast(template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template; give prompts as strings"):
        tokenizer.encode_prompt([{"role": "user", "content": "a"}])


def test_marks_of_the_template_in_a_text_are_seen(tokenizer):
    # The template sets <s> and </s>; <s> also begins any text.
    assert tokenizer.is_templated("<s>user the</s>")
    assert not tokenizer.is_templated("<s>the user of <b>s</b>")


@pytest.mark.parametrize("messages", [[], ["hello"], [{"role": "user"}]])
def test_malformed_messages_are_refused(tokenizer, messages):
    with pytest.raises(ValueError, match="message"):
        tokenizer.encode_prompt(messages)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('System role\n not supported') }}", "System role not su"),
        ("{{ messages[0]['role']['x']['y'] }}", "no attribute 'x'.*UndefinedError"),
        ("{{ 1 + messages[0]['content'] }}", "unsupported operand.*TypeError"),
        ("{{ 1 / 0 }}", "division by zero.*ZeroDivisionError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages | nope }}", "No filter named 'nope'"),
    ],
)
def test_whatever_a_template_raises_is_told_in_one_line(tools, template, said):
    tokenizer = Tokenizer(tools.make_fast(template=template))
    with pytest.raises(ValueError, match=f"chat template refuses.*{said}") as error:
        tokenizer.encode_prompt(MESSAGES)
    assert "\n" not in str(error.value)
    assert not tokenizer.is_templated("<s>user the</s>")


def test_a_last_message_that_the_template_drops_cannot_be_continued(tools):
    tokenizer = Tokenizer(tools.make_fast(template="{{ messages[0]['content'] }}"))
    messages = [*MESSAGES, {"role": "assistant", "content": "cat"}]
    with pytest.raises(ValueError, match="chat template refuses the messages"):
        tokenizer.encode_prompt(messages)


@pytest.mark.parametrize(
    "wrap", [str, lambda text: [{"role": "user", "content": text}]]
)
def test_text_that_cannot_be_written_is_refused(tokenizer, wrap):
    with pytest.raises(ValueError, match=r"character 2 is '\\ud83d', half of a surro"):
        tokenizer.encode_prompt(wrap("ab\ud83d"))
    # This vocabulary has small letters, digits and the space.
    with pytest.raises(ValueError, match=r"no token for 'T!\\xe9' and would drop it"):
        tokenizer.encode_prompt(wrap("The cat!\xe9!"))


@given(st.text(max_size=30))
def test_a_prompt_is_refused_or_keeps_all_of_its_text(tokenizer, text):
    try:
        ids = tokenizer.encode_prompt(text)
    except ValueError:
        return
    assert tokenizer.decode(ids).split() == text.split()


def test_the_unknown_token_is_a_loss_unless_it_is_asked_for(tools):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"<unk>": 0, "two": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = import_fast_tokenizer()(tokenizer_object=backend, unk_token="<unk>")
    tokenizer = Tokenizer(fast)
    assert tokenizer.encode_prompt("two  two") == [1, 1]
    with pytest.raises(ValueError, match="no token for 'ne'"):
        tokenizer.encode_prompt("two one")


def test_a_special_token_spelled_out_becomes_the_token(tokenizer):
    # As transformers and TRL do.
    message = {"role": "user", "content": "the</s>the"}
    assert tokenizer.encode_prompt([message])[6:9] == [THE, 1, THE]


def test_decoding_leaves_out_special_tokens(tokenizer):
    assert tokenizer.decode([0, THE, SPACE, *letters("cat"), 1]) == "the cat"


def test_stop_ids_are_those_given_and_the_tokenizers_own_without_repeats(tokenizer):
    assert tokenizer.stop_ids == (2, 1)


def test_padding_falls_back_to_the_end_of_sequence(tools, tokenizer):
    assert tokenizer.pad_id == 1
    fast = tools.make_fast()
    fast.pad_token = "z"
    assert Tokenizer(fast).pad_id == letters("z")[0]


def test_the_vocabulary_ends_after_the_largest_id(tools):
    fast = tools.make_fast()
    assert Tokenizer(fast).vocab_size == 43
    fast.add_tokens(["<think>"])
    assert Tokenizer(fast).vocab_size == 44


def test_an_image_placeholder_beyond_the_embedding_does_not_count(tools):
    fast = tools.make_fast()
    fast.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert Tokenizer(fast).vocab_size == 43


def test_stop_ids_come_from_every_file_that_names_them(folder, untied):
    (folder / "generation_config.json").write_text('{"eos_token_id": [40, 1]}')
    assert untied.config.eos_token_ids == (1, 2)
    assert Tokenizer.from_folder(folder, untied.config).stop_ids == (40, 1, 2)
    (folder / "generation_config.json").write_text('{"eos_token_id": 40}')
    assert Tokenizer.from_folder(folder, untied.config).stop_ids == (40, 1, 2)


def test_a_saved_tokenizer_is_the_same(folder, tokenizer, untied, tmp_path):
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.from_folder(tmp_path / "again", untied.config)
    messages = [{"role": "user", "content": "the cat 12"}]
    assert again.encode_prompt(messages) == tokenizer.encode_prompt(messages)
    assert again.encode_prompt("the 12") == tokenizer.encode_prompt("the 12")
    assert again.decode([THE, 1]) == "the"
    assert (again.pad_id, again.vocab_size) == (1, 43)


def test_transformers_4_and_5_know_the_class_that_is_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    auto = AutoTokenizer.from_pretrained(str(tmp_path), trust_remote_code=False)
    assert auto.encode("the cat") == tokenizer.encode_prompt("the cat")
    assert auto.chat_template == tokenizer._fast.chat_template


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path, untied):
    with pytest.raises(ValueError, match="no tokenizer.json.*AutoTokenizer"):
        Tokenizer.from_folder(tmp_path, untied.config)


@pytest.mark.parametrize("text", ["", "{", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_refused_by_name(folder, untied, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="cannot read the tokenizer .*tokenizer.json"):
        Tokenizer.from_folder(folder, untied.config)


@pytest.mark.parametrize("text", ["", "[]", '{"eos_token_id": ["</s>"]}'])
def test_a_damaged_generation_config_is_refused_by_name(folder, untied, text):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config.json"):
        Tokenizer.from_folder(folder, untied.config)
