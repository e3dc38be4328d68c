"""Predicted time of a step on untested accelerators, from floors and a share of peak.

    python benchmarks/predict.py [--flops-share 0.5 --bandwidth-share 0.6]

Rates are the vendors' numbers (`grpo_jax.planning.devices`). The prediction assumes
that work is divided evenly and that communication overlaps with products. Both favor
meshes of many devices, most of all tensor parallelism in decoding. Memory is the
estimate of `grpo-jax plan`.
"""

import dataclasses
import json
from typing import Any

import tyro
from machine import Machine, floors
from workloads import Workload, show

from grpo_jax.config import LoraConfig, MeshConfig, TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.devices import DEVICES
from grpo_jax.planning.memory import estimate
from grpo_jax.planning.resolve import GIB, USABLE, resolve_auto, with_compute_dtype

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "num_key_value_heads": 8,
}
# Llama 3.2 1B, 3.1 8B and 70B: hidden size, MLP, layers, heads, tied embeddings.
SHAPES = {
    "1B": (2048, 8192, 16, 32, True),
    "8B": (4096, 14336, 32, 32, False),
    "70B": (8192, 28672, 80, 64, False),
}
# Name -> device and how many. A v5p-64 has 64 cores, which are 32 chips.
BOXES = {
    "v5e-8": ("v5e", 8),
    "v5e-16": ("v5e", 16),
    "v6e-8": ("v6e", 8),
    "v6e-16": ("v6e", 16),
    "v5p-8": ("v5p", 4),
    "v5p-16": ("v5p", 8),
    "v5p-64": ("v5p", 32),
    "8 x H100": ("h100", 8),
}
WORK = Workload("predicted", "", 64, 8, 512, 1024, steps=1)


def main(*, flops_share: float = 0.5, bandwidth_share: float = 0.6) -> None:
    """Print the table; the last line is JSON.

    Args:
      flops_share: of the peak that products are assumed to reach.
      bandwidth_share: of the memory's bandwidth that decoding is assumed to reach.
    """
    rows = {}
    for shape in SHAPES:
        for box in BOXES:
            for rank in (None, 16):
                name = f"{shape} {box}" + ("" if rank is None else " LoRA")
                rows[name] = predicted(
                    shape,
                    box,
                    rank,
                    flops_share=flops_share,
                    bandwidth_share=bandwidth_share,
                )
    work = f"{WORK.prompts} x {WORK.group}, {WORK.prompt_tokens} + {WORK.new_tokens}"
    shares = f"{flops_share:.0%} of peak, {bandwidth_share:.0%} of bandwidth"
    show(f"seconds of a step of {work} tokens at {shares}", rows)
    print(json.dumps(rows))


def predicted(
    shape: str,
    box: str,
    rank: int | None,
    *,
    flops_share: float,
    bandwidth_share: float,
) -> dict[str, Any]:
    """Seconds per phase, the floor of the step, and the memory of a device."""
    kind, count = BOXES[box]
    device = DEVICES[kind]
    model, config = run(shape, count, rank)
    mesh = meshes.abstract_mesh(config.mesh, count, device.described)
    limit = int(USABLE * device.memory_gib * GIB)
    model, config = resolve_auto(model, config, mesh, limit=limit)
    copies = count // mesh.shape["tensor"]
    least, expected = (
        floors(
            model,
            Machine(count * device.flops * f, count * device.bandwidth * b, count),
            WORK,
            copies=copies,
            frozen=rank is not None,
        )
        for f, b in ((1.0, 1.0), (flops_share, bandwidth_share))
    )
    if model.remat == "layer":  # one more forward pass
        again = expected["reference"]
        expected["update"] += again
        expected["step"] += again
    peak = estimate(model, config, mesh).peak
    phases = {n: expected[n] for n in ("rollout", "reference", "update", "step")}
    return phases | {
        "floor": least["step"],
        "tokens/s": WORK.tokens / expected["step"],
        "remat": model.remat,
        "GiB": peak / GIB,
        "fits": "yes" if peak <= limit else "no",
    }


def run(shape: str, count: int, rank: int | None) -> tuple[ModelConfig, TrainConfig]:
    """A model and its run: one prompt per device at once; 70B splits its matrices."""
    wide, inner, layers, heads, tied = SHAPES[shape]
    hf = LLAMA | {
        "hidden_size": wide,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }
    tensor = min(8, count) if shape == "70B" else 1
    config = TrainConfig(
        model="predicted",
        **WORK.sizes,
        microbatch_size=WORK.group * (count // tensor),
        lora=LoraConfig(rank=rank),
        mesh=MeshConfig(tensor=tensor),
    )
    model = with_compute_dtype(ModelConfig.from_hf(hf), config, accelerator=True)
    if rank is not None:
        model = dataclasses.replace(model, lora_scale=config.lora.scale)
    return model, config


if __name__ == "__main__":
    tyro.cli(main)
