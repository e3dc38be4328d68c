"""Scoring with each prompt once, against the same model with the prompt repeated.

    python benchmarks/score.py [--prompts 2 --group 16 --prompt-tokens 512 ...]

Both take the mean log-probability of the completions, and its gradient. The repeated
form is what a trainer without groups does: a row of prompt and completion per sequence,
through the same model's own `forward`. Memory is what XLA allocates for temporaries.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from machine import best
from workloads import EMBEDDED, own_versions, publish, show, surroundings

from grpo_jax import chunked_logprobs, load_pretrained
from grpo_jax.models.decoder import Decoder
from grpo_jax.training.step import policy_logprobs


def main(
    model: tyro.conf.Positional[str] = str(EMBEDDED),
    *,
    prompts: int = 2,
    group: int = 16,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    remat: str = "dots",
    repeats: int = 3,
    out: Path | None = Path("benchmarks/results/score.jsonl"),
) -> None:
    """Measure both forms; the last line is JSON.

    Args:
      model: its folder; by default that of the embedded model.
      prompts: prompts, each with `group` completions.
      group: completions of a prompt.
      prompt_tokens: tokens of each prompt.
      new_tokens: tokens of each completion.
      remat: what the backward pass computes again.
      repeats: calls of which the fastest counts.
      out: a file to which the line is appended.
    """
    loaded = load_pretrained(model)
    decoder = Decoder(dataclasses.replace(loaded.config, remat=remat))
    draw = functools.partial(
        np.random.default_rng(0).integers, 3, loaded.config.vocab_size, dtype=np.int32
    )
    batch = (
        jnp.asarray(draw((prompts, prompt_tokens))),
        jnp.full(prompts, prompt_tokens, jnp.int32),
        jnp.asarray(draw((prompts, group, new_tokens))),
    )
    rows, gradients = {}, {}
    for name, logprobs in (("once", once), ("repeated", repeated)):
        found, gradients[name] = measure(
            functools.partial(logprobs, decoder), loaded.params, batch, repeats
        )
        rows[name] = found
    rows["ratio"] = {
        name: rows["repeated"][name] / rows["once"][name] for name in rows["once"]
    }
    apart = distance(gradients["once"], gradients["repeated"])
    sizes = f"{prompts} x {group}, {prompt_tokens} + {new_tokens} tokens"
    show(f"{Path(model).name}, {sizes}, remat {remat}", rows)
    print(f"largest difference of the gradients over their largest entry: {apart:.1e}")
    line = {
        "benchmark": "score",
        "model": Path(model).name,
        "sizes": [prompts, group, prompt_tokens, new_tokens],
        "remat": remat,
        "rows": rows,
        "gradient_difference": apart,
        "device": jax.devices()[0].device_kind,
        "versions": own_versions(),
        **surroundings(),
    }
    publish(line, out)


def measure(
    logprobs: Callable[..., jax.Array], params: Any, batch: tuple, repeats: int
) -> tuple[dict[str, float], Any]:
    """Seconds and MiB of the forward pass and of the gradient; the gradient itself."""

    def mean(params: Any, *batch: jax.Array) -> jax.Array:
        return jnp.mean(logprobs(params, *batch))

    found: dict[str, float] = {}
    result = None
    for name, function in (("forward", mean), ("gradient", jax.grad(mean))):
        compiled = jax.jit(function).lower(params, *batch).compile()
        memory: Any = compiled.memory_analysis()
        found[f"{name} s"] = best(compiled, params, *batch, repeats=repeats)
        found[f"{name} MiB"] = memory.temp_size_in_bytes / 2**20
        result = compiled(params, *batch)
    return found, result


def once(
    model: Decoder,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    completions: jax.Array,
) -> jax.Array:
    """Log-probs [N, G, T] as this library computes them."""
    variables = {"params": params}
    return policy_logprobs(
        model, variables, prompts, lengths, completions, temperature=1.0
    ).logp


def repeated(
    model: Decoder,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    completions: jax.Array,
) -> jax.Array:
    """The same from one row of prompt and completion per sequence."""
    variables = {"params": params}
    n, group, new_tokens = completions.shape
    before = jnp.repeat(prompts, group, axis=0)
    rows = jnp.concatenate([before, completions.reshape(n * group, -1)], axis=1)
    counts = jnp.repeat(lengths, group) + new_tokens
    hidden: Any = model.apply(variables, rows, counts, method=model.forward)
    # Full-length prompts: entry s predicts token s + 1.
    own = hidden[:, prompts.shape[1] - 1 : -1]
    head: Any = model.apply(variables, method=model.head)
    own = own.reshape(*completions.shape, -1)
    return chunked_logprobs(own, head, completions).logp


def distance(one: Any, other: Any) -> float:
    """The largest difference between two gradients over the largest entry of one."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(one))
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs) / largest


if __name__ == "__main__":
    tyro.cli(main)
