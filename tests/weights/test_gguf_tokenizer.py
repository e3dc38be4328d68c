"""Tokenizers rebuilt from the fields of GGUF files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.weights import load_pretrained
from grpo_jax.weights._gguf_tokenizer import (
    build_tokenizer,
    check_tokenizer,
    stop_ids,
)
from grpo_jax.weights.pretrained import read_model_config

# Bytes of printable ASCII stand for themselves in byte-level BPE, the space is "Ġ".
ALPHABET = [chr(code) for code in range(33, 127)] + ["Ġ"]
BYTES = {token: 3 + index for index, token in enumerate(ALPHABET)}


def gpt2_fields(pre, *, merges=(), **extra):
    merged = [left + right for left, right in merges]
    tokens = ["<unk>", "<s>", "</s>", *ALPHABET, *merged]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


def pieces(pre, text):
    """How the pre-tokenizer cuts a text."""
    fast = build_tokenizer(gpt2_fields(pre), file="x.gguf")._fast
    cut = fast.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [piece for piece, _ in cut]


TEXT = "It's 12345 o'clock, x=1.5!"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", "It 's Ġ12345 Ġo ' clock , Ġx = 1 . 5 !"),
        ("smollm", "It 's Ġ 1 2 3 4 5 Ġo ' clock , Ġx = 1 . 5 !"),
        ("llama-bpe", "It 's Ġ 123 45 Ġo 'clock , Ġx = 1 . 5 !"),
        ("qwen2", "It 's Ġ 1 2 3 4 5 Ġo 'clock , Ġx = 1 . 5 !"),
        ("default", "It ' s Ġ 123 45 Ġo ' clock , Ġx = 1 . 5 !"),
        ("dbrx", "It 's Ġ 123 45 Ġo 'clock , Ġx = 1 . 5 !"),
        ("seed-coder", "It 's Ġ 1 2 3 4 5 Ġo 'clock , Ġx = 1 . 5 !"),
        ("gpt-4o", "It's Ġ 123 45 Ġo 'clock , Ġx = 1 . 5 !"),
        ("tekken", "It 's Ġ 1 2 3 4 5 Ġo 'clock , Ġx = 1 . 5 !"),
        ("deepseek-v3", "It 's Ġ 123 45 Ġo 'clock , Ġx = 1 . 5 !"),
    ],
)
def test_text_is_cut_as_the_named_pre_tokenizer_cuts_it(pre, expected):
    assert pieces(pre, TEXT) == expected.split(" ")


@pytest.mark.parametrize(
    ("names", "base"),
    [
        ("phi-2 mellum modern-bert exaone4 jina-v2-de gigachat olmo", "gpt-2"),
        ("refact starcoder", "smollm"),
        ("glm4 chatglm-bpe smaug-bpe", "dbrx"),
        ("llama4", "gpt-4o"),
        ("hunyuan-dense", "deepseek-v3"),
        ("qwen35 hunyuan", "qwen2"),
        ("llama3 llama-v3 falcon3 pixtral lfm2 midm-2.0", "llama-bpe"),
        ("deepseek-r1-qwen megrez kormo", "qwen2"),
    ],
)
def test_other_names_of_the_same_rules_give_the_same_tokens(names, base):
    text = "I'LL pay 12345"
    of_base = build_tokenizer(gpt2_fields(base), file="x.gguf").encode_prompt(text)
    for name in names.split():
        tokenizer = build_tokenizer(gpt2_fields(name), file="x.gguf")
        assert tokenizer.encode_prompt(text) == of_base, name
        assert pieces(name, TEXT) == pieces(base, TEXT), name


def test_a_file_that_does_not_name_its_rules_is_told(caplog):
    fields = gpt2_fields("smollm")
    build_tokenizer(fields, file="x.gguf")
    assert not caplog.messages
    del fields["tokenizer.ggml.pre"]
    build_tokenizer(fields, file="x.gguf")
    (message,) = caplog.messages
    assert "x.gguf names no pre-tokenizer (tokenizer.ggml.pre)" in message


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        # Line ends follow signs in all but one.
        ("dbrx", "a!\n\nb", "a !ĊĊ b"),
        ("seed-coder", "a!\n\nb", "a ! ĊĊ b"),
        ("gpt-4o", "a!\n/b", "a !Ċ/ b"),
        # A capital letter begins a word.
        ("gpt-4o", "camelCaseHTML", "camel Case HTML"),
        ("tekken", "camelCaseHTML", "camel Case HTML"),
        ("dbrx", "camelCaseHTML", "camelCaseHTML"),
        # A combining mark (here U+0301) belongs to the letter before it.
        ("qwen2", "e\u0301a", "e Ìģa"),
        ("qwen35", "e\u0301a", "eÌģa"),
        # Chinese and other letters are cut apart.
        ("deepseek-v3", "一a", "ä¸Ģ a"),
        ("qwen2", "一a", "ä¸Ģa"),
        ("deepseek-v3", "a.b", "a .b"),
    ],
)
def test_rules_that_differ_cut_differently(pre, text, expected):
    assert pieces(pre, text) == expected.split(" ")


@given(st.text(max_size=20))
def test_smollm_cuts_as_the_tokenizer_of_hugging_face(text):
    from tokenizers import pre_tokenizers

    theirs = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert pieces("smollm", text) == [
        piece for piece, _ in theirs.pre_tokenize_str(text)
    ]


def test_merges_apply_within_pieces_only():
    fields = gpt2_fields("smollm", merges=[("1", "2"), ("a", "b")])
    tokenizer = build_tokenizer(fields, file="x.gguf")
    ab = fields["tokenizer.ggml.tokens"].index("ab")
    assert tokenizer.encode_prompt("ab12") == [ab, BYTES["1"], BYTES["2"]]
    assert tokenizer.decode([ab, BYTES["Ġ"], BYTES["1"], 2]) == "ab 1"


def test_special_tokens_are_whole_and_left_out_of_text():
    tokenizer = build_tokenizer(gpt2_fields("smollm"), file="x.gguf")
    assert tokenizer.encode_prompt("</s>a") == [2, BYTES["a"]]
    assert tokenizer.decode([1, BYTES["a"], 2]) == "a"


@pytest.mark.parametrize(
    ("pre", "extra", "expected"),
    [
        ("smollm", {}, []),
        ("llama-bpe", {}, [1]),  # llama.cpp adds it where the file does not say
        ("llama-bpe", {"add_bos_token": False}, []),
        ("smollm", {"add_bos_token": True}, [1]),
    ],
)
def test_the_first_token_is_added_as_the_file_says(pre, extra, expected):
    tokenizer = build_tokenizer(gpt2_fields(pre, **extra), file="x.gguf")
    assert tokenizer.encode_prompt("a") == [*expected, BYTES["a"]]


def test_an_end_that_the_file_adds_to_texts_is_not_put_behind_prompts():
    fields = gpt2_fields("llama-bpe", add_eos_token=True)
    tokenizer = build_tokenizer(fields, file="x.gguf")
    assert tokenizer._fast.encode("a") == [1, BYTES["a"], 2]
    assert tokenizer.encode_prompt("a") == [1, BYTES["a"]]
    assert tokenizer.encode_prompt("a</s>") == [1, BYTES["a"], 2]  # it was asked for


def test_stop_ids_include_ends_of_turns():
    fields = {
        "tokenizer.ggml.tokens": ["a", "<|im_end|>", "</s>", "<|eot_id|>"],
        "tokenizer.ggml.token_type": [1, 3, 3, 1],  # the last is ordinary text
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2,
    }
    assert stop_ids(fields) == (2, 1)


def test_stop_ids_include_the_end_of_a_text_beside_that_of_a_turn():
    # A file of Qwen names the end of a turn alone.
    fields = {
        "tokenizer.ggml.tokens": ["a", "<|endoftext|>", "<|im_end|>", "<|eom_id|>"],
        "tokenizer.ggml.token_type": [1, 3, 3, 3],
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert stop_ids(fields) == (2, 3, 1)


def test_an_end_of_turn_of_a_users_type_ends_texts_and_is_left_out_of_them():
    fields = gpt2_fields("gpt-2")
    fields["tokenizer.ggml.tokens"].append("<end_of_turn>")
    fields["tokenizer.ggml.token_type"].append(4)
    end = len(fields["tokenizer.ggml.tokens"]) - 1
    assert stop_ids(fields) == (2, end)
    tokenizer = build_tokenizer(fields, file="x.gguf")
    assert tokenizer.decode([*tokenizer.encode_prompt("a"), end]) == "a"


# Scores rank unions: "ab" before "bc" before "abc".
PIECES = {"▁": -9, "a": -9, "b": -9, "c": -9, "ab": -1, "bc": -2, "▁ab": -3, "abc": -4}
SPM_TOKENS = ["<unk>", "<s>", "</s>", "<0x0A>", *PIECES]
SPM_FIELDS = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": SPM_TOKENS,
    "tokenizer.ggml.scores": [0.0] * 4 + [float(score) for score in PIECES.values()],
    "tokenizer.ggml.token_type": [2, 3, 3, 6] + [1] * len(PIECES),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # "▁abc": "ab" is joined first, then "▁ab"; "c" is left.
        ("abc", ["<s>", "▁ab", "c"]),
        # "▁bca b": "bc" is the only union; after the space "▁" and "b" stay apart.
        ("bca b", ["<s>", "▁", "bc", "a", "▁", "b"]),
        # A byte without a piece of its own falls back to the byte's token.
        ("a\nab", ["<s>", "▁", "a", "<0x0A>", "ab"]),
    ],
)
def test_sentencepiece_joins_the_best_union_first(text, expected):
    tokenizer = build_tokenizer(SPM_FIELDS, file="x.gguf")
    ids = tokenizer.encode_prompt(text)
    assert [SPM_TOKENS[index] for index in ids] == expected
    assert tokenizer.decode(ids) == text


def sentencepiece_of_the_book(text, pieces, own):
    """SentencePiece as its paper tells it: the best union of two neighbors, again.

    Own symbols are cut out first, the longest at each place.
    """
    found, rest = [], text.replace(" ", "▁")
    while rest:
        mark = next((o for o in own if rest.startswith(o)), None)
        found.append(mark or rest[0])
        rest = rest.removeprefix(found[-1])
    while True:
        unions = [
            (-pieces[left + right], place)
            for place, (left, right) in enumerate(zip(found, found[1:], strict=False))
            if left + right in pieces and not {left, right} & set(own)
        ]
        if not unions:
            return found
        place = min(unions)[1]
        found[place : place + 2] = ["".join(found[place : place + 2])]


GEMMA_PIECES = {"▁": -9, "a": -8, "b": -7, "ab": -3, "▁a": -2, "ba": -4, "aba": -5}
GEMMA_PIECES |= {"▁b": -6}
OWN = ["\n\n", "\n", "  ", "<b>"]  # the longest first
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<start>", *OWN, *GEMMA_PIECES]


@given(st.lists(st.sampled_from([" ", "a", "b", "\n", "<b>"]), max_size=12))
def test_gemma_is_cut_as_sentencepiece_cuts_it(parts):
    """No space before the first word, and runs of spaces that are tokens."""
    count = len(GEMMA_PIECES)
    fields = SPM_FIELDS | {
        "general.architecture": "gemma3",
        "tokenizer.ggml.tokens": GEMMA_TOKENS,
        "tokenizer.ggml.token_type": [3] * 4 + [4] * 4 + [1] * count,
        "tokenizer.ggml.scores": [-1000.0] * 8
        + [float(s) for s in GEMMA_PIECES.values()],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = build_tokenizer(fields, file="x.gguf")
    text = "".join(parts)
    own = [mark.replace(" ", "▁") for mark in OWN]
    expected = sentencepiece_of_the_book(text, GEMMA_PIECES, own)
    ids = tokenizer.encode_prompt(text)
    found = [GEMMA_TOKENS[index].replace(" ", "▁") for index in ids]
    assert found == ["<bos>", *expected]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tokenizer.ggml.pre": "viking"}, "pre-tokenizer 'viking'"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer of kind 't5'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer with no .*scores"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer with 1 .*token_type for 98"),
        ({"tokenizer.ggml.eos_token_id": 98}, "tokenizer with eos_token_id 98 of 98"),
        ({"tokenizer.ggml.padding_token_id": 2**32 - 1}, "tokenizer with padding_tok"),
        (
            {
                "tokenizer.ggml.tokens": ["a", "b", "a"],
                "tokenizer.ggml.token_type": [1] * 3,
            },
            "tokenizer with a token that has two ids",
        ),
    ],
)
@pytest.mark.parametrize("read", [build_tokenizer, check_tokenizer])
def test_other_tokenizers_are_refused_with_the_way_out(changes, problem, read):
    fields = gpt2_fields("smollm") | changes
    with pytest.raises(ValueError, match=f"x.gguf: {problem}.*tokenizer.json"):
        read(fields, file="x.gguf")


@pytest.mark.parametrize("merge", ["ab", "a b", " b", "a "])
def test_merges_of_no_tokens_are_refused(merge):
    fields = gpt2_fields("smollm") | {"tokenizer.ggml.merges": [merge]}
    with pytest.raises(ValueError, match="x.gguf: tokenizer whose merges fail"):
        build_tokenizer(fields, file="x.gguf")


def test_a_file_without_tokenizer_is_refused():
    with pytest.raises(ValueError, match="x.gguf has no tokenizer"):
        build_tokenizer({"general.architecture": "llama"}, file="x.gguf")


def test_hugging_face_files_beside_the_gguf_file_stand_in(tmp_path, untied, tools):
    fields = {"tokenizer.ggml.pre": "viking"}
    path = tools.write_gguf(tmp_path / "m.gguf", untied, fields=fields)
    with pytest.raises(ValueError, match="pre-tokenizer 'viking'"):
        load_pretrained(path)
    with pytest.raises(ValueError, match="pre-tokenizer 'viking'"):
        read_model_config(path)
    tools.make_fast().save_pretrained(tmp_path)
    read_model_config(path)
    tokenizer = load_pretrained(path).tokenizer
    assert tokenizer.encode_prompt("the") == untied.tokenizer.encode_prompt("the")
