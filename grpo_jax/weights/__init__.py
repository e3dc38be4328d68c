"""Files to parameters and back: Hugging Face folders, GGUF files, tokenizers."""

from grpo_jax.weights.pretrained import (
    Pretrained,
    load_pretrained,
    save_pretrained,
)
from grpo_jax.weights.tokenizer import Tokenizer

__all__ = ["Pretrained", "Tokenizer", "load_pretrained", "save_pretrained"]
