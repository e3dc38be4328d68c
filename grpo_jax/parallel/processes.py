"""The start of several processes that train together."""

import os
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from grpo_jax.config import MeshConfig


def initialize_processes(config: MeshConfig) -> None:
    """Join the other processes of a run, if there are any.

    Explicit settings come from the configuration or from ``GRPO_COORDINATOR``,
    ``GRPO_NUM_PROCESSES`` and ``GRPO_PROCESS_ID``. Without them JAX asks the TPU,
    SLURM, Open MPI or Kubernetes; if none is found, the process is alone.
    A runtime that is already initialized is left as it is.

    Several processes on CPUs do not use the cache of compiled programs, even one that
    was chosen. With jax 0.10.2 and XLA's older CPU emitters two processes that load the
    same stored programs get wrong sums over devices. The script
    `findings/stored_programs_of_two_processes.sh` shows it.

    Raises:
      ValueError: if only some of the three settings are given.
    """
    if not jax.distributed.is_initialized():
        _join(config)
    if not jax.distributed.is_initialized():
        return  # alone, and the backend need not start yet
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # whether it is used was asked before


def leave_processes() -> None:
    """Leave the runtime that several processes share, before Python ends.

    After a failed save on one process, the others have threads that wait for it for up
    to 20 minutes. Python joins these threads before its own shutdown of the runtime;
    leaving first ends their wait.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def _join(config: MeshConfig) -> None:
    given = {
        "coordinator": config.coordinator or os.environ.get("GRPO_COORDINATOR"),
        "num_processes": _number(config.num_processes, "GRPO_NUM_PROCESSES"),
        "process_id": _number(config.process_id, "GRPO_PROCESS_ID"),
    }
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        jax.distributed.initialize(
            given["coordinator"], given["num_processes"], given["process_id"]
        )
    elif len(missing) < len(given):
        raise ValueError(
            f"mesh.{', mesh.'.join(missing)} must be given too: coordinator, "
            "num_processes and process_id go together."
        )
    elif _in_cluster():
        jax.distributed.initialize()


def _number(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or text is None:
        return value
    if not text.isdigit():
        raise ValueError(f"{variable} must be a number, got {text!r}.")
    return int(text)


def _in_cluster() -> bool:
    """Whether JAX can find the other processes, or that there are none, on its own."""
    env = os.environ
    slurm = int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env
    open_mpi = int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    kubernetes = "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env
    # Whether JAX will use this machine's TPUs; jax.devices() would start the backend,
    # which must happen after the processes have joined.
    wanted = env.get("JAX_PLATFORMS", "tpu").split(",")
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    tpu = "tpu" in wanted and bool(chips) and find_spec("libtpu") is not None
    return tpu or slurm or open_mpi or kubernetes
