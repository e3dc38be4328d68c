"""Where arrays go when they are read.

A target is what Orbax restores into: a `ShapeDtypeStruct` with a sharding, or a NumPy
array for values that stay on the host.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from grpo_jax.parallel.mesh import named_leaves, path_name


def savable(leaf: Array) -> Array | np.ndarray:
    """The array, or its values where each of several processes holds it whole.

    Such is the step count of a fresh optimizer state; Orbax writes it only as values.
    """
    local = jax.process_count() > 1 and leaf.is_fully_addressable
    return np.asarray(leaf) if local else leaf


def restore_targets(like: dict[str, PyTree]) -> dict[str, PyTree]:
    """Targets laid out as `like`, arrays or `ShapeDtypeStruct`.

    Beside arrays on a mesh, arrays without one are replicated on it: committed to one
    device they would stop the next jit. Without any mesh, arrays that are committed to
    a device go there and others to the host.

    Raises:
      ValueError: for an array that does not divide over its mesh.
    """
    leaves = named_leaves(like)
    shardings = [leaf.sharding for leaf in leaves.values()]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    home = NamedSharding(meshes[0], P()) if meshes else None

    def target(path: tuple, leaf: Array | jax.ShapeDtypeStruct) -> Any:
        sharding: Sharding | None = leaf.sharding
        if not isinstance(sharding, NamedSharding):
            uncommitted = isinstance(leaf, jax.Array) and not leaf.committed
            sharding = home or (None if uncommitted else sharding)
        if sharding is None:
            return _abstract_host(leaf.shape, leaf.dtype)
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(
                f"{path_name(path)} does not fit its mesh: {error}"
            ) from error
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(target, like)


def host_targets(inventory: Mapping[str, Any]) -> PyTree:
    """Targets on the host for the parameters that an inventory lists."""
    params: dict[str, Any] = {}
    for path, array in inventory["arrays"].items():
        top, *parents, name = path.split("/")
        if top != "params":
            continue
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = _abstract_host(tuple(array["shape"]), jnp.dtype(array["dtype"]))
    return params


def _abstract_host(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    # Takes the memory of one element, whatever the shape.
    return np.broadcast_to(np.zeros((), dtype), shape)
