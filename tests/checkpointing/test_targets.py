"""Where arrays go when they are read: as they lay, or on the mesh of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.checkpointing._targets import host_targets, restore_targets, savable


def test_what_lies_on_a_mesh_goes_back_and_the_rest_is_on_all_of_it(meshes_of):
    mesh = meshes_of(1, 4, 1)
    split = NamedSharding(mesh, P("fsdp"))
    like = {"kernel": jax.device_put(jnp.ones((8, 2)), split), "step": jnp.int32(3)}
    targets = restore_targets(like)
    assert targets["kernel"].sharding == split
    assert targets["step"].sharding == NamedSharding(mesh, P())
    shapes = {name: (t.shape, t.dtype) for name, t in targets.items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in like.items()}


def test_without_a_mesh_a_committed_array_keeps_its_device_and_others_the_host():
    device = jax.devices()[1]
    like = {"here": jax.device_put(jnp.ones(3), device), "any": jnp.ones((2, 5))}
    targets = restore_targets(like)
    assert targets["here"].sharding.device_set == {device}
    assert isinstance(targets["any"], np.ndarray)
    assert targets["any"].base.nbytes <= 8  # of one element, not of ten


def test_an_array_that_does_not_divide_is_named(meshes_of):
    sharding = NamedSharding(meshes_of(1, 4, 1), P("fsdp"))
    like = {"layers": {"q": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=sharding)}}
    with pytest.raises(ValueError, match="^layers/q does not fit its mesh: "):
        restore_targets(like)


names = st.text("abc_0", min_size=1, max_size=3)
trees = st.recursive(
    st.tuples(st.integers(0, 4), st.integers(1, 4)),  # the shape of an array
    lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30)
@given(tree=st.dictionaries(names, trees, min_size=1, max_size=3))
def test_parameters_in_the_metadata_come_back_as_their_tree(tree):
    def listed(place, path):
        if isinstance(place, tuple):
            yield path, {"shape": list(place), "dtype": "bfloat16"}
            return
        for name, inner in place.items():
            yield from listed(inner, f"{path}/{name}")

    arrays = dict(listed(tree, "params")) | {
        "optimizer/step": {"shape": [], "dtype": "int32"}
    }
    targets = host_targets({"arrays": arrays})
    assert jax.tree.map(lambda target: target.shape, targets) == tree
    assert {t.dtype for t in jax.tree.leaves(targets)} == {jnp.dtype("bfloat16")}


def test_one_process_saves_arrays_as_they_are():
    array = jnp.ones(3)
    assert savable(array) is array
