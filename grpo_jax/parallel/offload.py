"""State that is not in use, in the host's memory instead of the device's.

It goes there and back between compiled programs, which therefore see device memory
alone and give the same numbers.
"""

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

# Memory of the host that devices read and write directly.
_HOST = "pinned_host"


def check_offload(mesh: Mesh) -> None:
    """Refuse devices that cannot keep arrays in the host's memory.

    Raises:
      ValueError: naming the kinds of memory that there are.
    """
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if _HOST not in kinds:
        raise ValueError(
            f"mesh.offload needs memory of kind {_HOST!r}, which {device.device_kind} "
            f"lacks (it has {', '.join(kinds)}); leave mesh.offload empty."
        )


def to_host(values: PyTree) -> PyTree:
    """The arrays in pinned memory of the host, each beside the devices it was on."""
    return jax.tree.map(lambda leaf: _moved(leaf, _HOST), values)


def to_device(values: PyTree) -> PyTree:
    """The arrays in the memory of their devices."""
    return jax.tree.map(lambda leaf: _moved(leaf, "device"), values)


def _moved(leaf: Array, kind: str) -> Array:
    # Counts stay: moving one would tie a fresh one to its device.
    if leaf.ndim == 0 or leaf.sharding.memory_kind in (kind, None):
        return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))
