#!/usr/bin/env bash
# jax 0.10.2 (jax 0.12.0.1 has the same lines).
#
# Expected: two Pythons that share a compile cache (JAX_COMPILATION_CACHE_DIR) use each
# other's programs, or do not find them. JAX compresses programs with the zstd of Python
# 3.14 where that is there, else with zlib, and the key says "zlib" both times. So Python
# 3.14 finds what 3.13 wrote, cannot read it, warns at each program and compiles again;
# the other way round it is the same. A folder for each Python is the way.
#
# One Python stands for both here: once without the module `compression.zstd`, once with
# it, from the package backports.zstd where Python does not have it.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
python=$place/venv/bin/python
"$python" -m pip install --quiet jax==0.10.2 jaxlib==0.10.2
"$python" -c 'import compression.zstd' 2>/dev/null ||
  "$python" -m pip install --quiet backports-zstd==1.8.0
cat >"$place/program.py" <<'END'
import sys
import types

if sys.argv[1] == "3.13":
    sys.modules["compression"] = None
elif sys.version_info < (3, 14):
    from backports import zstd

    sys.modules["compression"] = types.ModuleType("compression")
    sys.modules["compression"].zstd = sys.modules["compression.zstd"] = zstd

import jax

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print("as Python", sys.argv[1], jax.jit(lambda x: x + 1)(1))
END
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$place/cache
for version in 3.13 3.14; do
  "$python" "$place/program.py" "$version" 2>"$place/errors" | tee "$place/$version"
  grep -o "Error reading persistent compilation cache entry for 'jit__lambda'.*" \
    "$place/errors" | tee -a "$place/$version" || true
done
[[ $(wc -l <"$place/3.13") == 1 && $(wc -l <"$place/3.14") == 2 ]]
echo "as described"
