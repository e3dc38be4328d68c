"""Tiny models, a tiny tokenizer, GGUF files, and the references of transformers."""

import copy
import functools
import json
import pathlib
import string

import jax
import numpy as np
import pytest
from flax import traverse_util

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.weights import Pretrained, Tokenizer
from grpo_jax.weights._names import parameter_table, parameter_tensors
from grpo_jax.weights.tokenizer import import_fast_tokenizer

REFERENCES = pathlib.Path(__file__).parents[1] / "models" / "references"

TOKENS = ["<s>", "</s>", "<|im_end|>", *string.ascii_lowercase, *string.digits, "Ġ"]
TOKENS += ["th", "the", "12"]  # 43 of 48 ids
MERGES = [("t", "h"), ("th", "e"), ("1", "2")]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}"
    "</s>{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)
HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
    "pad_token_id": 1,
}


def make_fast(*, template=TEMPLATE):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(TOKENS)}
    backend = Backend(models.BPE(vocab=vocab, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return import_fast_tokenizer()(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def random_params(config, *, dtype=np.float32):
    """Parameters of which none is trivially 0 or 1."""
    random = np.random.default_rng(0)
    model = Decoder(config)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    draw = lambda leaf: (0.3 * random.standard_normal(leaf.shape)).astype(dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


def make_pretrained(*, dtype=np.float32, **options):
    config = ModelConfig.from_hf({**HF, **options})
    params = jax.tree.map(jax.numpy.asarray, random_params(config, dtype=dtype))
    tokenizer = Tokenizer(make_fast(), stop_ids=[1, 2])
    return Pretrained(Decoder(config), params, tokenizer, config)


def flatten(params):
    return traverse_util.flatten_dict(params, sep="/")


def assert_same_bits(given, expected):
    given, expected = flatten(given), flatten(expected)
    assert given.keys() == expected.keys()
    for path, values in expected.items():
        assert given[path].dtype == values.dtype, path
        assert np.asarray(given[path]).tobytes() == np.asarray(values).tobytes(), path


def make_logits(pretrained):
    model, tokens = pretrained.model, np.arange(40, dtype=np.int32).reshape(2, 20)

    def logits(params):
        variables, lengths = {"params": params}, np.array([20, 20])
        hidden = model.apply(variables, tokens, lengths, method=model.forward)
        return hidden @ model.apply(variables, method=model.head)

    return jax.jit(logits)(pretrained.params)


def gguf_pair_rows(values, heads):
    """Rows of a head from (first or second, pair) to (pair, first or second)."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(values.shape)


def gguf_fields(config, arch):
    fields = {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{arch}.rope.freq_base": config.rope[0].theta,
    }
    return fields | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(path, pretrained, *, arch="llama", kind=lambda name: "F32", **extra):
    """A GGUF file as llama.cpp's converter makes it; `extra` adds fields and tensors.

    With `per_part` it is several files of so many tensors; `path` names none of them.
    """
    import gguf

    config = pretrained.config
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=extra.pop("per_part", 0))
    fields = gguf_fields(config, arch) | extra.pop("fields", {})
    for key, value in fields.items():
        add_field(writer, key, value)
    names = {
        name: gguf_name
        for row in parameter_table(config)
        for name, gguf_name in zip(row.names, row.gguf_names, strict=True)
    }
    joined = {}
    for name, values in parameter_tensors(config, pretrained.params):
        paired = arch in ("llama", "granite", "smollm3")
        if paired and ("q_proj" in name or "k_proj" in name):
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            values = gguf_pair_rows(values, heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        quantization = gguf.GGMLQuantizationType[kind(name)]
        raw = gguf.quantize(values, quantization)
        module, joins, _ = names[name].partition("_exps.")
        if joins:  # the experts of a layer follow each other, and are one tensor
            own = joined.setdefault(module, [])
            own.append(raw)
            if len(own) == config.experts.count:
                together = np.stack(own)
                writer.add_tensor(f"{module}_exps.weight", together, None, quantization)
            continue
        writer.add_tensor(names[name], raw, raw_dtype=quantization)
    for name, values in extra.items():
        writer.add_tensor(name.replace("__", "."), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer, key, value):
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_uint32(key, value)


def write_reference(folder, family):
    """A Hugging Face folder with the reference of a family, and what it contains."""
    import safetensors.numpy

    content = dict(np.load(REFERENCES / f"{family}.npz"))
    weights = {
        name.removeprefix("weights/"): values
        for name, values in content.items()
        if name.startswith("weights/")
    }
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(str(content["config"]))
    make_fast().save_pretrained(folder)
    return content, weights


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Templates with the structure of published ones, and each model's special tokens.
TEMPLATES = pathlib.Path(__file__).parent / "templates"
CHAT_TOKENS = {
    "<|im_start|>": "smollm2 qwen2_5 qwen3 qwen3_5",
    "<|begin_of_text|> <|eot_id|> <|eom_id|> <|start_header_id|> <|end_header_id|> "
    "<|python_tag|>": "llama3_2",
    "<bos> <end_of_turn> <start_of_turn>": "gemma3",
    "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>": (
        "deepseek_r1"
    ),
}
LEARNED = """<think>
I add the numbers.

</think>

{"name": "add", "arguments": {"a": 12, "b": -3}}<tool_call>
It is 9.\n\n\nThe sum of the numbers is 9, and 9 is what the tool said: "done".
"""


@functools.cache
def chat_fast(family):
    """A tokenizer with merges, over line ends as well, and the template of a family."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    (special,) = (t.split() for t, names in CHAT_TOKENS.items() if family in names)
    stops = ["<|im_end|>", "<|endoftext|>"] if len(special) == 1 else special[1:2]
    bos = special[0] if len(special) > 1 else None
    backend = Backend(models.BPE())
    # Line ends stay together whatever follows them, as Llama 3 and Qwen split text.
    words = r"\s*[\r\n]+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([LEARNED] * 3, trainer)
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    ends = dict.fromkeys([*special, *stops])
    backend.add_special_tokens([AddedToken(t, special=True) for t in ends])
    return import_fast_tokenizer()(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=stops[0],
        chat_template=(TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def chat_tokenizer(family, **changes):
    """The tokenizer of a family; changes are attributes of what it wraps."""
    fast = copy.deepcopy(chat_fast(family))
    for old, new in changes.items():
        setattr(fast, old, new)
    vocabulary = fast.get_vocab()
    stops = [vocabulary.get(t) for t in ("<|endoftext|>", "<|eom_id|>")]
    return Tokenizer(fast, stop_ids=[fast.eos_token_id, *stops])


@pytest.fixture(scope="session")
def tied():
    return make_pretrained(tie_word_embeddings=True)


@pytest.fixture(scope="session")
def untied():
    return make_pretrained(attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="session")
def tools():
    """The functions of this file, for tests that build their own inputs."""
    import sys

    return sys.modules[__name__]
