"""How byte-level BPE cuts text before merges apply, by the name in a GGUF file.

The names are those of llama.cpp (src/llama-vocab.cpp). The patterns are those of the
`tokenizer.json` that each name stands for, which llama.cpp quotes beside its own.
"""

import dataclasses
from collections.abc import Mapping

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _tiktoken(*, digits: str, marks: str = "", ends: str = r"[\r\n]*") -> str:
    """The pattern of OpenAI's cl100k, of which most others are variants.

    `digits` is how many stay together, `marks` belong to words, and `ends` may follow
    signs.
    """
    return (
        rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}{marks}]+|\p{{N}}{digits}"
        rf"| ?[^\s\p{{L}}{marks}\p{{N}}]+{ends}|{_SPACES}"
    )


def _cased(*, digits: str, english: str) -> str:
    """The pattern of OpenAI's o200k, which cuts before a capital letter."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{upper}*{lower}+{english}|{before}{upper}+{lower}*{english}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


# DeepSeek 3: numbers, then Chinese and Japanese, then the rest.
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PreTokenizer:
    """How text is split before merges apply, and what else follows from the name."""

    names: str  # all names of these rules in llama.cpp
    splits: tuple[str, ...]
    ignore_merges: bool = False  # for a piece that is a token
    adds_bos: bool = False  # unless the file says otherwise
    nfc: bool = False  # normalize to NFC, as the tokenizers of Hugging Face do


_PRE_TOKENIZERS = (
    _PreTokenizer(
        names="gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 "
        "mellum modern-bert exaone4 olmo mpt jais trillion granite-docling",
        splits=(_GPT2,),
    ),
    _PreTokenizer(
        names="smollm starcoder refact codeshell minerva-7b mellum2",
        splits=(r"\p{N}", _GPT2),
    ),
    _PreTokenizer(
        names="llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 "
        "jina-v5-nano",
        splits=(_tiktoken(digits="{1,3}"),),
        ignore_merges=True,
        adds_bos=True,
    ),
    _PreTokenizer(
        names="dbrx smaug-bpe glm4 chatglm-bpe", splits=(_tiktoken(digits="{1,3}"),)
    ),
    _PreTokenizer(
        names="qwen2 deepseek-r1-qwen megrez kormo f2llmv2",
        splits=(_tiktoken(digits=""),),
        nfc=True,
    ),
    _PreTokenizer(
        names="qwen35",
        splits=(_tiktoken(digits="", marks=r"\p{M}"),),
        nfc=True,
    ),
    _PreTokenizer(
        names="stablelm2 hunyuan solar-open grok-2", splits=(_tiktoken(digits=""),)
    ),
    _PreTokenizer(
        names="seed-coder",
        splits=(_tiktoken(digits="", ends=""),),
    ),
    _PreTokenizer(
        names="gpt-4o llama4 kanana2 talkie minimax-m2",
        splits=(_cased(digits="{1,3}", english=f"{_ENGLISH}?"),),
    ),
    _PreTokenizer(
        names="tekken",
        splits=(_cased(digits="", english=""),),
        ignore_merges=True,
        adds_bos=True,
    ),
    _PreTokenizer(names="deepseek-v3 hunyuan-dense joyai-llm", splits=_DEEPSEEK),
    _PreTokenizer(
        names="default",
        splits=(
            r"[\p{P}\$\+<=>\^~\|]+",
            _GPT2,
            r"\p{N}+",
            "[0-9][0-9][0-9]",
        ),
    ),
)
RULES: Mapping[str, _PreTokenizer] = {
    name: rules for rules in _PRE_TOKENIZERS for name in rules.names.split()
}
