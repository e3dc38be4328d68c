"""Sampling alone: tokens, their floor, and what one long completion costs the others.

    python benchmarks/generate.py tiny [--models DIR] [--out FILE]

Three things are measured. Full-length completions, beside the floor. The log-probs of
the sampler against those of the learner. And, with random weights, completions whose
lengths are geometric with the limit at four times their mean, against as many tokens in
equal lengths: a model with random weights takes all tokens nearly alike, so with k stop
tokens out of V the lengths are geometric with mean V / k by themselves.
"""

import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn
from machine import Machine, floors, measure, share_left, token_bytes
from workloads import WORKLOADS, Workload, own_versions, publish, show, surroundings

from grpo_jax import generate, load_pretrained
from grpo_jax.config import MeshConfig, RolloutConfig, SamplingConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.parallel.mesh import RULES, make_mesh
from grpo_jax.rollout.generate import GroupSampler
from grpo_jax.training.step import policy_logprobs

# The limit of geometric lengths over their mean.
LIMIT = 4


def main(
    workload: tyro.conf.Positional[str],
    *,
    models: Path = Path("benchmarks/models"),
    dtype: str = "float32",
    repeats: int = 5,
    draws: int = 3,
    out: Path | None = Path("benchmarks/results/generate.jsonl"),
) -> None:
    """Measure sampling on a workload; the last line is JSON.

    Args:
      workload: its name in workloads.py.
      models: the folder that models.py made.
      dtype: number type of the matrix products.
      repeats: calls of which the median counts.
      draws: rollouts of geometric lengths.
      out: a file to which the line is appended.
    """
    work = WORKLOADS[workload]
    loaded = load_pretrained(str(work.folder(models)))
    model = Decoder(dataclasses.replace(loaded.config, dtype=dtype))
    machine = measure(dtype, bytes_read=token_bytes(model.config, work))
    full = full_lengths(model, loaded.params, work, machine, repeats=repeats)
    random = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    geometric = geometric_lengths(model, random, work, draws=draws)
    rates = f"{machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s"
    show(f"{workload}, {dtype}: {rates}", {"sampling": full})
    show(f"lengths, limit {LIMIT} x mean, random weights", {"per token": geometric})
    line = {
        "benchmark": "generate",
        "workload": dataclasses.asdict(work),
        "dtype": dtype,
        "full": full,
        "geometric": geometric,
        "machine_rates": dataclasses.asdict(machine),
        "rate_left": share_left(machine, dtype),
        "device": jax.devices()[0].device_kind,
        "versions": own_versions(),
        **surroundings(),
    }
    publish(line, out)


def full_lengths(
    model: Decoder, params: Any, work: Workload, machine: Machine, *, repeats: int
) -> dict[str, float]:
    """Seconds of a whole rollout and per token, their floors, and agreement."""
    prompts, lengths = random_prompts(work, model.config)
    sample = functools.partial(
        generate,
        model,
        params,
        prompts,
        lengths,
        group_size=work.group,
        sampling=SamplingConfig(stop_ids=()),
    )
    whole = median(lambda key: sample(key, max_new_tokens=work.new_tokens), repeats)
    # Prompts and the first token, which follows from them.
    first = median(lambda key: sample(key, max_new_tokens=1), repeats)
    token = (whole - first) / (work.new_tokens - 1)
    least = floors(model.config, machine, work)
    drawn = sample(jax.random.key(0), max_new_tokens=work.new_tokens)
    score = jax.jit(functools.partial(policy_logprobs, model, temperature=1.0))
    scored = score({"params": params}, prompts, lengths, drawn.tokens)
    return {
        "s": whole,
        "floor": least["rollout"],
        "ratio": whole / least["rollout"],
        "ms/token": 1e3 * token,
        "token floor": 1e3 * least["decode"],
        "token ratio": token / least["decode"],
        "tokens/s": work.tokens / whole,
        "max |logp diff|": float(jnp.max(jnp.abs(scored.logp - drawn.logp))),
    }


