"""The decoding loop as compiled for a TPU that need not be there.

    TPU_LIBRARY_PATH=.../libtpu.so python benchmarks/tpu_decode.py [one_v5e fsdp_v5e]

`libtpu` compiles for a described slice on any x86 machine. `docs/tpu.md` says which
version to install, and how, beside an installation without TPUs. Each job compiles the
loop from shapes alone, for a Qwen2.5-0.5B shape in bfloat16, and counts in the text of
its body: copies of arrays of the cache's size, weights that are gathered, other
communication, and bytes per token (`planning._program_text`). The floor is the weights,
the prompts, and half of the ring, which equal lengths have written on average.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tyro
from workloads import own_versions, publish, show, surroundings, versions

from grpo_jax.planning._program_text import COLLECTIVES, Instruction, Program

PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS, TURNS = 16, 8, 128, 256, 128
MIB = 2**20
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A loop to compile.

    Attributes:
      topology: the slice, as libtpu names it.
      axis, devices: the axis of the mesh that has all devices.
      refills: whether completions wait for a slot.
      columns: of the ring.
      split: weights stay split over fsdp, and a layer is gathered at a time.
    """

    topology: str
    axis: str
    devices: int
    refills: bool
    columns: int
    split: bool = False

    @property
    def name(self) -> str:
        """What the table calls it."""
        kind = "refilling" if self.refills else "aligned"
        weights = " split" if self.split else ""
        where = f"{self.topology} {self.axis} {self.devices}"
        return f"{where}{weights} {kind} {self.columns}"


def jobs() -> dict[str, list[Job]]:
    """The jobs by the name of their set."""
    both = [(refills, columns) for refills in (False, True) for columns in (64, 256)]

    def on(topology: str, axis: str, devices: int) -> list[Job]:
        return [Job(topology, axis, devices, *one) for one in both]

    split = Job("v5e:2x4", "fsdp", 8, refills=False, columns=256, split=True)
    return {
        "one_v5e": on("v5e:2x4", "data", 1),
        "data_v5e": on("v5e:2x4", "data", 8),
        "fsdp_v5e": on("v5e:2x4", "fsdp", 8),
        "split_v5e": [split],
        "one_v6e": on("v6e:2x4", "data", 1),
        "fsdp_v6e": on("v6e:2x4", "fsdp", 8),
    }


def main(
    sets: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    only: str = "",
    out: Path | None = Path("benchmarks/results/tpu_decode.jsonl"),
) -> None:
    """Compile the loops of some sets; the last line is JSON.

    Args:
      sets: names of `jobs`; all by default.
      only: a part of the name of the jobs that are meant.
      out: a file to which the line is appended.
    """
    describe_slices()
    chosen = [
        job for name in sets or jobs() for job in jobs()[name] if only in job.name
    ]
    rows = {job.name: measure(job) for job in chosen}
    show("decoding loops as compiled, MiB on each device, bytes per token", rows)
    line = {
        "benchmark": "tpu_decode",
        "sizes": [PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS],
        "rows": rows,
        "versions": own_versions() | versions("libtpu") | library_version(),
        **surroundings(),
    }
    publish(line, out)


def describe_slices() -> None:
    """Let libtpu compile without a TPU; before JAX is imported.

    Raises:
      RuntimeError: without libtpu.
    """
    given = os.environ.get("TPU_LIBRARY_PATH")
    missing = find_spec("libtpu") is None if given is None else not Path(given).exists()
    if missing:
        raise RuntimeError(
            f"TPU_LIBRARY_PATH is {given or 'not set'}, and libtpu is not there: it "
            "compiles for TPUs. Install the version that docs/tpu.md says, with `pip "
            "install --no-deps --target DIR`, then set TPU_LIBRARY_PATH to "
            "DIR/libtpu/libtpu.so."
        )
    # One process after another may hold the library, and JAX itself stays on the CPU.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    }


