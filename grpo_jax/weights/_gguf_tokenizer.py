"""Builds the tokenizer that a GGUF file describes in its fields.

Byte-level BPE ("gpt2") needs a pre-tokenizer, and a file stores only its name.
SentencePiece BPE ("llama") is built from pieces and scores.
"""

import logging
from collections.abc import Mapping
from typing import Any

from grpo_jax.weights._gguf_pre_tokenizers import RULES
from grpo_jax.weights.tokenizer import Tokenizer, import_fast_tokenizer

# Token types of the format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_PREFIX = "tokenizer.ggml."
# Kinds of tokenizers, and the fields that each needs.
_NEEDS = {"gpt2": ("merges",), "llama": ("scores", "token_type")}

# Tokens whose ids a file may state.
_NAMED = ("bos", "eos", "eot", "eom", "unknown", "padding")
# Tokens that end a text or a turn. A file names one of them; some models use several.
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)

_LOG = logging.getLogger(__name__)


def build_tokenizer(fields: Mapping[str, Any], *, file: str) -> Tokenizer:
    """Returns the tokenizer of a GGUF file's `tokenizer.*` fields.

    Raises:
        ValueError: the file has no tokenizer, or one of a kind that is not supported.
    """
    from tokenizers.processors import TemplateProcessing

    check_tokenizer(fields, file=file)
    own = _tokenizer_fields(fields)
    tokens = own["tokens"]
    ids = {name: own.get(f"{name}_token_id") for name in _NAMED}
    text = {name: tokens[index] for name, index in ids.items() if index is not None}
    if own["model"] == "gpt2":
        backend, adds_bos = _byte_level_bpe(own, file=file)
    else:
        backend, adds_bos = _sentencepiece_bpe(own, text.get("unknown")), True
    _add_tokens(backend, own)
    bos, eos = text.get("bos"), text.get("eos")
    start = [bos] if bos and own.get("add_bos_token", adds_bos) else []
    end = [eos] if eos and own.get("add_eos_token", False) else []
    if start or end:
        backend.post_processor = TemplateProcessing(
            single=[*start, "$A", *end],
            special_tokens=[(t, tokens.index(t)) for t in {*start, *end}],
        )
    fast = import_fast_tokenizer()(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=text.get("unknown"),
        pad_token=text.get("padding"),
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
    return Tokenizer(fast, stop_ids=stop_ids(fields))


def check_tokenizer(fields: Mapping[str, Any], *, file: str) -> None:
    """Checks that `build_tokenizer` can build the tokenizer, without building it.

    Raises:
        ValueError: the file has no tokenizer, or one of a kind that is not supported.
    """
    own = _tokenizer_fields(fields)
    kind, pre, tokens = own.get("model"), own.get("pre", "default"), own.get("tokens")
    if not tokens:
        raise ValueError(f"{file} has no tokenizer")
    if kind not in _NEEDS:
        raise _unsupported(f"tokenizer of kind {kind!r}", file=file)
    if kind == "gpt2" and pre not in RULES:
        raise _unsupported(
            f"pre-tokenizer {pre!r}; supported are {sorted(RULES)}", file=file
        )
    problems = [
        *(f"no {_PREFIX}{name}" for name in _NEEDS[kind] if name not in own),
        *(
            f"{len(own[key])} {_PREFIX}{key} for {len(tokens)} tokens"
            for key in ("token_type", "scores")
            if len(own.get(key, tokens)) != len(tokens)
        ),
        *(
            f"{key} {own[key]} of {len(tokens)} tokens"
            for key in (f"{name}_token_id" for name in _NAMED)
            if not 0 <= own.get(key, 0) < len(tokens)
        ),
    ]
    if len(set(tokens)) != len(tokens):
        problems.append("a token that has two ids")
    if problems:
        raise _unsupported(f"tokenizer with {'; '.join(problems)}", file=file)


def names_pre_tokenizer(fields: Mapping[str, Any]) -> bool:
    """Returns whether the file says how to split text; only byte-level BPE needs it."""
    own = _tokenizer_fields(fields)
    return own.get("model") != "gpt2" or "pre" in own


def stop_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the ids that end a sequence, a turn or a message, without repeats.

    These are the ids that the file names (`eos`, `eot`, `eom`), and control tokens with
    a text that is known as an end.
    """
    own = _tokenizer_fields(fields)
    control = {t: i for i, (t, k) in enumerate(_token_kinds(own)) if k == _CONTROL}
    named = [own.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = dict.fromkeys([*named, *(control.get(token) for token in _ENDS)])
    return tuple(index for index in ids if index is not None)


def _tokenizer_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the tokenizer, without their common prefix."""
    return {
        key.removeprefix(_PREFIX): value
        for key, value in fields.items()
        if key.startswith(_PREFIX)
    }


def _token_kinds(own: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Returns each token with its type; a known end is a control token.

    Some files of Gemma give `<end_of_turn>` the type that it has in SentencePiece.
    llama.cpp makes it a control token, too.
    """
    tokens = own.get("tokens", ())
    kinds = own.get("token_type", [_NORMAL] * len(tokens))
    return [
        (token, _CONTROL if kind == _USER_DEFINED and token in _ENDS else kind)
        for token, kind in zip(tokens, kinds, strict=False)
    ]


def _unsupported(what: str, *, file: str) -> ValueError:
    """Returns the error for a tokenizer that the file alone does not define."""
    return ValueError(
        f"{file}: {what} is not supported. Put the model's Hugging Face tokenizer.json "
        "and tokenizer_config.json into the folder of the GGUF file; they are used "
        "instead"
    )


def _add_tokens(backend: Any, own: Mapping[str, Any]) -> None:
    """Adds the tokens that no merge makes, in few calls: each call sorts them all."""
    from tokenizers import AddedToken

    kinds = _token_kinds(own)
    special = [t for kind in (_UNKNOWN, _CONTROL) for t, k in kinds if k == kind]
    backend.add_special_tokens([AddedToken(t, special=True) for t in special])
    # In normalized text a token of two spaces is "▁▁". But where normalization puts a
    # space before the text, it would also put one before the token.
    spaced = own["model"] == "llama" and not own.get("add_space_prefix", True)
    backend.add_tokens(
        [AddedToken(t, normalized=spaced) for t, k in kinds if k == _USER_DEFINED]
    )


def _byte_level_bpe(own: Mapping[str, Any], *, file: str) -> tuple[Any, bool]:
    """The backend, and whether a text begins with `bos` by default."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    if "pre" not in own:
        _LOG.warning(
            "%s names no pre-tokenizer (tokenizer.ggml.pre). Text is split by default "
            "rules, which differ from those of the model's training. Convert the model "
            "again, or put its tokenizer.json and tokenizer_config.json beside it",
            file,
        )
    rules = RULES[own.get("pre", "default")]
    vocabulary = {token: index for index, token in enumerate(own["tokens"])}
    merges = [tuple(merge.partition(" ")[::2]) for merge in own["merges"]]
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=rules.ignore_merges)
    except Exception as error:
        # The Rust library raises bare Exception.
        raise _unsupported(
            f"tokenizer whose merges fail ({error})", file=file
        ) from error
    backend = Backend(model)
    if rules.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(s), "isolated") for s in rules.splits]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    backend.decoder = decoders.ByteLevel()
    return backend, rules.adds_bos


def _sentencepiece_bpe(own: Mapping[str, Any], unknown: str | None) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    vocabulary = {token: index for index, token in enumerate(own["tokens"])}
    pieces = {
        token: score
        for token, score, kind in zip(
            own["tokens"], own["scores"], own["token_type"], strict=True
        )
        if kind in (_NORMAL, _USER_DEFINED)
    }
    # SentencePiece joins the two neighbors whose union has the highest score. Ranked
    # merges do the same when every split of a piece has the piece's rank.
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(pieces, key=lambda token: -pieces[token])
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    backend = Backend(
        models.BPE(
            vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    prefixed = own.get("add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if prefixed else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