def geometric_lengths(
    model: Decoder, params: Any, work: Workload, *, draws: int
) -> dict[str, float]:
    """Time per token in geometric and in equal lengths, and their ratio.

    The mean is the workload's new tokens; equal lengths are the mean that came out.
    """
    prompts, lengths = random_prompts(work, model.config)
    mean, vocabulary = work.new_tokens, model.config.vocab_size
    stops = np.random.default_rng(0).choice(
        vocabulary, round(vocabulary / mean), replace=False
    )
    sample = functools.partial(
        generate, model, params, prompts, lengths, group_size=work.group
    )
    stopped = SamplingConfig(stop_ids=tuple(map(int, stops)))
    jax.block_until_ready(
        sample(jax.random.key(0), max_new_tokens=LIMIT * mean, sampling=stopped)
    )
    seconds, tokens, longest = 0.0, 0, []
    for seed in range(1, draws + 1):
        start = time.perf_counter()
        drawn = sample(
            jax.random.key(seed), max_new_tokens=LIMIT * mean, sampling=stopped
        )
        jax.block_until_ready(drawn)
        seconds += time.perf_counter() - start
        tokens += int(drawn.lengths.sum())
        longest.append(int(drawn.lengths.max()))
    equal = round(tokens / draws / work.sequences)
    never = SamplingConfig(stop_ids=())
    whole = median(lambda key: sample(key, max_new_tokens=equal, sampling=never), draws)
    carried = carried_over(model, params, work, stopped, steps=max(2 * draws, 10))
    return {
        "mean length": tokens / draws / work.sequences,
        "longest": statistics.mean(longest),
        "geometric us": 1e6 * seconds / tokens,
        "equal us": 1e6 * whole / (equal * work.sequences),
        "ratio": seconds / tokens * equal * work.sequences / whole,
        "carried us": carried["us"],
        "carried ratio": 1e-6 * carried["us"] * equal * work.sequences / whole,
        "carried s per completion": carried["s per completion"],
        "s per completion": seconds / draws / work.sequences,
    }


def carried_over(
    model: Decoder,
    params: Any,
    work: Workload,
    sampling: SamplingConfig,
    *,
    steps: int,
) -> dict[str, float]:
    """Time of completions that continue in the next step, once all is compiled."""
    rng = np.random.default_rng(1)
    mesh = make_mesh(MeshConfig())
    sampler = GroupSampler(model, mesh, max_prompt_tokens=work.prompt_tokens)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        stream = sampler.stream(
            lambda _: rng.integers(3, model.config.vocab_size, work.prompt_tokens),
            jax.random.key(0),
            longest=work.prompt_tokens,
            prompts_per_step=work.prompts,
            group_size=work.group,
            max_new_tokens=LIMIT * work.new_tokens,
            sampling=sampling,
            rollout=RolloutConfig(carry_over=True),
        )
        seconds, tokens = [], []
        # Some programs are compiled only when sizes occur that are seldom.
        for step in range(4 * steps):
            sampler.update({"params": params}, version=step)
            start = time.perf_counter()
            groups = stream.sample()
            seconds.append(time.perf_counter() - start)
            tokens.append(int(groups.completions.lengths.sum()))
    # A long step is followed by shorter ones: their sum counts.
    whole = sum(seconds[-steps:])
    return {
        "us": 1e6 * whole / sum(tokens[-steps:]),
        "s per completion": whole / steps / work.sequences,
    }


def random_prompts(work: Workload, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Full-length prompts of random tokens."""
    drawn = np.random.default_rng(0).integers(
        3, config.vocab_size, (work.prompts, work.prompt_tokens), np.int32
    )
    return jnp.asarray(drawn), jnp.full(work.prompts, work.prompt_tokens, jnp.int32)


def median(call: Any, repeats: int) -> float:
    """Median seconds of calls with keys of their own, after one that compiles."""
    jax.block_until_ready(call(jax.random.key(0)))
    times = []
    for seed in range(1, repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call(jax.random.key(seed)))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    tyro.cli(main)
