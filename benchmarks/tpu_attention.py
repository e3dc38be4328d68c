"""Attention of score and update as compiled for a TPU that need not be there.

    TPU_LIBRARY_PATH=.../libtpu.so python benchmarks/tpu_attention.py [fsdp_v5e]

All layers of a Qwen2.5-0.5B shape in bfloat16, without embedding and head, with and
without the kernels of `models/_tpu_flash.py`. Each job compiles the forward pass or the
gradient from shapes alone. It reports the temporaries of the whole, and of one layer,
forward and backward, bytes between main memory and cores (`program_text.py`) and
products; all of one device. What a kernel reads twice counts once.
"""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import tpu_decode
import tyro
from program_text import Program
from workloads import own_versions, publish, show, surroundings, versions

# Of a microbatch: prompts on a device by the number of devices. On one, more would not
# fit in plain form.
PROMPTS = {1: 4, 8: 2}
GROUP, NEW_TOKENS = 8, 256
# Rows of a prompt, if completions have a mean of a quarter of the limit and share rows.
ROWS = 2.5
GIB, TERA = 2**30, 1e12
_BODY = re.compile(r".*body=%?([\w.\-]+).*")


@dataclasses.dataclass(frozen=True)
class Job:
    """A pass to compile.

    Attributes:
      topology: the slice, as libtpu names it.
      axis, devices: the axis of the mesh that has all devices.
      prompt_tokens: P.
      packed: completions share rows.
      gradient: of the weights, with remat of all but products, or only forward.
      attention: auto or xla, as in the configuration of a run.
    """

    topology: str
    axis: str
    devices: int
    prompt_tokens: int
    packed: bool
    gradient: bool
    attention: str

    @property
    def name(self) -> str:
        """What the table calls it."""
        rows = "packed" if self.packed else "plain"
        what = "gradient" if self.gradient else "forward"
        where = f"{self.topology} {self.axis} {self.devices}"
        return f"{where} P {self.prompt_tokens} {rows} {what} {self.attention}"


def jobs() -> dict[str, list[Job]]:
    """The jobs by the name of their set, those that are compared behind each other."""
    short = [(128, False), (128, True)]
    every = [*short, (1024, False), (1024, True)]

    def on(where: tuple[str, str, int], shapes: list, gradient: bool) -> list[Job]:
        return [
            Job(*where, prompt, packed, gradient, attention)
            for prompt, packed in shapes
            for attention in ("xla", "auto")
        ]

    one, split = ("v5e:2x4", "data", 1), ("v5e:2x4", "fsdp", 8)
    return {
        "forward_v5e": on(one, short[:1], gradient=False),
        "gradient_v5e": on(one, every, gradient=True),
        "fsdp_v5e": on(split, short, gradient=True),
        "gradient_v6e": on(("v6e:2x4", "data", 1), short, gradient=True),
    }


def main(
    sets: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    only: str = "",
    out: Path | None = Path("benchmarks/results/tpu_attention.jsonl"),
) -> None:
    """Compile the passes of some sets; the last line is JSON.

    Args:
      sets: names of `jobs`; all by default.
      only: words that are all in the name of the jobs that are meant.
      out: a file to which the line is appended.
    """
    tpu_decode.describe_slices()
    chosen = [job for name in sets or jobs() for job in jobs()[name]]
    words = only.split()
    rows = {
        job.name: measure(job)
        for job in chosen
        if all(word in job.name.split() for word in words)
    }
    show("attention of all layers as compiled, of one device", rows)
    line = {
        "benchmark": "tpu_attention",
        "sizes": [*PROMPTS.values(), GROUP, NEW_TOKENS, ROWS],
        "rows": rows,
        "versions": own_versions() | versions("libtpu") | tpu_decode.library_version(),
        **surroundings(),
    }
    publish(line, out)


def measure(job: Job) -> dict[str, Any]:
    """One row of the table."""
    start = time.perf_counter()
    compiled = compile_pass(job)
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    program = Program(text)
    # The loops over layers, of which the compiler's count has one turn as well.
    lines = [one for part in program.computations.values() for one in part.values()]
    bodies = [re.sub(_BODY, r"\1", x.rest) for x in lines if x.opcode == "while"]
    row = {
        "compile s": seconds,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "temps GiB": compiled.memory_analysis().temp_size_in_bytes / GIB,
        "moved GiB": sum(sum(program.traffic(x).values()) for x in bodies) / GIB,
        "TFLOP": compiled.cost_analysis()["flops"] / TERA,
    }
    print(job.name, row, flush=True)
    return row


def compile_pass(job: Job) -> Any:
    """The compiled pass."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from grpo_jax.models.config import ModelConfig
    from grpo_jax.models.decoder import Decoder
    from grpo_jax.models.protocol import in_compute_dtype
    from grpo_jax.parallel.mesh import RULES, batch_sharding

    where = tpu_decode.Job(job.topology, job.axis, job.devices, False, 0)
    mesh = tpu_decode.described_mesh(where)
    config = dataclasses.replace(
        ModelConfig.from_hf(tpu_decode.QWEN),
        dtype="bfloat16",
        remat="dots",
        attention=job.attention,
    )
    model = Decoder(config)
    params = tpu_decode.parameters(model, mesh, split=True)

    def of(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))

    parts, each = job.devices, PROMPTS[job.devices]
    prompts, rows = parts * each, int(ROWS * each)
    given = [of(prompts, job.prompt_tokens), of(prompts)]
    if job.packed:
        given += [of(parts, rows, NEW_TOKENS)] * 2 + [of(parts, rows)]
    else:
        given += [of(prompts, GROUP, NEW_TOKENS - 1)]

    def forward(params: Any, *given: Any) -> Any:
        variables = {"params": in_compute_dtype(params, "bfloat16")}
        found: Any = model.apply(variables, *given, method=model.score_rows)
        return sum(jnp.square(x.astype(jnp.float32)).mean() for x in found)

    run = jax.grad(forward) if job.gradient else forward
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        return jax.jit(run).lower(params, *given).compile()


if __name__ == "__main__":
    tyro.cli(main)