def library_version() -> dict[str, str]:
    """The version of a libtpu that lies in a folder of its own."""
    given = os.environ.get("TPU_LIBRARY_PATH")
    folder = Path(given).parents[1] if given else Path()
    found = [path.name for path in folder.glob("libtpu-*.dist-info")]
    return {"libtpu": found[0].split("-")[1].removesuffix(".dist")} if found else {}


def measure(job: Job) -> dict[str, Any]:
    """One row of the table: MiB of a device, and what the body of its loop does.

    Copies of arrays of the cache's size, gathers of weights, other collectives; bytes
    moved per token beside the floor; and the compiler's own estimate.
    """
    start = time.perf_counter()
    compiled, floor, cached = loop(job)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text())
    body = program.loop()
    inside = list(program.within(body))
    moved = sum(program.traffic(body).values())
    gathers = [x for x in communication(inside) if x.opcode.startswith("all-gather")]
    weights = [x for x in gathers if any(math.prod(y.shape) > MIB for y in x.result)]
    row = {
        "compile s": seconds,
        "temps": memory.temp_size_in_bytes / MIB,
        "args": memory.argument_size_in_bytes / MIB,
        "copies": len([x for x in inside if copies(x, cached)]),
        "gathers": len(weights),
        "others": len(communication(inside)) - len(weights),
        "moved": moved / MIB,
        "floor": floor / MIB,
        "ratio": moved / floor,
        "Mcycles": cycles(program, body) / 1e6,
    }
    print(job.name, row, flush=True)
    return row


def copies(one: Instruction, shapes: set[tuple[int, ...]]) -> bool:
    """Whether an instruction writes an array of the cache's size to main memory anew.

    A `copy-start` to the fast memory beside the cores is how a loop reads.
    """
    if one.opcode not in ("copy", "copy-start", "transpose"):
        return False
    new = one.result[0]
    return not new.fast and _sizes(new.shape) in shapes


def communication(inside: list[Instruction]) -> list[Instruction]:
    """The collective operations, each once."""
    kinds = {f"{name}{end}" for name in COLLECTIVES for end in ("", "-start")}
    return [x for x in inside if x.opcode in kinds]


def cycles(program: Program, body: str) -> int:
    """The compiler's own estimate for a token, without copies that overlap."""
    return sum(x.estimated_cycles for x in program.computations[body].values())


