#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1, 0.0.50.1 and 0.0.52, which compile for TPUs without one.
#
# Expected: `jax.lax.ragged_dot` of R rows [I] with kernels [E, I, O] is R x I x O
# products, in the forward pass and in each of both gradients, since a row belongs to one
# group. And a newer libtpu is no worse.
#
# XLA for a TPU v5e makes it a kernel that skips what is outside of a group, or a masked
# product of all rows for each group, E x R x I x O: a mixture of 128 experts then pays 128
# times. Which of both depends on libtpu alone. 0.0.42.1, which jax 0.10.2 asks for, has no
# kernel for the gradient in the kernels. 0.0.50.1, which jax 0.12.0.1 asks for, has kernels
# for all three. 0.0.52, the newest, has none, not even for the forward
# pass. jax 0.12.0.1 gives the same with 0.0.50.1 and with 0.0.52.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet jax==0.10.2 jaxlib==0.10.2
for version in 0.0.42.1 0.0.50.1 0.0.52; do
  "$folder/venv/bin/python" -m pip install --quiet --no-deps \
    --target "$folder/$version" "libtpu==$version"
done
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
dense = {name for name, n in seen if all(seen[name, e] > 0.9 * e for e in (4, 16))}
sparse = {name for name, n in seen if all(seen[name, e] < 1.5 for e in (4, 16))}
names = {name for name, n in seen}
expected = {
    "0.0.42.1": {"gradient in kernels"},
    "0.0.50.1": set(),
    "0.0.52": names,
}[sys.argv[1]]
sys.exit(0 if dense == expected and sparse == names - expected else 1)
PYTHON
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
for version in 0.0.42.1 0.0.50.1 0.0.52; do
  echo "libtpu $version"
  TPU_LIBRARY_PATH="$folder/$version/libtpu/libtpu.so" \
    "$folder/venv/bin/python" "$folder/see.py" "$version" 2> "$folder/log" \
    || { tail -5 "$folder/log"; exit 1; }
done
