"""The tokenizer that a GGUF file describes in its fields.

Byte-level BPE ("gpt2") needs a pre-tokenizer, which a file only names; the patterns are
those that llama.cpp uses under the name (src/llama-vocab.cpp). SentencePiece BPE
("llama") is built from pieces and scores.
"""

from collections.abc import Mapping
from typing import Any

from grpo_jax.weights.tokenizer import Tokenizer, import_fast_tokenizer

# Token types of the format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_GPT2_SPLITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
)
# {} is how many digits stay together.
_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLITS = (_TIKTOKEN.format("{1,3}"),)
_SPLITS = {
    "gpt-2": _GPT2_SPLITS,
    "smollm": (r"\p{N}", *_GPT2_SPLITS),
    "llama-bpe": _LLAMA3_SPLITS,
    "llama3": _LLAMA3_SPLITS,
    "llama-v3": _LLAMA3_SPLITS,
    "qwen2": (_TIKTOKEN.format(""),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2_SPLITS, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
# Tokens that end a turn, which some files do not list among their ends.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def build_tokenizer(fields: Mapping[str, Any], *, file: str) -> Tokenizer:
    """The tokenizer of a GGUF file's `tokenizer.*` fields.

    Raises:
        ValueError: no tokenizer in the file, or one of a kind that is not supported.
    """
    kind = fields.get("tokenizer.ggml.model")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError(f"{file} holds no tokenizer")
    if kind == "gpt2":
        pre = fields.get("tokenizer.ggml.pre", "default")
        if pre not in _SPLITS:
            raise unsupported(
                f"pre-tokenizer {pre!r}; supported are {sorted(_SPLITS)}", file=file
            )
        backend = _byte_level_bpe(fields, pre)
        adds_bos = pre in _LLAMA3
    elif kind == "llama" and fields["general.architecture"] == "llama":
        backend = _sentencepiece_bpe(fields)
        adds_bos = True
    else:
        raise unsupported(f"tokenizer of kind {kind!r}", file=file)
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


def stop_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a sequence, a turn or a message, without repeats."""
    named = (
        fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")
    )
    control = {
        token: index
        for index, (token, kind) in enumerate(
            zip(
                fields.get("tokenizer.ggml.tokens", ()),
                fields.get("tokenizer.ggml.token_type", ()),
                strict=False,
            )
        )
        if kind == _CONTROL
    }
    ids = dict.fromkeys([*named, *(control.get(token) for token in _TURN_ENDS)])
    return tuple(index for index in ids if index is not None)


def unsupported(what: str, *, file: str) -> ValueError:
    """The error for a tokenizer that cannot be rebuilt from the file alone."""
    return ValueError(
        f"{file}: {what} is not supported. Put the model's Hugging Face tokenizer.json "
        "and tokenizer_config.json into the folder of the GGUF file, which are then "
        "used instead"
    )


def _byte_level_bpe(fields: Mapping[str, Any], pre: str) -> Any:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Backend(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre in _LLAMA3,
        )
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(s), "isolated") for s in _SPLITS[pre]]
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
    prefixed = fields.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if prefixed else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


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

    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_UNKNOWN, _CONTROL):
            backend.add_special_tokens([AddedToken(token, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])


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
