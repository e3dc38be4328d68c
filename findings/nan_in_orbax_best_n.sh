#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 (jax 0.10.2).
#
# Expected: the policies LatestN(1) and BestN(1) together keep the newest checkpoint and
# the one with the best metric. An evaluation that gives NaN counts as the worst, or is
# refused. Orbax sorts the metrics, and NaN has no place in an order: one NaN after the
# best checkpoint, and the next saves delete that checkpoint. The newest one alone stays.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
python=$place/venv/bin/python
"$python" -m pip install --quiet jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
cat >"$place/program.py" <<'END'
import math
import sys

import numpy as np
from orbax.checkpoint import v1 as ocp

policies = ocp.training.preservation_policies
policy = policies.AnyPreservationPolicy(
    [
        policies.LatestN(1),
        policies.BestN(get_metric_fn=lambda metrics: metrics["accuracy"], n=1),
    ]
)


def kept(folder, accuracies):
    with ocp.training.Checkpointer(folder, preservation_policy=policy) as saver:
        for step, accuracy in enumerate(accuracies):
            saver.save(step, {"w": np.ones(2)}, metrics={"accuracy": accuracy})
    with ocp.training.Checkpointer(folder, preservation_policy=policy) as reader:
        return {info.step: info.metrics["accuracy"] for info in reader.checkpoints}


for number, accuracies in enumerate(
    [[0.1, 0.9, 0.2, 0.3], [0.1, 0.9, math.nan, 0.2, 0.3]]
):
    print(accuracies, "keeps", kept(f"{sys.argv[1]}/{number}", accuracies))
END
export JAX_PLATFORMS=cpu
"$python" "$place/program.py" "$place" 2>/dev/null | tee "$place/seen"
diff "$place/seen" - <<'END'
[0.1, 0.9, 0.2, 0.3] keeps {1: 0.9, 3: 0.3}
[0.1, 0.9, nan, 0.2, 0.3] keeps {4: 0.3}
END
echo "as described"
