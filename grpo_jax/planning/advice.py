"""Plans a run from its configuration, and suggests flags that save memory."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from grpo_jax.config import TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.limits import check_stop_ids, experts_per_token, longest_prompt
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.devices import find_device
from grpo_jax.planning.memory import estimate, evaluation_batch
from grpo_jax.planning.resolve import GIB, USABLE, resolve_auto, with_compute_dtype
from grpo_jax.weights.pretrained import load_without_weights, read_model_config


def _memory_savings(
    model: ModelConfig, config: TrainConfig, mesh: Mesh | AbstractMesh
) -> dict[str, int]:
    """Flags of `grpo-jax train` and the bytes that each saves at the peak, most first.

    Flags that save less than a hundredth are left out.
    """
    before = estimate(model, config, mesh).peak
    saved: dict[str, int] = {}
    for flags, changed in _candidates(model, config, mesh):
        other = dataclasses.replace(model, remat=changed.remat)
        sizes = [vars(changed.mesh)[axis] for axis in meshes.AXES]
        try:
            place = _mesh_of(changed, math.prod(sizes), meshes.device_of(mesh))
            saved[flags] = before - estimate(other, changed, place).peak
        except ValueError:  # the model or the batch does not divide over this mesh
            continue
    useful = {flags: size for flags, size in saved.items() if size > before // 100}
    return dict(sorted(useful.items(), key=lambda item: -item[1]))


def _candidates(
    model: ModelConfig, config: TrainConfig, mesh: Mesh | AbstractMesh
) -> list[tuple[str, TrainConfig]]:
    """Flags that may save memory, and the configuration that each of them makes."""
    data, fsdp, tensor = (mesh.shape[axis] for axis in meshes.AXES)
    layout = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor)
    config = dataclasses.replace(config, remat=model.remat, mesh=layout)
    smallest = config.group_size * meshes.batch_shards(mesh)
    sequences = config.prompts_per_update * config.group_size
    default = dataclasses.replace(config, eval_batch_size=None)
    batch = config.eval_batch_size and evaluation_batch(model, default, mesh)
    offload = (*layout.offload, "optimizer")
    half = config.max_new_tokens // 2
    lora = dataclasses.replace(config.lora, rank=16)
    int8 = dataclasses.replace(lora, rank=config.lora.rank or 16, base_dtype="int8")
    plain = config.lora.rank is not None and config.lora.quantized is None
    quantizable = plain and model.experts is None
    # Whether they apply, the flags, and what they change in the run and in its mesh.
    rows: list[tuple[Any, str, dict[str, Any], dict[str, Any]]] = [
        (model.remat == "none", "--remat dots", {"remat": "dots"}, {}),
        (model.remat != "layer", "--remat layer", {"remat": "layer"}, {}),
        (
            smallest < (config.microbatch_size or sequences)
            and sequences % smallest == 0,
            f"--microbatch-size {smallest}",
            {"microbatch_size": smallest},
            {},
        ),
        (
            fsdp > 1 and layout.sampler != "split",
            "--mesh.sampler split",
            {},
            {"sampler": "split"},
        ),
        (
            "optimizer" not in layout.offload and layout.mode == "jit",
            f"--mesh.offload {' '.join(offload)}",
            {},
            {"offload": offload},
        ),
        (config.lora.rank is None, "--lora.rank 16", {"lora": lora}, {"offload": ()}),
        (quantizable, "--lora.base-dtype int8", {"lora": int8}, {}),
        (batch, f"--eval-batch-size {batch}", {"eval_batch_size": batch}, {}),
        (half, f"--max-new-tokens {half}", {"max_new_tokens": half}, {}),
    ]
    shapes = [
        (data > 1, (1, data * fsdp, tensor)),
        (fsdp % 2 == 0, (data, fsdp // 2, 2 * tensor)),
        (True, (data, 2 * fsdp, tensor)),
    ]
    for applies, shape in shapes:
        sizes: dict[str, Any] = dict(zip(meshes.AXES, shape, strict=True))
        text = " ".join(f"--mesh.{axis} {size}" for axis, size in sizes.items())
        rows.append((applies, f"{text} on {math.prod(shape)} devices", {}, sizes))
    return [
        (
            flags,
            dataclasses.replace(
                config, **changes, mesh=dataclasses.replace(layout, **mesh_changes)
            ),
        )
        for applies, flags, changes, mesh_changes in rows
        if applies
    ]


def memory_warning(
    model: ModelConfig,
    config: TrainConfig,
    mesh: Mesh | AbstractMesh,
    *,
    limit: int | None,
) -> str | None:
    """A warning, with the best savings, for a run that does not fit into `limit` bytes.

    None if it fits, or if the limit is unknown.
    """
    if limit is None or (needed := estimate(model, config, mesh).peak) <= limit:
        return None
    savings = list(_memory_savings(model, config, mesh).items())[:4]
    best = ", ".join(f"{flags} (-{size / GIB:.1f})" for flags, size in savings)
    return (
        f"this run needs about {needed / GIB:.1f} GiB on each device, but only "
        f"{limit / GIB:.1f} are usable; these flags save most: {best}"
    )


def make_plan(
    config: TrainConfig,
    *,
    devices: int | None = None,
    device: str | None = None,
    memory_gib: float | None = None,
) -> dict[str, Any]:
    """The memory that a run needs on each device, as plain values; sizes in bytes.

    Reads the model's configuration, but no tensor. If the other files of the model are
    here, they are checked as a run checks them.

    Args:
      devices: how many; by default those of the slice that `device` names, else the
        product of the mesh's sizes or, where one of them is open, the devices of this
        machine.
      device: a name in `DEVICES`, or the type of a TPU slice such as v5p-16. It sets
        the memory, and the compute dtype to bfloat16.
      memory_gib: the memory of one device, instead of that of `device`.

    Raises:
      ValueError: if the device is unknown, the model cannot be read, or the mesh does
        not fit.
    """
    model, config, mesh, limit = resolve_run(
        config, devices=devices, device=device, memory_gib=memory_gib
    )
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
        "knobs": _memory_savings(model, config, mesh),
        "refused": _refused(model, config),
    }


def resolve_run(
    config: TrainConfig,
    *,
    devices: int | None = None,
    device: str | None = None,
    memory_gib: float | None = None,
) -> tuple[ModelConfig, TrainConfig, AbstractMesh, int | None]:
    """Model, run, mesh and usable bytes, with a value instead of each "auto".

    Arguments and errors are those of `make_plan`.
    """
    kind = None
    if device is not None:
        kind, devices, memory_gib = _size_of(device, devices, memory_gib)
    limit = None if memory_gib is None else int(USABLE * memory_gib * GIB)
    sizes = [vars(config.mesh)[axis] for axis in meshes.AXES]
    devices = devices or (jax.device_count() if -1 in sizes else math.prod(sizes))
    mesh = _mesh_of(config, devices, kind)
    accelerator = None if device is None else True
    model = with_compute_dtype(
        _read_model(config.model), config, accelerator=accelerator
    )
    model, config = resolve_auto(model, config, mesh, limit=limit)
    return model, config, mesh, limit


def _size_of(
    device: str, devices: int | None, memory_gib: float | None
) -> tuple[AbstractDevice, int | None, float]:
    """A device, and number and memory of such devices unless they are given."""
    known, count = find_device(device)
    if count is not None and devices not in (None, count):
        raise ValueError(
            f"a {device} has {count} devices, got {devices}; leave the number out."
        )
    return known.described, devices or count, memory_gib or known.memory_gib


def _mesh_of(
    config: TrainConfig, devices: int, device: AbstractDevice | None
) -> AbstractMesh:
    """The mesh of a run over so many devices. Raises ValueError if it does not fit."""
    mesh = meshes.abstract_mesh(config.mesh, devices, device)
    meshes.check_batch(
        mesh,
        config.prompts_per_update,
        group_size=config.group_size,
        microbatch_size=config.microbatch_size,
        mode=config.mesh.mode,
    )
    return mesh


def _read_model(name: str) -> ModelConfig:
    """A model's configuration. Raises what loading would raise without the weights.

    A folder with only a config.json, or a name on the hub, can be planned too.
    """
    path = Path(name).expanduser()
    is_whole = path.is_file() or any(path.glob("*.safetensors"))
    return load_without_weights(name)[0] if is_whole else read_model_config(name)


def _refused(model: ModelConfig, config: TrainConfig) -> str | None:
    """The error of a run whose lengths, stop tokens or loss do not suit the model."""
    try:
        check_stop_ids(config.sampling.stop_ids or (), vocab_size=model.vocab_size)
        longest_prompt(
            config.max_prompt_tokens,
            new_tokens=config.max_new_tokens,
            context=model.max_position_embeddings,
        )
        if config.objective.router_aux_loss_coef:
            experts_per_token(Decoder(model))
    except ValueError as error:
        return str(error)
    return None
