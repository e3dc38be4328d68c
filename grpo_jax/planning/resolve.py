"""What fits where: choices that follow from the memory of the devices, and advice."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from grpo_jax.config import TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.limits import check_stop_ids, longest_prompt
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.devices import find_device
from grpo_jax.planning.memory import activation_bytes, estimate, evaluation_batch
from grpo_jax.weights.pretrained import load_without_weights, read_model_config

GIB = 2**30
# The share of a device's memory that arrays may fill; the rest is the runtime's or lost
# between them.
USABLE = 0.92
# Activations kept for the backward pass where the memory is not known.
_MODEST = 2 * GIB

_Place = Mesh | AbstractMesh
# What a knob makes of model, run and mesh.
_Turned = tuple[ModelConfig, TrainConfig, _Place]


def for_run(
    model: ModelConfig, config: TrainConfig, *, accelerator: bool | None = None
) -> ModelConfig:
    """The model's configuration with the compute dtype of a run.

    `accelerator` says whether it runs on one; by default, where this process does.
    """
    return dataclasses.replace(
        model, dtype=compute_dtype(config, accelerator=accelerator)
    )


def compute_dtype(config: TrainConfig, *, accelerator: bool | None = None) -> str:
    """The number type of matrix products; `accelerator` as for `for_run`."""
    if config.compute_dtype != "auto":
        return config.compute_dtype
    if accelerator is None:
        accelerator = jax.default_backend() != "cpu"
    return "bfloat16" if accelerator else "float32"


def settled(
    model: ModelConfig, config: TrainConfig, mesh: _Place, *, limit: int | None
) -> tuple[ModelConfig, TrainConfig]:
    """Model and run with a choice in place of each "auto".

    The sampler's parameters are gathered if the rollout then fits into `limit` bytes;
    of the ways to recompute, the first that fits is taken: none, dots, layer. Without a
    limit (memory that is not known, as on a CPU) parameters are gathered, and products
    are kept unless they take more than 2 GiB: on a CPU to keep all the rest as well
    takes longer than to compute it again.
    """
    if config.mesh.sampler == "auto":
        fits = limit is None or estimate(model, config, mesh).total("rollout") <= limit
        config = _on_mesh(config, sampler="gathered" if fits else "split")
    if config.remat != "auto":
        return dataclasses.replace(model, remat=config.remat), config
    for remat in ("dots", "layer") if limit is None else ("none", "dots", "layer"):
        model = dataclasses.replace(model, remat=remat)
        if limit is None:
            fits = activation_bytes(model, config, mesh) <= _MODEST
        else:
            fits = estimate(model, config, mesh).total("update") <= limit
        if fits:
            break
    return model, dataclasses.replace(config, remat=model.remat)


def knobs(model: ModelConfig, config: TrainConfig, mesh: _Place) -> dict[str, int]:
    """What could be changed, and the bytes that it saves at the peak, most first.

    Flags of `grpo-jax train`; what saves less than a hundredth is left out.
    """
    before = estimate(model, config, mesh).peak
    saved: dict[str, int] = {}
    for name, (other, changed, place) in _turned(model, config, mesh):
        saved[name] = before - estimate(other, changed, place).peak
    useful = {name: size for name, size in saved.items() if size > before // 100}
    return dict(sorted(useful.items(), key=lambda item: -item[1]))


def advice(
    model: ModelConfig, config: TrainConfig, mesh: _Place, *, limit: int
) -> str | None:
    """A warning, with the knobs, for a run that will not fit into `limit` bytes."""
    needed = estimate(model, config, mesh).peak
    if needed <= limit:
        return None
    turned = [
        f"{name} (-{size / GIB:.1f})"
        for name, size in list(knobs(model, config, mesh).items())[:4]
    ]
    return (
        f"this run needs about {needed / GIB:.1f} GiB on each device, of which "
        f"{limit / GIB:.1f} are usable; what would save most: {', '.join(turned)}"
    )


def device_memory(mesh: Mesh) -> int | None:
    """Usable bytes of the smallest device here; None where it is not told, as on CPU.

    Whole GiB, so that processes whose devices are alike choose alike: they must not
    ask each other, since another may just be failing.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    smallest = min(one.get("bytes_limit", 0) for one in stats)
    return int(USABLE * smallest / GIB) * GIB or None


def make_plan(
    config: TrainConfig,
    *,
    devices: int | None = None,
    device: str | None = None,
    memory_gib: float | None = None,
) -> dict[str, Any]:
    """What a run needs on each device, as plain values; sizes in bytes.

    The model's configuration is read, and no tensor. Where its other files are here,
    they are checked as a run checks them.

    Args:
      devices: how many; by default those of the slice that `device` names, else the
        product of the mesh's sizes or, where one of them is open, the devices of this
        machine.
      device: a name in `DEVICES`, which gives the memory and computes in bfloat16, or
        the type of a TPU slice, such as v5p-16.
      memory_gib: or the memory of one device.

    Raises:
      ValueError: for a device that is not known, a model that cannot be read, or a mesh
        that does not fit.
    """
    if device is not None:
        known, count = find_device(device)
        if count is not None and devices not in (None, count):
            raise ValueError(
                f"a {device} has {count} devices, got {devices}; leave the number out."
            )
        devices = devices or count
        memory_gib = memory_gib or known.memory_gib
    limit = None if memory_gib is None else int(USABLE * memory_gib * GIB)
    mesh = meshes.abstract_mesh(config.mesh, devices or _count(config))
    meshes.check_batch(
        mesh,
        config.prompts_per_update,
        group_size=config.group_size,
        microbatch_size=config.microbatch_size,
        mode=config.mesh.mode,
    )
    accelerator = None if device is None else True
    model = for_run(_read_model(config.model), config, accelerator=accelerator)
    model, config = settled(model, config, mesh, limit=limit)
    made = estimate(model, config, mesh)
    return {
        "model": config.model,
        "mesh": dict(mesh.shape),
        "compute_dtype": model.dtype,
        "remat": model.remat,
        "sampler": config.mesh.sampler,
        "always": dict(made.always),
        "phases": {name: dict(sizes) for name, sizes in made.phases.items()},
        "totals": {name: made.total(name) for name in made.phases},
        "peak": made.peak,
        "usable": limit,
        "fits": None if limit is None else made.peak <= limit,
        "knobs": knobs(model, config, mesh),
        "refused": _refused(model, config),
    }


