#!/usr/bin/env bash
# jax 0.10.2 and optax 0.2.8 (jax 0.12.0.1 does the same).
#
# Expected: `jax.jit(optimizer.init)(params)` gives moments that lie where the parameters
# lie, as `optimizer.init(params)` does. With parameters that are sharded over devices it
# puts each moment whole on the first device instead: it is made of zeros, so the compiled
# program takes no parameters, and nothing is left that would say where they lie. A model
# that fits only when it is sharded runs out of memory there. `out_shardings` is the way.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$place/program.py" <<'END'
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("x"))
params = jax.device_put(jnp.ones((1024, 16)), rows)
optimizer = optax.adam(1e-3)
for name, init in ("init", optimizer.init), ("jit", jax.jit(optimizer.init)):
    moment = init(params)[0].mu
    shards = [shard.data.shape for shard in moment.addressable_shards]
    print(name, len(moment.sharding.device_set), "devices", shards[0])
END
JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 "$place/venv/bin/python" "$place/program.py" |
  tee "$place/seen"
diff "$place/seen" - <<'END'
init 8 devices (128, 16)
jit 1 devices (1024, 16)
END
echo "as described"
