#!/usr/bin/env bash
# jax 0.10.2, on a CPU (jax 0.12.0.1 does the same).
#
# Expected: a loop that carries a key/value cache writes a token with
# `lax.dynamic_update_slice` in place, whatever axes stand in front. So it is for a cache
# [8, heads, tokens, width]. With one more axis of size 1, as a batch of one or a mesh of
# one device has it, [1, 8, heads, tokens, width], the whole cache is copied several times
# at every token: the product that reads the cache takes it without the axis, XLA makes
# the update once for the carry and once for the product, and each needs a copy of its
# own. Merging the axis with the next one before the loop is the way.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$place/program.py" <<'END'
import re

import jax
import jax.numpy as jnp
from jax import lax

HEADS, TOKENS, WIDTH = 4, 16, 12


def decode(keys, values, query):
    front = (0,) * (query.ndim - 1)

    def token(carry):
        step, keys, values, query = carry
        new = jnp.tanh(query)[..., None, :]
        keys = lax.dynamic_update_slice(keys, new, (*front, step, 0))
        values = lax.dynamic_update_slice(values, 2 * new, (*front, step, 0))
        scores = jnp.einsum("...mw,...tw->...mt", query[..., None, :], keys)
        mixed = jnp.einsum("...mt,...tw->...mw", jax.nn.softmax(scores), values)
        return step + 1, keys, values, mixed[..., 0, :]

    return lax.while_loop(lambda carry: carry[0] < TOKENS, token, (0, keys, values, query))


for batch in (8,), (1, 8):
    cache = jnp.zeros((*batch, HEADS, TOKENS, WIDTH))
    query = jnp.ones((*batch, HEADS, WIDTH))
    compiled = jax.jit(decode, donate_argnums=(0, 1)).lower(cache, cache, query).compile()
    text = compiled.as_text()
    updates = len(re.findall(r"dynamic-update-slice\(", text))
    copies = len(re.findall(r"\[(?:1,)?8,4,16,12\]\S* copy\(", text))
    print(batch, updates, "updates", copies, "copies of a cache")
END
JAX_PLATFORMS=cpu "$place/venv/bin/python" "$place/program.py" | tee "$place/seen"
diff "$place/seen" - <<'END'
(8,) 2 updates 0 copies of a cache
(1, 8) 4 updates 8 copies of a cache
END
echo "as described"
