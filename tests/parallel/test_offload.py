"""Arrays go to the host's memory and back as they were, or are refused by name."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.parallel.offload import check_offload, to_device_memory, to_host_memory


def test_arrays_come_back_to_the_devices_they_were_on(meshes_of):
    mesh = meshes_of(1, 4, 2)
    check_offload(mesh)
    place = NamedSharding(mesh, P("fsdp", "tensor"))
    tree = {
        "moment": jax.device_put(jnp.arange(32.0).reshape(8, 4), place),
        "count": jnp.int32(3),
    }
    away = to_host_memory(tree)
    assert away["moment"].sharding.memory_kind == "pinned_host"
    assert away["moment"].addressable_shards[0].data.shape == (2, 2)
    # An array without a mesh stays free to join any.
    assert not away["count"].committed
    back = to_device_memory(away)
    assert back["moment"].sharding == place
    np.testing.assert_array_equal(back["moment"], tree["moment"])
    # What is there already is not moved again.
    assert to_device_memory(tree)["moment"] is tree["moment"]


def test_devices_that_cannot_reach_the_host_are_refused():
    kinds = [types.SimpleNamespace(kind="device")]
    device = types.SimpleNamespace(
        addressable_memories=lambda: kinds, device_kind="Abacus 1"
    )
    mesh = types.SimpleNamespace(local_devices=[device])
    message = r"'pinned_host', which Abacus 1 lacks \(it has device\); leave mesh.offl"
    with pytest.raises(ValueError, match=message):
        check_offload(mesh)
