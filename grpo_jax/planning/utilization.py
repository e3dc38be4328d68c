"""Model FLOPs utilization of each phase of a step (`mfu/...`).

Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B: the operations that
the model needs, divided by the seconds of the phase and the peak rate of all devices.
`planning.flops` defines which operations count.
"""

import functools
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from grpo_jax.config import TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.planning.devices import known_flops
from grpo_jax.planning.flops import forward_flops, gradient_flops
from grpo_jax.planning.resolve import for_updates

Lengths = tuple[Int[np.ndarray, " N"], Int[np.ndarray, "N G"]]


class Utilization:
    """Computes the metrics `mfu/...` of a run's steps."""

    def __init__(self, model: ModelConfig, config: TrainConfig, mesh: Mesh) -> None:
        self._model, self._config, self._mesh = model, config, mesh
        self._learner = for_updates(model, config, mesh)

    def metrics(
        self, sampled: Lengths, learned: Lengths, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """Shares of the peak in rollout, score, update and the whole step.

        Padding has no operations that count, but its time does. A scoring pass runs
        while rewards are computed, and its time ends when both are done. So its share
        is a lower bound. Without a scoring pass there is no `mfu/score`.

        Args:
          sampled: lengths of the prompts and completions that the step sampled.
          learned: lengths of those that were scored and used in the update.
          seconds: the step's metrics `time/...`.
        """
        objective = self._config.objective
        passes = bool(objective.kl_coef) + (self._config.updates_per_step > 1)
        forward = forward_flops(self._model, *learned)
        gradient = gradient_flops(forward, frozen=self._config.lora.rank is not None)
        flops = {
            "rollout": forward_flops(self._model, *sampled).total,
            "score": passes * forward.total,
            "update": self._config.updates_per_rollout * gradient,
        }
        spent = {name: seconds[f"time/{name}"] for name in (*flops, "step")}
        if not objective.resample_limit:
            spent["score"] += seconds["time/reward"]
        dtypes = dict.fromkeys(flops, self._learner.dtype)
        dtypes["rollout"] = self._model.dtype
        # Seconds at the peak.
        least = {
            name: count / _peak_rate(self._mesh, dtypes[name])
            for name, count in flops.items()
        }
        least["step"] = sum(least.values())
        return {
            f"mfu/{name}": least[name] / spent[name] for name in least if least[name]
        }


def _peak_rate(mesh: Mesh, dtype: str) -> float:
    """Operations per second of all devices of a mesh.

    For known accelerators it is the maker's figure for bfloat16, also if the compute
    dtype differs. Others are measured once, by a short product on one device. The CPU
    devices of a process share its cores and count as one.
    """
    device = mesh.local_devices[0]
    known = known_flops(device.device_kind)
    if known is not None:
        return known * mesh.size
    count = jax.process_count() if device.platform == "cpu" else mesh.size
    return _measured_rate(dtype, device.platform) * count


@functools.cache
def _measured_rate(dtype: str, platform: str) -> float:
    """Operations per second of a square product on the first device of a platform.

    Takes some 50 ms on a CPU, and its compilation about as long.
    """
    size = 1024 if platform == "cpu" else 8192
    device = jax.local_devices(backend=platform)[0]
    product, times = jax.jit(jnp.matmul), []
    # A mesh of one device: within the mesh of a run, all devices would take part.
    with jax.set_mesh(Mesh([device], ("device",))):
        x = jnp.ones((size, size), dtype)
        for _ in range(4):  # the first one compiles
            start = time.perf_counter()
            jax.block_until_ready(product(x, x))
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
