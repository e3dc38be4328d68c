"""Checksums change with every bit, and with nothing else."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.checkpointing.checksum import array_checksums, params_sha256
from grpo_jax.config import MeshConfig
from grpo_jax.parallel.mesh import make_mesh


def checksum(array) -> int:
    return int(array_checksums([array])[0])


def test_the_checksum_does_not_depend_on_the_sharding():
    array = jax.random.normal(jax.random.key(0), (16, 8, 4))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = [P(), P("fsdp"), P(None, "tensor"), P(("data", "fsdp"), None, "tensor")]
    sharded = [jax.device_put(array, NamedSharding(mesh, spec)) for spec in specs]
    assert {checksum(array)} == {checksum(one) for one in sharded}


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool"]
)
def test_every_element_counts(dtype):
    zeros = np.zeros((3, 4), dtype)
    seen = {checksum(jnp.asarray(zeros))}
    for place in np.ndindex(zeros.shape):
        changed = zeros.copy()
        changed[place] = 1
        seen.add(checksum(jnp.asarray(changed)))
    assert len(seen) == 1 + zeros.size


def test_every_bit_of_an_element_counts():
    values = np.full((4,), 1.5, np.float32)
    seen = {checksum(values)}
    for bit in range(32):
        changed = values.copy()
        changed.view(np.uint32)[2] ^= np.uint32(1 << bit)
        seen.add(checksum(changed))
    assert len(seen) == 33


def test_the_order_counts():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    orders = [array, array[::-1], array[:, ::-1], array[[1, 0, 2, 3]]]
    assert len({checksum(one) for one in orders}) == 4


def test_scalars_and_empty_arrays_have_checksums():
    seven, eight = checksum(jnp.int32(7)), checksum(jnp.int32(8))
    assert seven != eight
    assert checksum(jnp.zeros((0, 3))) == 0  # an empty sum


def test_not_a_number_and_minus_zero_keep_their_bits():
    assert checksum(jnp.array([0.0])) != checksum(jnp.array([-0.0]))
    assert checksum(jnp.array([jnp.nan])) == checksum(jnp.array([jnp.nan]))


def test_the_sha256_is_that_of_paths_dtypes_shapes_and_bytes():
    params = {"b": jnp.float32(2), "a": {"k": jnp.ones((2, 3), jnp.bfloat16)}}
    # bfloat16 1.0 is 0x3F80, float32 2.0 is 0x40000000; little-endian.
    text = b"a/k bfloat16 (2, 3)\n" + b"\x80\x3f" * 6
    text += b"b float32 ()\n" + b"\x00\x00\x00\x40"
    assert params_sha256(params) == hashlib.sha256(text).hexdigest()
    host = jax.tree.map(np.asarray, params)
    assert params_sha256(host) == params_sha256(params)


def test_the_sha256_does_not_depend_on_the_memory_order():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert params_sha256({"w": array}) == params_sha256({"w": np.asfortranarray(array)})
