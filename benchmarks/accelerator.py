"""Phases of a step on one accelerator, as shares of its products and its bandwidth.

    python benchmarks/accelerator.py smollm2-135m qwen2.5-0.5b qwen2.5-1.5b

Random weights of the models' shapes, bfloat16, 16 prompts x 16 completions of 512
tokens. `mfu` is model FLOPs utilization: operations that a phase needs over its seconds
and the maker's rate; `GB/s` are the weights, keys and values that decoding must read
over the seconds of the rollout.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from machine import Machine, floors, measure, share_left, token_bytes
from phases import phases
from workloads import Workload, own_versions, publish, show, surroundings

from grpo_jax.config import MeshConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.planning.devices import known_flops
from grpo_jax.planning.flops import forward_flops, gradient_flops

COMMON = {
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
# Hidden size, MLP, layers, heads, key/value heads, vocabulary; type of the family.
SHAPES = {
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936),
}


def main(
    shapes: tyro.conf.Positional[tuple[str, ...]] = tuple(SHAPES),
    *,
    prompts: int = 16,
    group: int = 16,
    prompt_tokens: int = 128,
    new_tokens: int = 512,
    microbatch_prompts: int = 4,
    remat: str = "dots",
    repeats: int = 3,
    out: Path | None = Path("benchmarks/results/accelerator.jsonl"),
) -> None:
    """Measure the device, then each shape; a line of JSON for each.

    Args:
      shapes: names of model shapes.
      prompts: of a step.
      group: completions per prompt.
      prompt_tokens: of each prompt.
      new_tokens: of each completion.
      microbatch_prompts: prompts of an update that are held at once.
      remat: what the backward pass computes again.
      repeats: calls of which the fastest counts.
      out: a file to which the lines are appended.
    """
    for name in shapes:
        work = Workload(name, name, prompts, group, prompt_tokens, new_tokens, 1)
        model = dataclasses.replace(config_of(name), dtype="bfloat16", remat=remat)
        machine = measure("bfloat16", bytes_read=token_bytes(model, work))
        measured = phases(
            model,
            work,
            MeshConfig(),
            repeats=repeats,
            microbatch_size=microbatch_prompts * group,
        )
        measured["step"] = sum(measured.values())
        rows = shares(model, work, machine, measured)
        device = jax.devices()[0].device_kind
        rates = f"{machine.flops / 1e12:.0f} TFLOP/s, {machine.bandwidth / 1e9:.0f}"
        show(f"{name}, {device}: {rates} GB/s", rows)
        line = {
            "benchmark": "accelerator",
            "workload": dataclasses.asdict(work),
            "microbatch_prompts": microbatch_prompts,
            "remat": remat,
            "phases": rows,
            "tokens_per_second": work.tokens / measured["step"],
            "peak_gib": peak_gib(),
            "machine_rates": dataclasses.asdict(machine),
            "rate_left": share_left(machine, "bfloat16"),
            "device": device,
            "versions": own_versions(),
            **surroundings(),
        }
        publish(line, out)


def config_of(name: str) -> ModelConfig:
    """The configuration of a shape."""
    kind, wide, inner, layers, heads, kv_heads, vocabulary = SHAPES[name]
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]
    return ModelConfig.from_hf(
        COMMON
        | {
            "architectures": [architecture],
            "model_type": kind,
            "vocab_size": vocabulary,
            "hidden_size": wide,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        }
    )


def shares(
    model: ModelConfig, work: Workload, machine: Machine, seconds: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Per phase: seconds, floor, utilization and, of the rollout, bandwidth."""
    prompts = np.full(work.prompts, work.prompt_tokens)
    lengths = np.full((work.prompts, work.group), work.new_tokens)
    forward = forward_flops(model, prompts, lengths)
    flops = {
        "rollout": forward.total,
        "reference": forward.total,
        "update": gradient_flops(forward, frozen=False),
    }
    flops["step"] = sum(flops.values())
    peak = known_flops(jax.devices()[0].device_kind) or machine.flops
    least = floors(model, machine, work)
    rows: dict[str, dict[str, Any]] = {}
    for phase, taken in seconds.items():
        rows[phase] = {
            "s": taken,
            "floor": least[phase],
            "ratio": taken / least[phase],
            "mfu": flops[phase] / (taken * peak),
        }
    # Keys and values grow from the prompt's to the last token's: their mean is read.
    first, last = (
        token_bytes(model, dataclasses.replace(work, new_tokens=count))
        for count in (1, work.new_tokens)
    )
    moved = work.new_tokens * (first + last) / 2
    rows["rollout"]["GB/s"] = moved / seconds["rollout"] / 1e9
    rows["rollout"]["of bandwidth"] = moved / seconds["rollout"] / machine.bandwidth
    return rows


def peak_gib() -> float | None:
    """The most memory of the device in use so far; None where it is not told.

    Of several shapes only the largest until then has a figure of its own.
    """
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if used is None else used / 2**30


if __name__ == "__main__":
    tyro.cli(main)
