"""The rates of a machine, and the least possible time of each phase of a step.

    python benchmarks/machine.py [--dtype bfloat16]

It measures the rate of a large square product, and the rate of reads from memory, by a
sum and by a product with one vector. `floors` is a pure function of the rates, so that
`predict.py` can also use it for untested machines.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from workloads import Workload, show

from grpo_jax.models.config import ModelConfig
from grpo_jax.planning.flops import (
    completion_flops,
    forward_flops,
    gradient_flops,
    layer_weights,
    prefill_flops,
)

# Adam reads parameter, gradient and two moments, and writes all but the gradient.
ADAM_BYTES = 7 * 4


@dataclass(frozen=True)
class Machine:
    """What all devices together reach, or could."""

    flops: float  # operations per second in matrix products
    bandwidth: float  # bytes per second, each device's own memory summed
    devices: int = 1


def floors(
    config: ModelConfig,
    machine: Machine,
    work: Workload,
    *,
    copies: int = 1,
    frozen: bool = False,
) -> dict[str, float]:
    """Least seconds of each phase of a step with full-length completions.

    Prefill, reference and update need their products (`planning.flops`). Each token
    needs its products or, if that takes longer, the reading of all weights and of keys
    and values before it. The optimizer reads and writes its state. Nothing overlaps
    between phases, and nothing moves between devices.

    Args:
      copies: of the weights while sampling: each device reads its part of one.
      frozen: adapters are trained: weights have no gradient and no optimizer.
    """
    prompts = np.full(work.prompts, work.prompt_tokens)
    lengths = np.full((work.prompts, work.group), work.new_tokens)
    forward = forward_flops(config, prompts, lengths)
    prefill = prefill_flops(config, prompts).total / machine.flops
    decode = sum(
        max(
            _token_flops(config, prompts, lengths, step) / machine.flops,
            _token_bytes(config, work, step, copies=copies) / machine.bandwidth,
        )
        for step in range(work.new_tokens)
    )
    moved = 0.0 if frozen else ADAM_BYTES * weights(config)
    phases = {
        "rollout": prefill + decode,
        "reference": forward.total / machine.flops if work.kl_coef else 0.0,
        "update": gradient_flops(forward, frozen=frozen) / machine.flops
        + moved / machine.bandwidth,
    }
    return phases | {"step": sum(phases.values()), "decode": decode / work.new_tokens}


def token_bytes(config: ModelConfig, work: Workload) -> float:
    """Bytes read for the last token of all completions."""
    return _token_bytes(config, work, work.new_tokens - 1)


def weights(config: ModelConfig) -> float:
    """Weights in products: all experts, and the head."""
    if config.experts is not None:
        every = dataclasses.replace(config.experts, per_token=config.experts.count)
        config = dataclasses.replace(config, experts=every)
    layers = config.num_layers * layer_weights(config)
    return float(layers + config.hidden_size * config.vocab_size)


def measure(dtype: str = "float32", *, bytes_read: float = 2**29) -> Machine:
    """This machine on one device; reads are from arrays of about `bytes_read`.

    What fits into a cache is read faster, so give what the workload reads per token.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    flops = 2 * size**3 / best(jax.jit(jnp.matmul), x, x)
    rows = int(np.clip(bytes_read, 2**24, 2**29)) // (1024 * x.dtype.itemsize)
    matrix, vector = jnp.ones((rows, 1024), dtype), jnp.ones(1024, dtype)
    seconds = min(
        best(jax.jit(jnp.sum), matrix),
        best(jax.jit(jnp.matmul), matrix, vector),
    )
    return Machine(flops, matrix.nbytes / seconds)


def share_left(before: Machine, dtype: str = "float32") -> float:
    """The rate of products now over that of before; says so where it fell.

    A lower one means that something else ran meanwhile, and that times are too long.
    """
    share = measure(dtype, bytes_read=2**24).flops / before.flops
    if share < 0.9:
        print(f"disturbed: products are now at {share:.0%} of their rate before")
    return share


def best(call: Callable[..., Any], *args: Any, repeats: int = 5) -> float:
    """Least seconds of a few calls, after one that compiles."""
    jax.block_until_ready(call(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def ratios(
    seconds: dict[str, float], least: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Phase -> seconds, floor and their ratio: rows of a table."""
    return {
        phase: {"s": taken, "floor": least[phase], "ratio": taken / least[phase]}
        for phase, taken in seconds.items()
        if least.get(phase)
    }


def _token_flops(
    config: ModelConfig, prompts: np.ndarray, lengths: np.ndarray, step: int
) -> float:
    """Operations for own token `step` of all completions."""
    upto = [
        completion_flops(config, prompts, np.full_like(lengths, count)).total
        for count in (step, step + 1)
    ]
    return upto[1] - upto[0]


def _token_bytes(
    config: ModelConfig, work: Workload, step: int, *, copies: int = 1
) -> float:
    """Bytes that own token `step` needs: weights, and keys and values before it."""
    item = jnp.dtype(config.dtype).itemsize
    entry = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    kept = work.prompts * work.prompt_tokens + work.sequences * step
    return item * (copies * weights(config) + entry * kept)


def main(*, dtype: str = "float32") -> None:
    """Measure this machine.

    Args:
      dtype: number type of the products.
    """
    rows = {}
    for mib in (16, 64, 512):
        found = measure(dtype, bytes_read=mib * 2**20)
        rows[f"{mib} MiB"] = {
            "GFLOP/s": found.flops / 1e9,
            "GB/s read": found.bandwidth / 1e9,
        }
    show(f"{jax.devices()[0].device_kind}, {dtype}", rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    tyro.cli(main)
