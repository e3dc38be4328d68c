#!/usr/bin/env bash
# jax 0.10.2 (jax 0.12.0.1 has the same lines), on any device.
#
# Expected: jax.nn.dot_product_attention(..., return_residual=True) also returns the
# logarithm of each query's total. With it, two calls over different keys can be merged
# to one attention, as over a prompt that a group shares and own tokens. Two things
# prevent this, and neither is an error:
# - The logarithm is rounded to the dtype of the inputs, though it was computed in
#   float32. In bfloat16, merged results are then twice as far from exact ones as
#   those of one call.
# - Its gradient is zero: the cotangent of the residual is dropped. So the gradient of
#   merged results is wrong in float32 as well.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
python=$place/venv/bin/python
"$python" -m pip install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$place/program.py" <<'END'
import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
query, key, value = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((1, 4, 1, 64), (1, 512, 1, 64), (1, 512, 1, 64))
)


def whole(query, key, value):
    return jax.nn.dot_product_attention(query, key, value)


def merged(query, key, value):
    halves = [
        jax.nn.dot_product_attention(
            query, key[:, at], value[:, at], return_residual=True
        )
        for at in (slice(0, 64), slice(64, 512))
    ]
    outs, logs = zip(*halves)
    share = jax.nn.softmax(jnp.stack(logs).astype(jnp.float32), axis=0)[..., None]
    return (share * jnp.stack(outs).astype(jnp.float32)).sum(axis=0)


def gradient(function, *arrays):
    total = lambda *arrays: jnp.square(function(*arrays)).sum()
    return jax.grad(total)(*arrays)


def far(one, other):
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32)))
    return norm(one - other) / norm(other)


wide = 4 * query, key, value  # scores as trained models have them
narrow = [x.astype(jnp.bfloat16) for x in wide]
exact = whole(*[x.astype(jnp.float32) for x in narrow])
_, log = jax.nn.dot_product_attention(*narrow, return_residual=True)
errors = {
    "merged in float32": far(merged(*wide), whole(*wide)),
    "its gradient": far(gradient(merged, *wide), gradient(whole, *wide)),
    "in bfloat16, at once": far(whole(*narrow), exact),
    "in bfloat16, merged": far(merged(*narrow), exact),
}
print("dtype of the residual for bfloat16:", log.dtype)
for name, error in errors.items():
    print(f"{name}: {error:.1e} away")
assert log.dtype == jnp.bfloat16
assert errors["merged in float32"] < 1e-5 < 1e-2 < errors["its gradient"]
assert errors["in bfloat16, merged"] > 2 * errors["in bfloat16, at once"]
END
JAX_PLATFORMS=cpu "$python" "$place/program.py"
echo "as described"