def loop(job: Job) -> tuple[Any, float, set[tuple[int, ...]]]:
    """The compiled loop, the bytes of its floor, and the shapes of the cache."""
    import jax
    import jax.numpy as jnp

    from grpo_jax.config import SamplingConfig
    from grpo_jax.models.config import ModelConfig
    from grpo_jax.models.decoder import Decoder
    from grpo_jax.rollout import _loop as loops
    from grpo_jax.rollout import _programs as programs
    from grpo_jax.rollout._settings import GroupSettings

    mesh = described_mesh(job)
    config = dataclasses.replace(ModelConfig.from_hf(QWEN), dtype="bfloat16")
    model, how = Decoder(config), {"unrolled": not job.split}
    made = functools.partial(_made, mesh)
    slots = PROMPTS * GROUP // job.devices
    waiting = slots // 2 + GROUP if job.refills else 0
    # Prompts of the slots, and of half as many completions behind them.
    rows = -(-(slots + slots // 2 * job.refills) // GROUP)
    params = parameters(model, mesh, split=job.split)
    given = {"params": params}
    ready = programs.with_given(made(programs.changed, model, given, **how), given)
    empty = functools.partial(made, programs.empty, model, parts=job.devices)
    cache = empty(rows=slots, columns=job.columns, unrolled=False)
    block = empty(rows=rows, columns=PROMPT_TOKENS, **how)
    of_parts = functools.partial(_by_part, mesh, job.devices)
    compiled = _compile(
        mesh,
        loops.advance,
        model,
        ready,
        of_parts(rows, config.hidden_size, dtype=jnp.bfloat16),
        block,
        cache,
        start(loops, of_parts, slots=slots, waiting=waiting),
        settings=GroupSettings(
            group_size=GROUP,
            max_new_tokens=NEW_TOKENS,
            sampling=SamplingConfig(),
            stop_ids=(config.vocab_size - 1,),
        ),
        turns=TURNS,
        impl="threefry2x32",
        aligned=not job.refills,
    )
    floor = _bytes(ready, job) + _bytes(block, job) + _bytes(cache, job) / 2
    local = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves((cache, block))]
    # Of a stack, a copy of one layer counts too.
    local += [shape[1:] for shape in local if len(shape) == 5]
    return compiled, floor, {_sizes(shape) for shape in local}


def described_mesh(job: Job) -> Any:
    """A mesh of devices that are only described."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from grpo_jax.parallel import mesh as meshes

    slice_ = topologies.get_topology_desc(
        platform="tpu", topology_name=job.topology
    ).devices
    sizes = [job.devices if axis == job.axis else 1 for axis in meshes.AXES]
    return Mesh(np.array(slice_[: job.devices]).reshape(sizes), meshes.AXES)


def parameters(model: Any, mesh: Any, *, split: bool) -> Any:
    """Shapes of the weights where a sampler has them."""
    import jax

    from grpo_jax.models.decoder import abstract_params, param_axes
    from grpo_jax.parallel import mesh as meshes
    from grpo_jax.parallel.collectives import whole_over_fsdp

    shapes = abstract_params(model)
    places = meshes.parameter_shardings(param_axes(model), shapes, mesh)
    if not split:
        places = jax.tree.map(whole_over_fsdp, places)
    return jax.tree.map(_placed, shapes, places)


def start(loops: Any, of_parts: Callable, *, slots: int, waiting: int) -> Any:
    """Shapes of where the loop begins."""
    import jax
    import jax.numpy as jnp

    def held(count: int) -> Any:
        numbers = of_parts(count)
        return loops.Held(*[numbers] * 3, of_parts(count, 2, dtype=jnp.uint32))

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return loops.Start(
        held=held(slots),
        fed=of_parts(slots),
        index=of_parts(slots),
        column=scalar,
        queue=held(waiting) if waiting else None,
        queued=of_parts(),
        floors=of_parts(),
        fewer=scalar,
    )


def _made(mesh: Any, function: Any, *arguments: Any, **options: Any) -> Any:
    """Shapes of what a program makes, where it lays them."""
    import jax

    compiled = _compile(mesh, function, *arguments, **options)
    return jax.tree.map(_placed, compiled.out_info, compiled.output_shardings)


def _compile(mesh: Any, function: Any, *arguments: Any, **options: Any) -> Any:
    import jax
    from flax import linen as nn

    from grpo_jax.parallel.mesh import RULES

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        return function.lower(*arguments, **options).compile()


def _by_part(mesh: Any, parts: int, *shape: int, dtype: Any = "int32") -> Any:
    import jax

    from grpo_jax.parallel.mesh import batch_sharding

    row = jax.ShapeDtypeStruct((parts, *shape), dtype)
    return _placed(row, batch_sharding(mesh))


def _placed(leaf: Any, place: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _bytes(tree: Any, job: Job) -> float:
    """Bytes that a device reads of all arrays: split weights are gathered first."""
    import jax

    leaves = jax.tree.leaves(tree)
    whole = job.split and leaves[0].ndim != 4 and len(leaves) > 2
    shapes = [x.shape if whole else x.sharding.shard_shape(x.shape) for x in leaves]
    return sum(
        math.prod(shape) * leaf.dtype.itemsize
        for shape, leaf in zip(shapes, leaves, strict=True)
    )


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape whatever the order of its axes."""
    return tuple(sorted(n for n in shape if n != 1))


if __name__ == "__main__":
    tyro.cli(main)
