"""Teaches the packaged model what calls of a tool look like, by imitation.

    python experiments/tool_start.py

Hardware: 2 CPU cores. Time: two minutes.
Result: the model that experiments/calculator.py starts from. It calls a calculator in
44 % of its answers, often with wrong digits, and else guesses: accuracy 10.8 %.

GRPO strengthens what a model samples at times, and the packaged model knows no tools.
A language model that was trained to call tools needs no such start.
"""

import dataclasses
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro

import grpo_jax

# Such as 32*64<|end|>product(of=32*64)<|end|>2048<|end|>2048<|end|>
TEMPLATE = """{% for message in messages %}{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function.name }}(
{%- for key, value in call.function.arguments.items() %}{{ key }}={{ value }}
{%- endfor %}){% endfor %}<|end|>{% endfor %}"""
# How a call is read back, in the terms of transformers.
CALLS = {
    "open_pattern": r"(?P<name>\w+)\(",
    "close": ")",
    "content": "kv-lines",
    "content_args": {"kv_sep": "="},
    "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
    "repeats": True,
}
FIELDS = {"tool_calls": CALLS, "content": {"close": "<|end|>"}}
READER = {"start_anchor": "<|end|>", "fields": FIELDS}


def main(out: Path = Path("runs/tool-start"), steps: int = 600, seed: int = 0) -> None:
    """Train on as many calls as guesses, and save the model with its template."""
    policy, draw = grpo_jax.load_pretrained("embedded"), random.Random(seed)
    # Over tokens: a mean per conversation would count those of short guesses more.
    objective = grpo_jax.ObjectiveConfig(
        surrogate="likelihood", aggregation="token_mean", kl_coef=0.0
    )
    config = grpo_jax.TrainConfig(objective=objective)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 3e-3, 20, steps))
    state = grpo_jax.make_train_state(policy.params, optimizer)
    step = jax.jit(grpo_jax.make_train_step(policy.model, optimizer, config))
    for _ in range(steps):
        rows = [conversation(draw, calls=n % 2 == 0) for n in range(32)]
        state, _ = step(state, batch_of(rows, policy.tokenizer))
    grpo_jax.save_pretrained(out, dataclasses.replace(policy, params=state.params))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"response_template": READER}
    path.write_text(json.dumps(settings))
    print(f"written to {out}")


def conversation(draw: random.Random, *, calls: bool) -> list[str]:
    """A question, then in turn what the model writes and a random result to copy."""
    question = f"{draw.randrange(32, 100)}*{draw.randrange(32, 100)}"
    guess, one, two = (str(draw.randrange(1000, 10_000)) for _ in range(3))
    if calls:
        return [question, f"product(of={question})", one, one]
    return [question, guess, one, one, two, two]


def batch_of(rows: list[list[str]], tokenizer, length: int = 28) -> grpo_jax.Batch:
    """Conversations, of which the model learns what it writes."""
    ids = [[tokenizer.encode_prompt(f"{t}<|end|>") for t in turns] for turns in rows]

    def padded(values, dtype):
        return jnp.array([[v + [0] * (length - len(v))] for v in values], dtype)

    learned = [
        [n % 2 == 0 for n, t in enumerate(turns[1:]) for _ in t] for turns in ids
    ]
    mask = padded(learned, bool)
    return grpo_jax.Batch(
        prompts=jnp.array([turns[0] for turns in ids]),
        prompt_lengths=jnp.array([len(turns[0]) for turns in ids]),
        completions=padded([sum(turns[1:], []) for turns in ids], jnp.int32),
        mask=mask,
        advantages=jnp.ones(mask.shape[:2]),
        sampler_logp=jnp.zeros(mask.shape),
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
