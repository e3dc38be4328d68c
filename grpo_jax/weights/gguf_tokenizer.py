"""The tokenizer that a GGUF file describes in its fields.

Byte-level BPE ("gpt2") needs a pre-tokenizer, which a file only names; the patterns are
those that llama.cpp uses under the name (src/llama-vocab.cpp). SentencePiece BPE
("llama") is built from pieces and scores.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from grpo_jax.weights.tokenizer import Tokenizer, import_fast_tokenizer

# Token types of the format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_PRE = "tokenizer.ggml.pre"
# Kinds of tokenizers, and the fields without which none can be built.
_NEEDS = {"gpt2": ("merges",), "llama": ("scores", "token_type")}

_GPT2_SPLITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
)
# {} is how many digits stay together.
_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PreTokenizer:
    """How text is cut before merges apply, and what else goes with the name."""

    splits: tuple[str, ...]
    names: str  # all that llama.cpp knows for these rules
    whole_first: bool = False  # a piece that is a token is not merged anew
    adds_bos: bool = False  # where the file does not say
    composes: bool = False  # to NFC, as the tokenizers of Hugging Face do


_PRE_TOKENIZERS = (
    _PreTokenizer(
        names="gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 "
        "mellum modern-bert exaone4",
        splits=_GPT2_SPLITS,
    ),
    _PreTokenizer(names="smollm", splits=(r"\p{N}", *_GPT2_SPLITS)),
    _PreTokenizer(
        names="llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 "
        "jina-v5-nano",
        splits=(_TIKTOKEN.format("{1,3}"),),
        whole_first=True,
        adds_bos=True,
    ),
    _PreTokenizer(
        names="qwen2 deepseek-r1-qwen megrez kormo f2llmv2",
        splits=(_TIKTOKEN.format(""),),
        composes=True,
    ),
    _PreTokenizer(
        names="default",
        splits=(
            r"[\p{P}\$\+<=>\^~\|]+",
            *_GPT2_SPLITS,
            r"\p{N}+",
            "[0-9][0-9][0-9]",
        ),
    ),
)
_BY_NAME = {name: rules for rules in _PRE_TOKENIZERS for name in rules.names.split()}
# Tokens that end a text or a turn. A file names one, and some models end in several.
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)

_LOG = logging.getLogger(__name__)


def build_tokenizer(fields: Mapping[str, Any], *, file: str) -> Tokenizer:
    """The tokenizer of a GGUF file's `tokenizer.*` fields.

    Raises:
        ValueError: no tokenizer in the file, or one of a kind that is not supported.
    """
    check_tokenizer(fields, file=file)
    if fields["tokenizer.ggml.model"] == "gpt2":
        if not names_its_rules(fields):
            _LOG.warning(
                "%s names no pre-tokenizer (tokenizer.ggml.pre): text is cut by "
                "default rules, which are not those that the model was trained with. "
                "Convert the model anew, or put its tokenizer.json and "
                "tokenizer_config.json beside the file",
                file,
            )
        rules = _BY_NAME[fields.get(_PRE, "default")]
        backend, adds_bos = _byte_level_bpe(fields, rules, file=file), rules.adds_bos
    else:
        backend, adds_bos = _sentencepiece_bpe(fields), True
    _add_special_tokens(backend, fields)
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", adds_bos)
    adds_eos = fields.get("tokenizer.ggml.add_eos_token", False)
    _add_ends(backend, fields, adds_bos=adds_bos, adds_eos=adds_eos)
    fast = import_fast_tokenizer()(
        tokenizer_object=backend,
        bos_token=_token(fields, "bos"),
        eos_token=_token(fields, "eos"),
        unk_token=_token(fields, "unknown"),
        pad_token=_token(fields, "padding"),
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
    return Tokenizer(fast, stop_ids=stop_ids(fields))


def check_tokenizer(fields: Mapping[str, Any], *, file: str) -> None:
    """Checks that `build_tokenizer` can rebuild the tokenizer, without doing it.

    Raises:
        ValueError: no tokenizer in the file, or one of a kind that is not supported.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get(_PRE, "default")
    if not fields.get("tokenizer.ggml.tokens"):
        raise ValueError(f"{file} holds no tokenizer")
    if kind not in _NEEDS:
        raise _unsupported(f"tokenizer of kind {kind!r}", file=file)
    if kind == "gpt2" and pre not in _BY_NAME:
        raise _unsupported(
            f"pre-tokenizer {pre!r}; supported are {sorted(_BY_NAME)}", file=file
        )
    missing = [name for name in _NEEDS[kind] if f"tokenizer.ggml.{name}" not in fields]
    if missing:
        raise _unsupported(f"tokenizer without {' and '.join(missing)}", file=file)
    _check_counts(fields, file=file)


