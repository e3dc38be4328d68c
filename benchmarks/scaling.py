"""Times of each phase of a step on a mesh, beside the least that the hardware allows.

    JAX_PLATFORMS=cpu python benchmarks/scaling.py --devices 2

See docs/scaling.md. Meshes of virtual CPU devices share the cores, so the floor is that
of one device: they show what splitting costs, not what it gains.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import tyro
from machine import floors, measure, ratios, token_bytes
from phases import phases
from workloads import Workload, own_versions, publish, show, surroundings

from grpo_jax.config import MeshConfig
from grpo_jax.models.config import ModelConfig

MODEL = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
)
WORK = Workload("scaling", "30M random", 8, 4, 64, 64, steps=1)


def main(
    *,
    devices: int = 1,
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    sampler: Literal["gathered", "split"] = "gathered",
    out: Path | None = Path("benchmarks/results/scaling.jsonl"),
) -> None:
    """Measure the hardware, then each phase on one mesh; the last line is JSON.

    Args:
      devices: how many; virtual ones on a CPU.
      data: size of the mesh's axis.
      fsdp: size of the mesh's axis; -1 is what is left.
      tensor: size of the mesh's axis.
      sampler: where its parameters lie.
      out: a file to which the line is appended.
    """
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)
    machine = measure(MODEL.dtype, bytes_read=token_bytes(MODEL, WORK))
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, sampler=sampler)
    measured = phases(MODEL, WORK, mesh)
    least = floors(MODEL, machine, WORK)
    rates = f"{machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s"
    show(f"{devices} devices, {rates}", ratios(measured, least))
    line = {
        "benchmark": "scaling",
        "devices": devices,
        "mesh": dataclasses.asdict(mesh),
        "seconds": measured,
        "floors": least,
        "machine_rates": dataclasses.asdict(machine),
        "device": jax.devices()[0].device_kind,
        "versions": own_versions(),
        **surroundings(),
    }
    publish(line, out)


if __name__ == "__main__":
    tyro.cli(main)
