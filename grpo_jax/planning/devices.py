"""Memory and peak rates of devices, by their makers, and the devices of TPU slices."""

import re
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import AbstractDevice


class Device(NamedTuple):
    """One JAX device: a TPU chip, or a GPU."""

    kind: str  # `device_kind` of JAX
    memory_gib: int
    flops: float  # dense bfloat16 operations per second
    bandwidth: float  # bytes per second of its memory
    links: float | None = None  # bytes per second that it receives from other chips

    @property
    def described(self) -> AbstractDevice:
        """What JAX needs to know of it to trace for it."""
        platform = "tpu" if self.kind.startswith("TPU") else "gpu"
        return AbstractDevice(self.kind, None, platform)


# TPUs: https://docs.cloud.google.com/tpu/docs/v6e and the pages beside it. GPUs: the
# data sheets of their maker for SXM modules, without sparsity; an A100 of 80 GB. Links
# are what these pages call inter-chip interconnect, 1,600 Gbps of a v5e, of all ports.
DEVICES = {
    "v4": Device("TPU v4", 32, 275e12, 1.2e12, 300e9),
    "v5e": Device("TPU v5 lite", 16, 197e12, 0.819e12, 200e9),
    "v5p": Device("TPU v5p", 95, 459e12, 2.765e12, 600e9),
    "v6e": Device("TPU v6 lite", 32, 918e12, 1.638e12, 400e9),
    "a100": Device("NVIDIA A100-SXM4-80GB", 80, 312e12, 2.039e12),
    "h100": Device("NVIDIA H100 80GB HBM3", 80, 989e12, 3.35e12),
    "h200": Device("NVIDIA H200", 141, 989e12, 4.8e12),
}
# `device_kind` of JAX -> device. Only exact names: an H100 on a PCIe card is slower.
# TPUs: jax/_src/pallas/mosaic/tpu_info.py of JAX.
_KINDS = {device.kind: name for name, device in DEVICES.items()} | {
    "TPU v5": "v5p",
    "TPU v5e": "v5e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100",
}
# Flags of CPUs with instructions for products of bfloat16.
_FAST_BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16"})
# Types of TPU slices, as in v5p-16: their device, and what the number counts for each.
# https://docs.cloud.google.com/tpu/docs/v5p: cores, two to a chip; v5e: chips.
_SLICES = {
    "v4": ("v4", 2),
    "v5p": ("v5p", 2),
    "v5e": ("v5e", 1),
    "v5litepod": ("v5e", 1),
    "v6e": ("v6e", 1),
}


def find_device(name: str) -> tuple[Device, int | None]:
    """The device of a name, and the number of devices if it is the type of a slice.

    "v5p" is a device. "v5p-16" is a slice of 8 devices, because its type counts cores.

    Raises:
      ValueError: for an unknown name, or a slice with half a device.
    """
    if name in DEVICES:
        return DEVICES[name], None
    type_name = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]*)", name)
    if type_name is None or type_name[1] not in _SLICES:
        raise ValueError(
            f"device {name!r} is not known; use one of {', '.join(DEVICES)}, the type "
            "of a TPU slice such as v5p-16, or --device-memory-gib."
        )
    known, cores = _SLICES[type_name[1]]
    count = int(type_name[2])
    if count % cores:
        raise ValueError(
            f"device {name!r}: this type counts cores, {cores} to a device, so there "
            f"is no half of one; {type_name[1]}-{count + 1} is the next."
        )
    return DEVICES[known], count // cores


def has_bfloat16_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products of bfloat16 are faster than those of float32 on this CPU.

    They are where it has AMX or AVX-512 for bfloat16, which XLA uses from jax 0.11 on:
    1,290 instead of 310 GFLOP/s on two cores of a Xeon with AMX, 370 instead of 190 on
    two of an EPYC without it. `cpuinfo` is Linux's list of what the CPU can do.
    """
    if jax.__version_info__ < (0, 11) or not cpuinfo.is_file():
        return False
    return not _FAST_BFLOAT16.isdisjoint(cpuinfo.read_text().split())


def known_flops(kind: str) -> float | None:
    """Dense bfloat16 operations per second of a `device_kind`; None if not known."""
    name = _KINDS.get(kind)
    return None if name is None else DEVICES[name].flops
