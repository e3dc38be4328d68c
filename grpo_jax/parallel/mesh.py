"""The device mesh, what lies where on it, and the start of several processes.

Three axes: ``data`` repeats parameters, ``fsdp`` splits them and the batch, ``tensor``
splits single matrices. Names of array axes are mapped to them by one table, `RULES`.
"""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax.linen import spmd
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from grpo_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Where two names of one array claim a mesh axis, the name
# that stands first here gets it: activations are split by batch, parameters by embed.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
)


def make_mesh(config: MeshConfig, *, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices (or of `devices`) with axes data, fsdp, tensor.

    Under mode "pmap", which repeats parameters, fsdp is a part of data.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices; the message
        names sizes that do.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices) or -1 in sizes:
        wanted = " x ".join(
            f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True)
        )
        raise ValueError(
            f"mesh {wanted} does not fit {len(devices)} devices; use data 1, fsdp -1, "
            "tensor 1, or sizes whose product is the number of devices."
        )
    if config.mode == "pmap":
        sizes = [len(devices), 1, 1]
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp, the rest whole."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, P())


def parameter_shardings(axes: PyTree, shapes: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of each parameter, from its logical axes.

    Args:
      axes: tree of tuples of logical names (or None), one per axis of the array.
      shapes: the same tree of arrays or `ShapeDtypeStruct`.

    Raises:
      ValueError: for a parameter whose axis a mesh axis does not divide, naming it.
    """

    def place(path: tuple, logical: tuple, leaf: Any) -> NamedSharding:
        spec = spmd.logical_to_mesh_axes(logical, RULES)
        sharding = NamedSharding(mesh, spec or P())
        _check_divides(
            jax.tree_util.keystr(path, simple=True, separator="/"), leaf, sharding
        )
        return sharding

    return jax.tree_util.tree_map_with_path(
        place, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


def _check_divides(name: str, leaf: Any, sharding: NamedSharding) -> None:
    for size, axes in zip(leaf.shape, tuple(sharding.spec), strict=False):
        named = (axes,) if isinstance(axes, str) else axes or ()
        parts = int(np.prod([sharding.mesh.shape[axis] for axis in named]))
        if size % parts:
            fits = max(d for d in range(1, parts) if size % d == 0)
            raise ValueError(
                f"{name} {tuple(leaf.shape)}: {size} cannot be split over "
                f"{' x '.join(named)} = {parts} devices; {fits} would fit."
            )


def to_mesh(mesh: Mesh, rows: PyTree) -> PyTree:
    """Host arrays as global arrays split over the batch axes by their leading axis.

    Each process gives its own rows; together they make the global batch, in the order
    of the processes.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)),
        rows,
    )


def whole_to_mesh(mesh: Mesh, rows: PyTree) -> PyTree:
    """Host arrays that every process holds whole, split over the batch axes."""
    sharding = batch_sharding(mesh)

    def place(leaf: np.ndarray) -> Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda at: leaf[at])

    return jax.tree.map(place, rows)


def gather(values: PyTree) -> PyTree:
    """The whole of global arrays, on every process, as NumPy."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, values)
    return multihost_utils.process_allgather(values, tiled=True)


def gather_rows(rows: PyTree) -> PyTree:
    """Every process's rows of host arrays, in the order of the processes."""
    if jax.process_count() == 1:
        return rows
    return multihost_utils.process_allgather(rows, tiled=True)


def gather_lists(values: list[Any]) -> list[Any]:
    """Every process's list of JSON values, joined in the order of the processes."""
    if jax.process_count() == 1:
        return values
    text = np.frombuffer(json.dumps(values).encode(), np.uint8)
    sizes = gather_rows(np.array([text.size]))
    padded = np.zeros((1, sizes.max()), np.uint8)
    padded[0, : text.size] = text
    texts = zip(gather_rows(padded), sizes, strict=True)
    return [value for row, size in texts for value in json.loads(row[:size].tobytes())]


