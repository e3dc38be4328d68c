"""Compiles the programs of a run for a slice, from the configuration alone."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from grpo_jax.config import TrainConfig
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.advice import make_plan, resolve_run
from grpo_jax.planning.compiled import measure, summarize
from grpo_jax.planning.devices import DEVICES
from grpo_jax.planning.slices import devices_of, find_target
from grpo_jax.training._lowered import lowered_programs


def compile_plan(
    config: TrainConfig,
    target: str,
    *,
    devices: int | None = None,
    memory_gib: float | None = None,
    phases: tuple[str, ...] = (),
    announce: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The plan of `make_plan`, and under ``compiled`` what the compiler says.

    It compiles the programs that a run with these flags would run; nothing is loaded
    and nothing runs. Minutes for a slice of TPUs.

    Args:
      target: v5e:2x4 and the like, cpu or gpu; see `planning.slices`.
      devices: how many, for cpu and gpu; a slice has those that its name says.
      memory_gib: the memory of one device, instead of that of the slice.
      phases: those to compile; all by default.
      announce: receives a line before each program is compiled.

    Raises:
      ValueError: for what `make_plan` refuses; for a target that is not known, whose
        number of devices is another, or for which nothing can be compiled here.
    """
    chosen = find_target(target)
    if chosen.count is not None and devices not in (None, chosen.count):
        raise ValueError(
            f"--compile {target} has {chosen.count} devices, got {devices}; leave "
            "--devices out."
        )
    known = None if chosen.device is None else DEVICES[chosen.device]
    sizes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    whole = None if -1 in sizes else math.prod(sizes)
    given: dict[str, Any] = {
        "devices": chosen.count or devices,
        "device": chosen.device,
        "memory_gib": memory_gib,
    }
    rows = []
    with devices_of(chosen, devices or whole) as find:
        model, resolved, abstract, limit = resolve_run(config, **given)
        made = make_plan(config, **given)
        if made["refused"] is not None:
            raise ValueError(made["refused"])
        grid = np.array(find(abstract.size)).reshape(abstract.axis_sizes)
        mesh = Mesh(grid, meshes.AXES, axis_types=abstract.axis_types)
        for program in lowered_programs(model, resolved, mesh):
            if not phases or program.phase in phases:
                announce(f"compiling {program.phase}: {program.name}")
                rows.append(measure(program, known))
    return made | {
        "compiled": summarize(rows, made["totals"], limit) | {"target": target}
    }
