"""Resolves what a run leaves to "auto": compute dtype, remat, sampler layout."""

import dataclasses

import jax
from jax.sharding import AbstractMesh, Mesh

from grpo_jax.config import TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params
from grpo_jax.planning.devices import has_bfloat16_products
from grpo_jax.planning.memory import activation_bytes, estimate

GIB = 2**30
# The share of a device's memory that arrays may fill. The runtime takes the rest, or it
# is lost between arrays.
USABLE = 0.92
# Parameters from which on bfloat16 was measured to win on a CPU.
_LARGE = 100_000_000
# Activations kept for the backward pass where the size of the memory is unknown.
_DEFAULT_ACTIVATIONS = 2 * GIB


def with_compute_dtype(
    model: ModelConfig, config: TrainConfig, *, accelerator: bool | None = None
) -> ModelConfig:
    """The model's configuration with the compute dtype of a run.

    `accelerator` says whether it runs on one; by default, where this process does.
    """
    dtype = compute_dtype(config, accelerator=accelerator)
    return dataclasses.replace(model, dtype=dtype, attention=config.attention)


def compute_dtype(config: TrainConfig, *, accelerator: bool | None = None) -> str:
    """The dtype of matrix products; `accelerator` as for `with_compute_dtype`."""
    if config.compute_dtype != "auto":
        return config.compute_dtype
    if accelerator is None:
        accelerator = jax.default_backend() != "cpu"
    return "bfloat16" if accelerator else "float32"


def for_updates(
    model: ModelConfig, config: TrainConfig, mesh: Mesh | AbstractMesh
) -> ModelConfig:
    """The model's configuration with the compute dtype of scoring and updates.

    It is that of the sampler, except on a CPU with fast products of bfloat16, if the
    run leaves the dtype open. There an update of a 135M model took a third less time,
    but decoding a quarter more. For small models this was not measured, and on a mesh
    the sampler's copy of the parameters is the learner's.
    """
    is_open = config.compute_dtype == "auto" and model.dtype == "float32"
    on_cpu = jax.default_backend() == "cpu" and mesh.size == 1
    if not (is_open and on_cpu and has_bfloat16_products()):
        return model
    shapes = jax.tree.leaves(abstract_params(Decoder(model)))
    if sum(leaf.size for leaf in shapes) < _LARGE:
        return model
    return dataclasses.replace(model, dtype="bfloat16")


def resolve_auto(
    model: ModelConfig,
    config: TrainConfig,
    mesh: Mesh | AbstractMesh,
    *,
    limit: int | None,
) -> tuple[ModelConfig, TrainConfig]:
    """Model and run with a value instead of each "auto".

    The sampler gathers its parameters if the rollout then fits into `limit` bytes. Of
    the remat modes none, dots and layer, the first that fits is taken.

    Without a limit, as on a CPU, the sampler gathers its parameters. Remat is dots,
    unless these activations take more than 2 GiB: on a CPU it takes longer to keep all
    activations than to recompute the cheap ones.
    """
    if config.mesh.sampler == "auto":
        fits = limit is None or estimate(model, config, mesh).total("rollout") <= limit
        sampler = "gathered" if fits else "split"
        layout = dataclasses.replace(config.mesh, sampler=sampler)
        config = dataclasses.replace(config, mesh=layout)
    if config.remat != "auto":
        return dataclasses.replace(model, remat=config.remat), config
    for remat in ("dots", "layer") if limit is None else ("none", "dots", "layer"):
        model = dataclasses.replace(model, remat=remat)
        if limit is None:
            fits = activation_bytes(model, config, mesh) <= _DEFAULT_ACTIVATIONS
        else:
            fits = estimate(model, config, mesh).total("update") <= limit
        if fits:
            break
    return model, dataclasses.replace(config, remat=model.remat)


def device_memory(mesh: Mesh) -> int | None:
    """Usable bytes of the smallest local device; None if unknown, as on a CPU.

    In whole GiB, so that processes with equal devices make equal choices. They cannot
    ask each other, since another process may just be failing.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    smallest = min(one.get("bytes_limit", 0) for one in stats)
    return int(USABLE * smallest / GIB) * GIB or None
