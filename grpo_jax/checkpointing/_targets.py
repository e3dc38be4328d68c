"""The targets that Orbax restores into.

A target is a `ShapeDtypeStruct` with a sharding, or a NumPy array for a value that
stays on the host.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from grpo_jax.parallel.mesh import path_name


def savable(leaf: Array) -> Array | np.ndarray:
    """The array, or its values if each of several processes has its own whole copy.

    The step count of a fresh optimizer state is such an array, and Orbax refuses it.
    """
    local = jax.process_count() > 1 and leaf.is_fully_addressable
    return np.asarray(leaf) if local else leaf


def restore_targets(like: dict[str, PyTree]) -> dict[str, PyTree]:
    """Targets with the shardings of `like`, arrays or `ShapeDtypeStruct`.

    If some leaves are on a mesh, leaves without one are replicated on it: jit refuses
    arguments on a mesh beside arguments committed to one device. Without any mesh,
    committed arrays go to their device and others to the host.

    Raises:
      ValueError: for an array that does not divide over its mesh.
    """
    shardings = [leaf.sharding for leaf in jax.tree.leaves(like)]
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


def host_targets(metadata: Mapping[str, Any]) -> PyTree:
    """Targets on the host for the parameters that the metadata lists."""
    params: dict[str, Any] = {}
    for path, array in metadata["arrays"].items():
        top, *parents, name = path.split("/")
        if top != "params":
            continue
        inner = params
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = _abstract_host(tuple(array["shape"]), jnp.dtype(array["dtype"]))
    return params


def _abstract_host(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    # A broadcast view: it has the memory of one element, whatever the shape.
    return np.broadcast_to(np.zeros((), dtype), shape)


def listed_arrays(metadata: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays that the metadata lists, by path."""
    return {
        path: jax.ShapeDtypeStruct(array["shape"], jnp.dtype(array["dtype"]))
        for path, array in metadata["arrays"].items()
    }
