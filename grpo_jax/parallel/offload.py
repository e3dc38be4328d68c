"""Offloading: state that is not in use moves to host memory.

It moves between compiled programs, never within one. So programs only see device
memory and give the same numbers as without offloading.
"""

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

# Host memory that devices read and write directly.
_HOST = "pinned_host"


def check_offload(mesh: Mesh) -> None:
    """Refuse devices that cannot use host memory.

    Raises:
      ValueError: naming the kinds of memory that they have.
    """
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if _HOST not in kinds:
        raise ValueError(
            f"mesh.offload needs memory of kind {_HOST!r}, which {device.device_kind} "
            f"lacks (it has {', '.join(kinds)}); leave mesh.offload empty."
        )


def to_host_memory(values: PyTree) -> PyTree:
    """The arrays in pinned host memory, each beside the devices it was on."""
    return jax.tree.map(lambda leaf: _moved(leaf, _HOST), values)


def to_device_memory(values: PyTree) -> PyTree:
    """The arrays in the memory of their devices."""
    return jax.tree.map(lambda leaf: _moved(leaf, "device"), values)


def _moved(leaf: Array, kind: str) -> Array:
    # Scalars, such as step counts, stay: device_put would commit an uncommitted one to
    # its device, and jit then refuses it beside arrays on a mesh.
    if leaf.ndim == 0 or leaf.sharding.memory_kind in (kind, None):
        return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))
