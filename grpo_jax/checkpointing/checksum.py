"""Checksums of arrays.

`array_checksums` runs on the devices and does not depend on how arrays are sharded.
`params_sha256` is for people and other programs; it copies the arrays to the host.
"""

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree, UInt, UInt32

from grpo_jax.parallel.mesh import named_leaves


@jax.jit
def array_checksums(arrays: Sequence[Array]) -> UInt32[Array, " arrays"]:
    """One checksum per array: Σ_p mix(bits(x_p) xor hash(p)) mod 2^32, p a position.

    Integer sums wrap and commute, so any mesh and sharding gives the same checksum.
    `mix` is a bijection: a change of one element is always found, any other change
    with probability 1 - 2^-32. Its constants are those of the finalizer of MurmurHash3
    (Appleby 2011, https://github.com/aappleby/smhasher).
    """
    return jnp.stack([_checksum(array) for array in arrays])


def _checksum(array: Array) -> UInt32[Array, ""]:
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        # An element of 8 bytes becomes two of 4, in a last axis of its own.
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
        bits = lax.bitcast_convert_type(array, unsigned)
    start = jnp.uint32(0x9E3779B9)
    if array.ndim < 3:
        return _sum_of(bits, start)
    # A layer at a time: a CPU writes the hashes to memory before it adds them.
    index = jnp.arange(len(bits), dtype=jnp.uint32)
    layers = lax.map(lambda one: _sum_of(one[0], _mix(start ^ one[1])), (bits, index))
    return jnp.sum(layers, dtype=jnp.uint32)


def _sum_of(bits: UInt[Array, "..."], start: UInt32[Array, ""]) -> UInt32[Array, ""]:
    position = jnp.full(bits.shape, start, jnp.uint32)
    for axis in range(bits.ndim):
        index = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = _mix(position ^ index)
    return jnp.sum(_mix(bits.astype(jnp.uint32) ^ position), dtype=jnp.uint32)


def _mix(value: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    value = (value ^ (value >> 16)) * jnp.uint32(0x85EBCA6B)
    value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE35)
    return value ^ (value >> 16)


def params_sha256(params: PyTree) -> str:
    """SHA-256, in hexadecimal, of all parameters: paths, dtypes, shapes and bytes.

    Arrays are read in the order of their paths, one at a time, so the host holds one
    of them. All processes must call it; all get the same text.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(named_leaves(params).items()):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        values = np.asarray(leaf, order="C")
        digest.update(f"{path} {values.dtype} {values.shape}\n".encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