def _check_counts(fields: Mapping[str, Any], *, file: str) -> None:
    tokens = fields["tokenizer.ggml.tokens"]
    problems = [
        f"{len(fields[key])} {key} for {len(tokens)} tokens"
        for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores")
        if len(fields.get(key, tokens)) != len(tokens)
    ]
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        index = _token_id(fields, name)
        if index is not None and not 0 <= index < len(tokens):
            problems.append(f"{name}_token_id {index} of {len(tokens)} tokens")
    if len(set(tokens)) != len(tokens):
        problems.append("a token that has two ids")
    if problems:
        raise _unsupported(f"tokenizer with {'; '.join(problems)}", file=file)


def names_its_rules(fields: Mapping[str, Any]) -> bool:
    """Whether the file says how text is cut; byte-level BPE needs it."""
    return fields.get("tokenizer.ggml.model") != "gpt2" or _PRE in fields


def stop_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a sequence, a turn or a message, without repeats.

    They are those that the file names (`eos`, `eot`, `eom`), and the control tokens
    that are known as ends by their text.
    """
    named = (
        fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")
    )
    control = {
        token: index
        for index, (token, kind) in enumerate(_kinds(fields))
        if kind == _CONTROL
    }
    ids = dict.fromkeys([*named, *(control.get(token) for token in _ENDS)])
    return tuple(index for index in ids if index is not None)


def _kinds(fields: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Each token with its type; a known end is of control, as llama.cpp takes it.

    Some files of Gemma give `<end_of_turn>` the type that it has in SentencePiece.
    """
    tokens = fields.get("tokenizer.ggml.tokens", ())
    kinds = fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    return [
        (token, _CONTROL if kind == _USER_DEFINED and token in _ENDS else kind)
        for token, kind in zip(tokens, kinds, strict=False)
    ]


def _unsupported(what: str, *, file: str) -> ValueError:
    """The error for a tokenizer that cannot be rebuilt from the file alone."""
    return ValueError(
        f"{file}: {what} is not supported. Put the model's Hugging Face tokenizer.json "
        "and tokenizer_config.json into the folder of the GGUF file, which are then "
        "used instead"
    )


def _byte_level_bpe(
    fields: Mapping[str, Any], rules: _PreTokenizer, *, file: str
) -> Any:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [
        (left, right)
        for left, _, right in (
            m.partition(" ") for m in fields["tokenizer.ggml.merges"]
        )
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=rules.whole_first)
    except Exception as error:
        # The Rust library raises bare Exception.
        raise _unsupported(
            f"tokenizer whose merges fail ({error})", file=file
        ) from error
    backend = Backend(model)
    if rules.composes:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(s), "isolated") for s in rules.splits]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(fields: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    backend = Backend(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges(tokens, kinds, fields["tokenizer.ggml.scores"]),
            unk_token=_token(fields, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = _prefixed(fields)
    prefix = [normalizers.Prepend("▁")] if prefixed else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _prefixed(fields: Mapping[str, Any]) -> bool:
    """Whether a space is put before the first word."""
    return fields.get("tokenizer.ggml.add_space_prefix", True)


def _merges(
    tokens: list[str], kinds: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """The merges that make each piece from two others, best score first.

    SentencePiece joins the two neighbors whose union has the highest score; ranked
    merges do the same when every split of a piece has the piece's rank.
    """
    pieces = {
        token: index
        for index, token in enumerate(tokens)
        if kinds[index] in (_NORMAL, _USER_DEFINED)
    }
    ranked = sorted(pieces, key=lambda token: -scores[pieces[token]])
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]


def _add_special_tokens(backend: Any, fields: Mapping[str, Any]) -> None:
    from tokenizers import AddedToken

    # A run of spaces that is a token is "▁▁" in normalized text. A prefix would be put
    # before the token too.
    spaced = fields["tokenizer.ggml.model"] == "llama" and not _prefixed(fields)
    added = {_UNKNOWN: [], _CONTROL: [], _USER_DEFINED: []}
    for token, kind in _kinds(fields):
        if kind in added:
            added[kind].append(token)
    # All at once: each call sorts all that were added before.
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in added[_UNKNOWN] + added[_CONTROL]]
    )
    backend.add_tokens([AddedToken(t, normalized=spaced) for t in added[_USER_DEFINED]])


def _add_ends(
    backend: Any, fields: Mapping[str, Any], *, adds_bos: bool, adds_eos: bool
) -> None:
    from tokenizers.processors import TemplateProcessing

    bos, eos = _token(fields, "bos"), _token(fields, "eos")
    start = [bos] if adds_bos and bos else []
    end = [eos] if adds_eos and eos else []
    if start or end:
        ids = {bos: _token_id(fields, "bos"), eos: _token_id(fields, "eos")}
        backend.post_processor = TemplateProcessing(
            single=[*start, "$A", *end],
            special_tokens=[(token, ids[token]) for token in {*start, *end}],
        )


def _token_id(fields: Mapping[str, Any], name: str) -> int | None:
    return fields.get(f"tokenizer.ggml.{name}_token_id")


def _token(fields: Mapping[str, Any], name: str) -> str | None:
    index = _token_id(fields, name)
    return None if index is None else fields["tokenizer.ggml.tokens"][index]
