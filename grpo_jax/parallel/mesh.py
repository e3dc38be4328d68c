"""The device mesh, shardings on it, and the transfer of arrays to it and back.

The mesh has three axes: ``data`` replicates parameters and splits the batch, ``fsdp``
splits both, ``tensor`` splits single matrices. One table, `RULES`, maps the names of
array axes to mesh axes.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax.linen import spmd
from jax.experimental import multihost_utils
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
)
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from grpo_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. If two axes of an array would take the same mesh axis, the
# one that is first here gets it: activations are split by batch, parameters by embed.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("rows", "data"),  # a batch whose other axes are split over fsdp
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
)


def make_mesh(config: MeshConfig, *, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices (or of `devices`) with axes data, fsdp, tensor.

    Raises:
      ValueError: if the sizes in `config` do not fit the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _mesh_sizes(config, len(devices))
    return jax.make_mesh(
        sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def abstract_mesh(
    config: MeshConfig, count: int, device: AbstractDevice | None = None
) -> AbstractMesh:
    """The mesh of `count` devices, which need not exist: for shapes and shardings.

    `device` is what they are, as far as it is known. A model may have kernels for it.

    Raises:
      ValueError: if the sizes in `config` do not fit the number of devices.
    """
    sizes, types = _mesh_sizes(config, count), (AxisType.Auto,) * len(AXES)
    return AbstractMesh(sizes, AXES, axis_types=types, abstract_device=device)


def device_of(mesh: Mesh | AbstractMesh) -> AbstractDevice | None:
    """What the devices of a mesh are; None if it is not known."""
    return (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).abstract_device


def _mesh_sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    """The sizes of the axes data, fsdp and tensor over `count` devices.

    Under mode "pmap", which replicates parameters, fsdp is a part of data.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices; the message
        names sizes that do.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if int(np.prod(sizes)) != count or -1 in sizes:
        wanted = " x ".join(
            f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True)
        )
        raise ValueError(
            f"mesh {wanted} does not fit {count} devices; use data 1, fsdp -1, "
            "tensor 1, or sizes whose product is the number of devices."
        )
    return (count, 1, 1) if config.mode == "pmap" else tuple(sizes)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts into which the mesh splits a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp, the rest whole."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, P())


def parameter_shardings(
    axes: PyTree, shapes: PyTree, mesh: Mesh | AbstractMesh
) -> PyTree:
    """The sharding of each parameter, from its logical axes.

    Args:
      axes: tree of tuples of logical names (or None), one per axis of the array.
      shapes: the same tree of arrays or `ShapeDtypeStruct`.

    Raises:
      ValueError: for a parameter whose axis a mesh axis does not divide, naming it.
    """

    def place(path: tuple, logical: tuple, leaf: Any) -> NamedSharding:
        sharding = NamedSharding(mesh, spmd.logical_to_mesh_axes(logical, RULES) or P())
        for size, axes in zip(leaf.shape, tuple(sharding.spec), strict=False):
            named = (axes,) if isinstance(axes, str) else axes or ()
            parts = int(np.prod([mesh.shape[axis] for axis in named]))
            if size % parts:
                fits = max(d for d in range(1, parts) if size % d == 0)
                raise ValueError(
                    f"{path_name(path)} {tuple(leaf.shape)}: {size} cannot be split "
                    f"over {' x '.join(named)} = {parts} devices; {fits} would fit."
                )
        return sharding

    return jax.tree_util.tree_map_with_path(
        place, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, as in ``layers/attn/q/kernel``, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path: tuple[Any, ...]) -> str:
    """The keys of a leaf's path in a tree, joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


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


def gather(values: PyTree) -> PyTree:
    """The whole of global arrays, on every process, as NumPy."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, values)
    return multihost_utils.process_allgather(values, tiled=True)


def gather_rows(rows: PyTree) -> PyTree:
    """Every process's rows of host arrays, in the order of the processes."""
    if jax.process_count() == 1:
        return rows
    whole = jax.tree.map(np.ascontiguousarray, rows)
    # As bytes: JAX would round numbers of 64 bits.
    sent = jax.tree.map(lambda leaf: leaf[..., None].view(np.uint8), whole)
    gathered = multihost_utils.process_allgather(sent, tiled=True)
    return jax.tree.map(
        lambda leaf, got: np.ascontiguousarray(got).view(leaf.dtype)[..., 0],
        whole,
        gathered,
    )


def own_share(count: int) -> slice:
    """The slice of `count` items that belongs to this process.

    The slices of all processes, in their order, are all items. Their sizes differ by
    one at most; one may be empty.
    """
    number, processes = jax.process_index(), jax.process_count()
    return slice(count * number // processes, count * (number + 1) // processes)


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

    One array at a time, so that the others never hold them all. What is no array of JAX
    is converted, by all of them.
    """
    if jax.process_count() == 1:
        return values
    first = jax.process_index() == 0

    def fetch(leaf: Array) -> np.ndarray | None:
        whole = gather(leaf) if isinstance(leaf, Array) else np.asarray(leaf)
        return whole if first else None

    return jax.tree.map(fetch, values)


def check_processes(mesh: Mesh, mode: Literal["jit", "pmap"]) -> None:
    """Refuse a mesh in which several processes hold the same rows of a batch.

    Each process samples and rewards its own rows. Two processes that share a row could
    give it different rewards.

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


def check_batch(
    mesh: Mesh | AbstractMesh,
    prompts: int,
    *,
    group_size: int,
    microbatch_size: int | None,
    mode: Literal["jit", "pmap"],
) -> None:
    """Refuse an update of `prompts` groups, or a microbatch, that does not divide.

    Raises:
      ValueError: naming the nearest number that fits.
    """
    parts = batch_shards(mesh)
    over = f"cannot be split over data x fsdp = {parts} devices; use"
    if prompts % parts:
        fits = max(round(prompts / parts), 1) * parts
        raise ValueError(f"{prompts} prompts per update {over} {fits}.")
    if microbatch_size is None:
        return
    held = max(microbatch_size // group_size, 1)

    def nearest(counts: Iterable[int], whole: int) -> int:
        divisors = [count for count in counts if whole % count == 0]
        return min(divisors, key=lambda count: abs(count - held)) * group_size

    own = prompts // parts
    if mode == "pmap":  # each device cuts its own prompts into microbatches
        if own % min(held, own):
            raise ValueError(
                f"microbatch_size {microbatch_size}, {held} prompts, does not divide "
                f"the {own} that a device has under mesh.mode 'pmap'; use "
                f"{nearest(range(1, own + 1), own)}."
            )
    elif held % parts:
        fits = nearest(range(parts, prompts + 1, parts), prompts)
        raise ValueError(
            f"microbatch_size {microbatch_size}, {held} prompt(s), {over} {fits}."
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
