"""Make the embedded model: a small Llama that can calculate but makes mistakes.

    python experiments/embedded_model.py --out grpo_jax/assets/arithmetic-1m

Supervised warm-up from random weights on the training problems of the arithmetic task:
first on right solutions, until the model knows how. Then it trains briefly on text in
which 17 of 20 solutions are careless (no carry, no borrow, no minus sign). Afterwards
the careless way is the most likely one, and the model answers about four of ten
held-out problems. GRPO can then teach it to be careful.

Hardware: 2 CPU cores, float32. Time: about ten minutes.
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
    """The options."""

    out: Path = Path("grpo_jax/assets/arithmetic-1m")
    know: float = 0.97  # held-out accuracy at which the first part ends
    max_steps: int = 10_000  # of the first part
    careless: float = 0.85  # share of careless solutions in the second part
    careless_steps: int = 500
    learning_rate: float = 2e-3  # a quarter of it in the second part
    batch_size: int = 128
    layers: int = 3
    width: int = 160
    inner: int = 448
    seed: int = 0


def careless_answer(problem: str) -> str:
    """The answer computed digit by digit, without carry, borrow or minus sign."""
    add = "+" in problem
    first, second = (int(n) for n in problem.rstrip("=").split("+" if add else "-"))
    high, low = max(first, second), min(first, second)
    if add:
        return str((high // 10 + low // 10) * 10 + (high + low) % 10)
    return str((high // 10 - low // 10) * 10 + (high - low) % 10)


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
    """Right-padded ids and lengths; `end` appends the end token."""
    ids = [tokenizer.encode_prompt(t) + list(tokenizer.stop_ids) * end for t in texts]
    lengths = np.array([len(row) for row in ids], np.int32)
    padded = np.full((len(ids), lengths.max()), tokenizer.pad_id, np.int32)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    return padded, lengths


def main(options: Options) -> None:
    """Train until the model is good enough, then save it."""
    task, tokenizer = load_task("arithmetic"), byte_tokenizer()
    model = Decoder(model_config(options, tokenizer))
    params = init_params(model, jax.random.key(options.seed))
    problems = [row["prompt"] for row in task.train]
    texts = [row["answer"] for row in task.train] + list(map(careless_answer, problems))
    prompts = encode(tokenizer, problems, end=False)
    answers = encode(tokenizer, texts, end=True)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
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
    def update(params, opt_state, rate, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return optax.apply_updates(params, updates), opt_state, value

    rng = np.random.default_rng(options.seed)

    def train(params, opt_state, rate, share):
        rows = rng.integers(len(problems), size=options.batch_size)
        careless = rng.random(options.batch_size) < share
        written = rows + len(problems) * careless
        batch = [v[rows] for v in prompts] + [v[written] for v in answers]
        return update(params, opt_state, rate, *batch)

    for step in range(1, options.max_steps + 1):
        rate = options.learning_rate * min(step / 100, 1.0)
        params, opt_state, value = train(params, opt_state, rate, 0.0)
        if step % 250 == 0:
            right = report(step, float(value), model, params, tokenizer, task)
            if right >= options.know:
                break
    for _ in range(options.careless_steps):
        rate = options.learning_rate / 4
        params, opt_state, value = train(params, opt_state, rate, options.careless)
    step += options.careless_steps
    report(step, float(value), model, params, tokenizer, task)
    pretrained = Pretrained(model, params, tokenizer, model.config)
    save_pretrained(options.out, pretrained, dtype="bfloat16")


def report(step, loss, model, params, tokenizer, task) -> float:
    """Print and return how many held-out answers are right; print also the careless."""
    result = evaluate(model, params, tokenizer, task, max_new_tokens=8)
    known = [
        text in (row["answer"], careless_answer(row["prompt"]))
        for (text,), row in zip(result.completions, task.test, strict=True)
    ]
    print(
        f"step {step}  loss {loss:.3f}  right {result.accuracy:.3f}  "
        f"right or careless {np.mean(known):.3f}",
        flush=True,
    )
    return result.accuracy


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
