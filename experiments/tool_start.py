"""Teaches the packaged model what a call of a tool looks like, by imitation.

    python experiments/tool_start.py --out runs/tool-start

Hardware: 2 CPU cores. Time: about ten minutes.
Result: a model that calls a calculator in half of its answers, and else guesses.

GRPO strengthens what a model samples at times, and this model has never seen a tool. A
language model that was trained to call tools needs no such start.
"""

import dataclasses
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from grpo_jax import (
    Batch,
    ObjectiveConfig,
    TrainConfig,
    load_pretrained,
    make_train_state,
    make_train_step,
    save_pretrained,
)

# Calls as Qwen2.5 writes them. Each message ends with the model's end token.
TEMPLATE = """{% for m in messages %}{{ m.content }}
{%- for call in m.tool_calls or [] -%}
<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|end|>{% endfor %}"""
CALL = """<tool_call>
{"name": "times", "arguments": {"a": %d, "b": %d}}
</tool_call>"""


def main(out: Path = Path("runs/tool-start"), steps: int = 1500, seed: int = 0) -> None:
    """Train on right calls and random guesses, and save the model."""
    policy, draw = load_pretrained("embedded"), random.Random(seed)
    # Over tokens: a mean per conversation would count those of short guesses more.
    objective = ObjectiveConfig(
        surrogate="likelihood", aggregation="token_mean", kl_coef=0.0
    )
    config = TrainConfig(objective=objective)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    state = make_train_state(policy.params, optimizer)
    step = jax.jit(make_train_step(policy.model, optimizer, config))
    for _ in range(steps):
        rows = [conversation(draw, calls=n % 2 == 0) for n in range(32)]
        state, _ = step(state, batch_of(rows, policy.tokenizer))
    save_pretrained(out, dataclasses.replace(policy, params=state.params))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    print(f"written to {out}")


def conversation(draw: random.Random, *, calls: bool) -> list[str]:
    """A question, and the turns that follow: a call, its result, the answer."""
    a, b = draw.randrange(10, 100), draw.randrange(10, 100)
    if not calls:
        return [f"{a}*{b}", str(draw.randrange(100, 9999))]
    return [f"{a}*{b}", CALL % (a, b), str(a * b), str(a * b)]


def batch_of(rows: list[list[str]], tokenizer, length: int = 96) -> Batch:
    """The conversations, of which all turns but the tool's are learned."""
    tokens = np.zeros((len(rows), 1, length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    prompts = [tokenizer.encode_prompt(f"{row[0]}<|end|>") for row in rows]
    for n, (_, *turns) in enumerate(rows):
        at = 0
        for number, text in enumerate(turns):
            ids = tokenizer.encode_prompt(f"{text}<|end|>")
            tokens[n, 0, at : at + len(ids)] = ids
            mask[n, 0, at : at + len(ids)] = number != 1
            at += len(ids)
    return Batch(
        prompts=jnp.asarray(prompts),
        prompt_lengths=jnp.full(len(rows), len(prompts[0])),
        completions=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        advantages=jnp.ones(mask.shape[:2]),
        sampler_logp=jnp.zeros(mask.shape),
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
