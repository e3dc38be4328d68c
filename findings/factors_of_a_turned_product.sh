#!/usr/bin/env bash
# jax 0.10.2 on a CPU. The same with 0.12.0.1.
#
# Expected: (W @ x.T).T multiplies with W as it lies in memory, since W is the left factor
# and contracted along its rows. That is why one writes a product with few rows so.
# Seen: XLA exchanges the factors: it computes x W^T, with W as the right factor. For that
# the CPU rearranges all of W at every product, which takes longer than the product of a
# few rows itself. An `optimization_barrier` between product and transpose keeps the order
# that was written. Seconds are printed and not checked.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet jax=="${JAX:-0.10.2}"
cat >"$place/program.py" <<'END_OF_PROGRAM'
import re
import statistics
import time

import jax
import jax.numpy as jnp

ROWS, WIDTH, INNER, LAYERS = 16, 576, 1536, 20


def written(x, w):
    return (w @ x.T).T


def behind_barrier(x, w):
    return jax.lax.optimization_barrier(w @ x.T).T


def shapes(product):
    """The results of all products of a compiled use of `product`."""
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), "float32")
    w = jax.ShapeDtypeStruct((INNER, WIDTH), "float32")
    used = jax.jit(lambda x, w: jax.nn.relu(product(x, w)) + 1)
    text = used.lower(x, w).compile().as_text()
    return re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", text)


def milliseconds(product):
    """Of one product, as the median of nine passes through many matrices."""
    shapes = [(INNER, WIDTH), (WIDTH, INNER)] * LAYERS
    matrices = [jnp.full(shape, 1e-3) for shape in shapes]

    @jax.jit
    def run(x, matrices):
        for w in matrices:
            x = jnp.tanh(product(x, w))
        return x

    x, seconds = jnp.ones((ROWS, WIDTH)), []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(run(x, matrices))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[1:]) / len(matrices)


print(f"jax {jax.__version__}: {ROWS} rows, W [{INNER}, {WIDTH}]")
for product in (written, behind_barrier):
    print(f"  {product.__name__:14} {milliseconds(product):.3f} ms, result {shapes(product)}")
assert shapes(written) == [(str(ROWS), str(INNER))], "the order is kept now"
assert shapes(behind_barrier) == [(str(INNER), str(ROWS))], "the barrier does not help"
END_OF_PROGRAM
JAX_PLATFORMS=cpu "$place/venv/bin/python" "$place/program.py"
