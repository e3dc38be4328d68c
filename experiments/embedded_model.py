"""Make the embedded model: a small Llama that has begun to learn arithmetic.

    python experiments/embedded_model.py --out grpo_jax/assets/arithmetic-1m

Supervised warm-up from random weights on the training problems of the arithmetic task,
stopped as soon as the model answers `--stop-at` of the held-out ones, so that GRPO has
something left to teach. 2 CPU cores, float32: about five minutes.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from grpo_jax import (
    Decoder,
    ModelConfig,
    Pretrained,
    evaluate,
    load_task,
    save_pretrained,
    weighted_likelihood_loss,
)
from grpo_jax.models.decoder import init_params
from grpo_jax.training.step import policy_logprobs
from grpo_jax.weights.tokenizer import Tokenizer, import_fast_tokenizer

PAD, END = "<|pad|>", "<|end|>"


@dataclass(frozen=True)
class Options:
    """How the model is made."""

    out: Path = Path("grpo_jax/assets/arithmetic-1m")
    stop_at: float = 0.4  # held-out accuracy, greedy, at which training stops
    learning_rate: float = 2e-3
    batch_size: int = 128
    max_steps: int = 10_000
    check_every: int = 50
    layers: int = 3
    width: int = 160
    inner: int = 448
    seed: int = 0


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that every text can be encoded, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, PAD, END])}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    wrapped = import_fast_tokenizer()(
        tokenizer_object=fast, pad_token=PAD, eos_token=END
    )
    return Tokenizer(wrapped)


def model_config(options: Options, tokenizer: Tokenizer) -> ModelConfig:
    """A Llama whose sizes divide by 8 and whose heads divide by 2."""
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": -(-tokenizer.vocab_size // 8) * 8,
            "hidden_size": options.width,
            "intermediate_size": options.inner,
            "num_hidden_layers": options.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "eos_token_id": tokenizer.stop_ids[0],
            "pad_token_id": tokenizer.pad_id,
        }
    )


def encode(tokenizer: Tokenizer, texts: list[str], *, end: bool) -> tuple:
    """Right-padded ids and lengths, with the end token where asked for."""
    ids = [tokenizer.encode_prompt(t) + list(tokenizer.stop_ids) * end for t in texts]
    lengths = np.array([len(row) for row in ids], np.int32)
    padded = np.full((len(ids), lengths.max()), tokenizer.pad_id, np.int32)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    return padded, lengths


def main(options: Options) -> None:
    """Train until the model is as good as it should be, then save it."""
    task, tokenizer = load_task("arithmetic"), byte_tokenizer()
    model = Decoder(model_config(options, tokenizer))
    params = init_params(model, jax.random.key(options.seed))
    prompts = encode(tokenizer, [row["prompt"] for row in task.train], end=False)
    answers = encode(tokenizer, [row["answer"] for row in task.train], end=True)
    schedule = optax.linear_schedule(0.0, options.learning_rate, 100)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    opt_state = tx.init(params)

    def loss(params, prompt, prompt_length, answer, answer_length):
        scored = policy_logprobs(
            model,
            {"params": params},
            prompt,
            prompt_length,
            answer[:, None],
            temperature=1.0,
        )
        mask = jnp.arange(answer.shape[1]) < answer_length[:, None]
        weights = jnp.ones((answer.shape[0], 1))
        return weighted_likelihood_loss(scored.logp, mask[:, None], weights).value()

    @jax.jit
    def update(params, opt_state, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    rng = np.random.default_rng(options.seed)
    for step in range(1, options.max_steps + 1):
        rows = rng.integers(len(task.train), size=options.batch_size)
        batch = [values[rows] for values in (*prompts, *answers)]
        params, opt_state, value = update(params, opt_state, *batch)
        if step % options.check_every == 0:
            result = evaluate(
                model, params, tokenizer, task, prompts=500, max_new_tokens=8
            )
            print(f"step {step}  loss {value:.3f}  held-out {result.accuracy:.3f}")
            if result.accuracy >= options.stop_at:
                break
    pretrained = Pretrained(model, params, tokenizer, model.config)
    save_pretrained(options.out, pretrained, dtype="bfloat16")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
