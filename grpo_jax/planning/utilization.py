"""How much of what the devices could compute a step uses (`mfu/...`).

Model FLOPs utilization as in Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311,
appendix B: operations that the model needs, over the seconds that a phase took times
the peak rate of all devices. `planning.flops` says what counts.
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

Lengths = tuple[Int[np.ndarray, " N"], Int[np.ndarray, "N G"]]


class Utilization:
    """Makes the metrics of a run's steps."""

    def __init__(self, model: ModelConfig, config: TrainConfig, mesh: Mesh) -> None:
        self._model, self._config, self._mesh = model, config, mesh

    def metrics(
        self, sampled: Lengths, learned: Lengths, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """Shares of the peak in rollout, score, update and the whole step.

        Tokens of a completion behind its end and prompts beyond their length do not
        count, their time does. A scoring pass runs while rewards are computed, so its
        share is a lower bound: of the time until both are done. Without one there is no
        `mfu/score`.

        Args:
          sampled: lengths of all prompts that completions were sampled for in the step,
            and of these completions.
          learned: of those that were scored and made the update.
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
        flops["step"] = sum(flops.values())
        peak = peak_rate(self._mesh, self._model.dtype)
        return {
            f"mfu/{name}": flops[name] / (spent[name] * peak)
            for name in flops
            if flops[name]
        }


def peak_rate(mesh: Mesh, dtype: str) -> float:
    """Operations per second of all devices of a mesh.

    For accelerators that are known it is their makers' figure for bfloat16, whatever
    the compute dtype. Others are measured once, by a short product on one device; the
    CPU devices of a process share its cores and count as one.
    """
    device = mesh.local_devices[0]
    known = known_flops(device.device_kind)
    if known is not None:
        return known * mesh.size
    count = jax.process_count() if device.platform == "cpu" else mesh.size
    return measured_rate(dtype, device.platform) * count


@functools.cache
def measured_rate(dtype: str, platform: str) -> float:
    """Operations per second of a square product on the first device of a platform.

    Takes some 50 ms on a CPU, and its compilation about as long.
    """
    size = 1024 if platform == "cpu" else 8192
    device = jax.local_devices(backend=platform)[0]
    product, times = jax.jit(jnp.matmul), []
    # A mesh of its own: inside that of a run, all devices would take part.
    with jax.set_mesh(Mesh([device], ("device",))):
        x = jnp.ones((size, size), dtype)
        for _ in range(4):  # the first one compiles
            start = time.perf_counter()
            jax.block_until_ready(product(x, x))
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
