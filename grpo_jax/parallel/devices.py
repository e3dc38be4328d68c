"""What a device can do at most, by the figures of its maker."""

from typing import NamedTuple


class Device(NamedTuple):
    """One JAX device: a TPU chip, or a GPU."""

    memory_gib: int
    flops: float  # dense bfloat16 operations per second
    bandwidth: float  # bytes per second of its memory


# TPUs: https://docs.cloud.google.com/tpu/docs/v6e and the pages beside it. GPUs: the
# data sheets of their maker for SXM modules, without sparsity; an A100 of 80 GB.
DEVICES = {
    "v4": Device(32, 275e12, 1.2e12),
    "v5e": Device(16, 197e12, 0.819e12),
    "v5p": Device(95, 459e12, 2.765e12),
    "v6e": Device(32, 918e12, 1.638e12),
    "a100": Device(80, 312e12, 2.039e12),
    "h100": Device(80, 989e12, 3.35e12),
    "h200": Device(141, 989e12, 4.8e12),
}
# What `device_kind` says, word for word: an H100 on a PCIe card is a slower one. TPUs:
# jax/_src/pallas/mosaic/tpu_info.py of JAX.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def known_flops(kind: str) -> float | None:
    """Dense bfloat16 operations per second of a `device_kind`; None if not known."""
    name = _KINDS.get(kind)
    return None if name is None else DEVICES[name].flops