def to_first(values: PyTree) -> PyTree:
    """Global arrays as NumPy on the first process, None for each on the others.

    One array at a time, so that the others never hold them all.
    """
    if jax.process_count() == 1:
        return values
    first = jax.process_index() == 0

    def fetch(leaf: Array) -> np.ndarray | None:
        whole = gather(leaf)
        return whole if first else None

    return jax.tree.map(fetch, values)


def check_processes(mesh: Mesh, mode: Literal["jit", "pmap"]) -> None:
    """Refuse a mesh in which several processes hold the same rows of a batch.

    Each process makes rows of its own and has them rewarded: no two may differ about
    one row.

    Raises:
      ValueError: naming a size of the tensor axis that fits; for "pmap" on several
        processes.
    """
    if mode == "pmap" and jax.process_count() > 1:
        raise ValueError(
            "mesh.mode 'pmap' is for one process; mode 'jit' with data -1 and fsdp 1 "
            "is the same data parallelism on several."
        )
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    if (owners != owners[..., :1]).any():
        fits = np.gcd(mesh.shape["tensor"], len(mesh.local_devices))
        raise ValueError(
            f"mesh.tensor {mesh.shape['tensor']} reaches over processes, of which each "
            f"has {len(mesh.local_devices)} devices; use {fits}."
        )


def check_batch(mesh: Mesh, prompts: int) -> None:
    """Refuse a number of prompts per update that the mesh does not divide.

    Raises:
      ValueError: naming the nearest number that fits.
    """
    parts = batch_shards(mesh)
    if prompts % parts:
        fits = max(round(prompts / parts), 1) * parts
        raise ValueError(
            f"{prompts} prompts per update cannot be split over data x fsdp = {parts} "
            f"devices; use {fits}."
        )


def to_host(values: PyTree) -> PyTree:
    """This process's rows of arrays that are split by their leading axis, as NumPy."""

    def fetch(leaf: Array) -> np.ndarray:
        if leaf.is_fully_addressable:
            return np.asarray(leaf)
        parts = {
            shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards
        }
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(fetch, values)


def initialize_processes(config: MeshConfig) -> None:
    """Join the other processes of a run, if there are any.

    Explicit settings come from the configuration or from ``GRPO_COORDINATOR``,
    ``GRPO_NUM_PROCESSES`` and ``GRPO_PROCESS_ID``. Without them JAX asks the TPU,
    SLURM, Open MPI or Kubernetes; where none is found the process is alone.
    A runtime that is already initialized is left as it is.

    Raises:
      ValueError: if only some of the three settings are given.
    """
    if jax.distributed.is_initialized():
        return
    given = {
        "coordinator": config.coordinator or os.environ.get("GRPO_COORDINATOR"),
        "num_processes": _number(config.num_processes, "GRPO_NUM_PROCESSES"),
        "process_id": _number(config.process_id, "GRPO_PROCESS_ID"),
    }
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        jax.distributed.initialize(
            given["coordinator"], given["num_processes"], given["process_id"]
        )
    elif len(missing) < len(given):
        raise ValueError(
            f"mesh.{', mesh.'.join(missing)} must be given too: coordinator, "
            "num_processes and process_id belong together."
        )
    elif _in_cluster():
        jax.distributed.initialize()


def _number(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or text is None:
        return value
    if not text.isdigit():
        raise ValueError(f"{variable} must be a number, got {text!r}.")
    return int(text)


def _in_cluster() -> bool:
    """Whether JAX can find the other processes, or that there are none, by itself."""
    env = os.environ
    slurm = int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env
    open_mpi = int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    kubernetes = "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env
    return _on_tpu() or slurm or open_mpi or kubernetes


def _on_tpu() -> bool:
    """Whether JAX will use TPUs of this machine; asking it would start the backend."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    return "tpu" in wanted and bool(chips) and find_spec("libtpu") is not None
