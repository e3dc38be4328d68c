#!/usr/bin/env bash
# transformers 5.24.0, beside 4.57.6.
#
# Expected: the `rope_theta` of an Olmo 3 `config.json` is the rotary base of all layers,
# as it is in transformers 4.57, whose configuration has one.
# Seen: transformers 5.24 gives it to the layers with full attention only. The layers with
# a window have 500000, whatever the file says: the configuration takes the key out for
# the one kind of layer and looks for it again for the other. No warning. Files with
# another base compute something else than they were trained for. Write
# `rope_parameters` with both kinds of layers instead.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat >"$place/program.py" <<'END_OF_PROGRAM'
import transformers
from transformers import Olmo3Config

config = Olmo3Config.from_dict({"num_hidden_layers": 4, "rope_theta": 10000.0})
print(transformers.__version__)
if hasattr(config, "rope_theta"):
    print("all layers:", config.rope_theta)
else:
    for kind, settings in sorted(config.rope_parameters.items()):
        print(f"{kind}:", settings["rope_theta"])
END_OF_PROGRAM
for version in 4.57.6 5.24.0; do
  "${PYTHON:-python3}" -m venv "$place/$version"
  "$place/$version/bin/python" -m pip install --quiet "transformers==$version"
  "$place/$version/bin/python" "$place/program.py" 2>/dev/null
done | tee "$place/seen"
diff "$place/seen" - <<'END_OF_OUTPUT'
4.57.6
all layers: 10000.0
5.24.0
full_attention: 10000.0
sliding_attention: 500000.0
END_OF_OUTPUT
echo "as described"
