#!/usr/bin/env bash
# jax 0.10.2, two processes on CPUs that form one mesh (Gloo), JAX's persistent compilation
# cache, and XLA's older CPU emitters (`--xla_cpu_use_fusion_emitters=false`), which compile
# small programs faster.
#
# Expected: a program that is loaded from the cache computes what it computed when it was
# compiled.
#
# The first run of both processes is right. The second one, which loads the same programs,
# gets wrong sums over devices, without any message. A program that is enough: checksums
# of five arrays, three of them by a loop over layers, so with all-reduces inside and
# outside of loops. Integers are added, so rounding and order cannot explain it. One
# process with as many devices loads the program and is right. So are two
# processes with loops alone or matrices alone, and with XLA's own choice of emitters
# (not shown here).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/see.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

process, processes, port = map(int, sys.argv[1:])
if processes > 1:
    jax.distributed.initialize(f"localhost:{port}", processes, process)
mesh = Mesh(np.array(jax.devices()), ("x",))
LAYOUT = [
    ((264, 32), P("x")),
    ((2, 32, 32), P(None, "x")),
    ((2, 32, 64), P(None, None, "x")),
    ((264, 32), P(None, "x")),
    ((2, 64, 32), P(None, "x")),
]


def mix(value):
    value = (value ^ (value >> 16)) * jnp.uint32(0x85EBCA6B)
    value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE35)
    return value ^ (value >> 16)


def of_matrix(bits, start):
    place = jnp.full(bits.shape, start, jnp.uint32)
    for axis in range(bits.ndim):
        place = mix(place ^ jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis))
    return jnp.sum(mix(bits ^ place), dtype=jnp.uint32)


def of_array(array):
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    start = jnp.uint32(0x9E3779B9)
    if array.ndim < 3:
        return of_matrix(bits, start)
    layers = jnp.arange(len(bits), dtype=jnp.uint32)
    each = jax.lax.map(lambda one: of_matrix(one[0], mix(start ^ one[1])), (bits, layers))
    return jnp.sum(each, dtype=jnp.uint32)


@jax.jit
def checksums(arrays):
    return jnp.stack([of_array(array) for array in arrays])


draw = np.random.default_rng(0)
whole = [draw.normal(size=shape).astype(np.float32) for shape, _ in LAYOUT]
split = [
    jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index, array=array: array[index]
    )
    for array, (_, spec) in zip(whole, LAYOUT)
]
expected = np.asarray(checksums(whole))  # of arrays that no other process has
got = [np.asarray(checksums(split).addressable_shards[0].data) for _ in range(5)]
print(sum(not np.array_equal(one, expected) for one in got))
PYTHON

export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_use_fusion_emitters=false
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

# Of five calls in each process, how many are wrong: the numbers of all processes.
run() {
  local processes=$1 devices=$2 port
  port=$("$folder/venv/bin/python" -c \
    'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  for process in $(seq 0 $((processes - 1))); do
    JAX_COMPILATION_CACHE_DIR="$folder/cache-of-$processes" JAX_NUM_CPU_DEVICES=$devices \
      timeout 300 "$folder/venv/bin/python" "$folder/see.py" \
      "$process" "$processes" "$port" > "$folder/out$process" 2> "$folder/err$process" &
  done
  wait
  for process in $(seq 0 $((processes - 1))); do
    grep -E '^[0-9]+$' "$folder/out$process"
  done | paste -sd ' '
}

failed=0
see() {
  echo "$1: wrong calls of 5: $2"
  [[ "$2" =~ ^($3)$ ]] || failed=1
}
see "two processes, compiled  " "$(run 2 2)" "0 0"
see "two processes, from cache" "$(run 2 2)" "[1-5] [1-5]"
see "one process, compiled    " "$(run 1 4)" "0"
see "one process, from cache  " "$(run 1 4)" "0"
if [ "$failed" = 1 ]; then
  echo "changed: not only two processes with a cache get wrong sums" >&2
  exit 1
fi