def _read_model(name: str) -> ModelConfig:
    """A model's configuration; what loading would refuse without its weights is told.

    A folder with a config.json alone, and a name on the hub, can be planned too.
    """
    path = Path(name).expanduser()
    is_whole = path.is_file() or any(path.glob("*.safetensors"))
    return load_without_weights(name)[0] if is_whole else read_model_config(name)


def _refused(model: ModelConfig, config: TrainConfig) -> str | None:
    """What a run would say of lengths or stop tokens that the model has no room for."""
    try:
        check_stop_ids(config.sampling.stop_ids or (), vocab_size=model.vocab_size)
        longest_prompt(
            config.max_prompt_tokens,
            new_tokens=config.max_new_tokens,
            context=model.max_position_embeddings,
        )
    except ValueError as error:
        return str(error)
    return None


def _count(config: TrainConfig) -> int:
    """The devices that a mesh is of; those that are here, where a size is open."""
    sizes = [vars(config.mesh)[axis] for axis in meshes.AXES]
    return jax.device_count() if -1 in sizes else math.prod(sizes)


def _turned(
    model: ModelConfig, config: TrainConfig, mesh: _Place
) -> Iterator[tuple[str, _Turned]]:
    """The knobs that can be turned, by their flags."""
    for flags, changed in _settings(model, config, mesh):
        other = dataclasses.replace(model, remat=changed.remat)
        yield flags, (other, changed, mesh)
    for flags, sizes in _layouts(mesh):
        changed = _on_mesh(config, **sizes)
        try:
            place = meshes.abstract_mesh(changed.mesh, int(np.prod([*sizes.values()])))
            meshes.check_batch(
                place,
                changed.prompts_per_update,
                group_size=changed.group_size,
                microbatch_size=changed.microbatch_size,
                mode=changed.mesh.mode,
            )
            estimate(model, changed, place)
        except ValueError:  # it does not divide
            continue
        yield flags, (model, changed, place)


def _settings(
    model: ModelConfig, config: TrainConfig, mesh: _Place
) -> Iterator[tuple[str, TrainConfig]]:
    config = dataclasses.replace(config, remat=model.remat)

    def replaced(**changes: Any) -> TrainConfig:
        return dataclasses.replace(config, **changes)

    if model.remat == "none":
        yield "--remat dots", replaced(remat="dots")
    if model.remat != "layer":
        yield "--remat layer", replaced(remat="layer")
    smallest = config.group_size * meshes.batch_shards(mesh)
    sequences = config.prompts_per_step // config.minibatches * config.group_size
    if smallest < (config.microbatch_size or sequences) and not sequences % smallest:
        yield f"--microbatch-size {smallest}", replaced(microbatch_size=smallest)
    if mesh.shape["fsdp"] > 1 and config.mesh.sampler != "split":
        yield "--mesh.sampler split", _on_mesh(config, sampler="split")
    kept = config.mesh.offload
    if "optimizer" not in kept and config.mesh.mode == "jit":
        more = (*kept, "optimizer")
        yield f"--mesh.offload {' '.join(more)}", _on_mesh(config, offload=more)
    if config.lora.rank is None:
        lora = dataclasses.replace(config.lora, rank=16)
        bare = dataclasses.replace(config.mesh, offload=())
        yield "--lora.rank 16", replaced(lora=lora, mesh=bare)
    if config.eval_batch_size is not None:
        batch = evaluation_batch(model, replaced(eval_batch_size=None), mesh)
        yield f"--eval-batch-size {batch}", replaced(eval_batch_size=batch)
    if config.max_new_tokens > 1:
        half = config.max_new_tokens // 2
        yield f"--max-new-tokens {half}", replaced(max_new_tokens=half)


def _layouts(mesh: _Place) -> Iterator[tuple[str, dict[str, int]]]:
    sizes = dict(mesh.shape)
    data, fsdp, tensor = (sizes[axis] for axis in meshes.AXES)
    if data > 1:
        yield _flags(data=1, fsdp=data * fsdp, tensor=tensor)
    if fsdp % 2 == 0:
        yield _flags(data=data, fsdp=fsdp // 2, tensor=2 * tensor)
    yield _flags(data=data, fsdp=2 * fsdp, tensor=tensor)


def _flags(**sizes: int) -> tuple[str, dict[str, int]]:
    text = " ".join(f"--mesh.{axis} {size}" for axis, size in sizes.items())
    return f"{text} on {np.prod([*sizes.values()])} devices", sizes


def _on_mesh(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **changes))
