"""Devices to compile for: those of a TPU slice that need not exist, or those of here.

`libtpu` compiles for a described slice on any x86 machine with Linux.
"""

import contextlib
import dataclasses
import functools
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

_SLICE = re.compile(r"(v5e|v5p|v6e):([1-9]\d*(?:x[1-9]\d*){1,2})")
_AXES = {"v5e": 2, "v5p": 3, "v6e": 2}
# Chips of a host, if the slice has as many.
_HOST = (2, 2, 1)
# libtpu would look for a TPU, ask the cloud what this machine is, and refuse to be
# loaded twice. JAX itself stays on the CPU.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for.

    Attributes:
      name: as it was given: v5e:2x4, cpu or gpu.
      device: the kind of its devices, as in `DEVICES`; None for those of this machine.
      shape: chips along each axis of a slice, always three.
    """

    name: str
    device: str | None = None
    shape: tuple[int, ...] = (1, 1, 1)

    @property
    def count(self) -> int | None:
        """Devices of the slice; None where as many are taken as a run needs."""
        return None if self.device is None else math.prod(self.shape)


def find_target(name: str) -> Target:
    """The target of a name such as v5e:2x4, v5p:2x2x1, cpu or gpu.

    Raises:
      ValueError: for any other name, naming what is expected.
    """
    if name in ("cpu", "gpu"):
        return Target(name)
    found = _SLICE.fullmatch(name)
    sizes = tuple(map(int, found[2].split("x"))) if found else ()
    if found is None or len(sizes) != _AXES[found[1]]:
        raise ValueError(
            f"--compile {name} is not known; use the chips of a slice along its axes, "
            "such as v5e:2x4, v6e:4x4 or v5p:2x2x1, or cpu, or gpu."
        )
    return Target(name, found[1], (*sizes, *(1,) * (3 - len(sizes))))


@contextlib.contextmanager
def devices_of(
    target: Target, count: int | None = None
) -> Iterator[Callable[[int], Sequence[Any]]]:
    """A function that returns the first so many devices, to lower and compile for.

    Those of a slice cannot run anything. While they are used, JAX stays on the CPU if
    it has not started, and nothing is read from the cache of compiled programs or
    written to it. Of the CPU there are `count` devices if JAX has not started.

    Raises:
      ValueError: without libtpu, or where there is none for this machine; for a slice
        that libtpu does not know; when called, for more devices than there are.
    """
    if target.device is None:
        if target.name == "cpu" and count is not None:
            with contextlib.suppress(RuntimeError):
                jax.config.update("jax_num_cpu_devices", count)
        yield functools.partial(_here, target.name)
        return
    _check_library(target.name)
    before: Any = jax.config
    platforms, cached = before.jax_platforms, before.jax_enable_compilation_cache
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        described = _described(target)
        yield lambda count: described[:count]
    finally:
        jax.config.update("jax_platforms", platforms)
        jax.config.update("jax_enable_compilation_cache", cached)


def _described(target: Target) -> Sequence[Any]:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    hosts = tuple(map(min, target.shape, _HOST))
    try:
        slice_ = topologies.get_topology_desc(
            platform="tpu", topology_name=target.name, chips_per_host_bounds=hosts
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"libtpu knows no slice {target.name}: {reason}") from error
    return slice_.devices


def _check_library(name: str) -> None:
    machine = f"{platform.system()} on {platform.machine()}"
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        raise ValueError(
            f"--compile {name} needs libtpu, which exists for Linux on x86_64, and "
            f"this is {machine}; run it there, or use --compile cpu."
        )
    given = os.environ.get("TPU_LIBRARY_PATH")
    if given is None and find_spec("libtpu") is not None:
        return
    if given is None or not Path(given).is_file():
        raise ValueError(
            f"--compile {name} needs libtpu, and TPU_LIBRARY_PATH is "
            f"{given or 'not set'}; install grpo-jax[tpu], or run `pip install "
            f"--no-deps --target DIR '{wanted_library()}'` and set TPU_LIBRARY_PATH to "
            "DIR/libtpu/libtpu.so."
        )


def wanted_library() -> str:
    """The libtpu that the installed JAX asks for, as pip takes it.

    JAX cannot read all programs that a newer one compiles.
    """
    lines = requires("jax") or []
    named = re.compile(r"libtpu(?![\w.-])")  # not libtpu-nightly
    found = [line.split(";")[0].strip() for line in lines if named.match(line)]
    return found[0] if found else "libtpu"


def _here(name: str, count: int) -> Sequence[Any]:
    """The devices of this process."""
    try:
        found = jax.devices(name)
    except RuntimeError as error:
        raise ValueError(
            f"--compile {name}: JAX finds no such device here ({error}); use cpu, or a "
            "TPU slice such as v5e:2x4."
        ) from error
    if len(found) < count:
        raise ValueError(
            f"--compile {name}: the mesh has {count} devices, and here are "
            f"{len(found)}; give a smaller --devices."
        )
    return found[:count]
