#!/usr/bin/env bash
# jax 0.10.2 on a CPU. The same with 0.11.0; not with 0.11.2 and 0.12.0.1.
#
# Expected: a scan over the layers of a model needs temporaries for one layer at a time,
# and weights in bfloat16 need at most what those in float32 do.
# Seen: XLA moves the conversion of a bfloat16 layer to float32 out of the loop, so the
# whole stack is there in float32 beside the one in bfloat16: three times the memory of
# the weights. A stack in float16 is converted one layer at a time, one in int8 too. An
# `optimization_barrier` around the layer does not keep the conversion inside.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet jax==0.10.2
cat >"$place/program.py" <<'END_OF_PROGRAM'
import jax
import jax.numpy as jnp

LAYERS, WIDTH = 16, 512
LAYER = WIDTH * WIDTH * 4  # bytes in float32


def product(x, layer):
    return jnp.tanh(x @ layer), None


def behind_barrier(x, layer):
    return jnp.tanh(x @ jax.lax.optimization_barrier(layer)), None


def temporaries(step, dtype, hidden):
    """Layers in float32 that would fill the temporaries of a scan over a stack."""
    stack = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), dtype)
    x = jax.ShapeDtypeStruct((8, WIDTH), hidden)
    through = jax.jit(lambda x, stack: jax.lax.scan(step, x, stack)[0])
    return through.lower(x, stack).compile().memory_analysis().temp_size_in_bytes / LAYER


def widened(x, codes):
    return jnp.tanh(x @ codes.astype(jnp.float32)), None


found = {
    "float32": temporaries(product, "float32", "float32"),
    "float16": temporaries(product, "float16", "float16"),
    "int8": temporaries(widened, "int8", "float32"),
    "bfloat16": temporaries(product, "bfloat16", "bfloat16"),
    "bfloat16, barrier": temporaries(behind_barrier, "bfloat16", "bfloat16"),
}
print(f"jax {jax.__version__}: temporaries of a scan over {LAYERS} layers")
for name, layers in found.items():
    print(f"  {name:18} {layers:5.2f} layers in float32")
assert max(found["float32"], found["float16"], found["int8"]) < 3, found
assert min(found["bfloat16"], found["bfloat16, barrier"]) > LAYERS, found
END_OF_PROGRAM
JAX_PLATFORMS=cpu "$place/venv/bin/python" "$place/program.py"
