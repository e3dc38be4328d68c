#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42, which compiles for TPUs without one.
#
# Expected: `jax.lax.ragged_dot` of R rows [I] with kernels [E, I, O] is R x I x O
# products, in the forward pass and in each of both gradients, since a row belongs to one
# group. For a TPU v5e the forward pass and the gradient in the rows are so: XLA makes
# them a kernel that skips what is outside of a group. The gradient in the kernels is a
# masked product of all rows for each group instead: E x R x I x O. A mixture of 128
# experts pays 128 times for it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42
cat > "$folder/see.py" <<'PYTHON'
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

ROWS, WIDTH, INNER = 4096, 512, 256
device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
place = jax.sharding.SingleDeviceSharding(device)


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)


def total(rows, kernels, sizes):
    return jax.lax.ragged_dot(rows, kernels, sizes).astype(jnp.float32).sum()


def cost(function, experts):
    given = shape(ROWS, WIDTH), shape(experts, WIDTH, INNER)
    compiled = jax.jit(function).lower(*given, shape(experts, dtype=jnp.int32)).compile()
    needed = 2 * ROWS * WIDTH * INNER
    kernels = len(re.findall("tpu_custom_call", compiled.as_text()))
    return compiled.cost_analysis()["flops"] / needed, kernels


seen = {}
for experts in (4, 16):
    for name, function in (
        ("forward", jax.lax.ragged_dot),
        ("gradient in rows", jax.grad(total, argnums=0)),
        ("gradient in kernels", jax.grad(total, argnums=1)),
    ):
        flops, kernels = cost(function, experts)
        seen[name, experts] = flops
        print(f"{experts:3} groups, {name}: {flops:5.2f} x the products, {kernels} kernels")
dense = all(seen["gradient in kernels", n] > 0.9 * n for n in (4, 16))
sparse = all(seen["forward", n] < 1.5 for n in (4, 16))
sys.exit(0 if dense and sparse else 1)
PYTHON
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
"$folder/venv/bin/python" "$folder/see.py" 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
