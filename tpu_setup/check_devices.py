"""Checks that JAX finds the expected accelerators, and that they can communicate.

Runs on every worker of a TPU at the same time (`install.sh` starts it), or alone on a
GPU box or a laptop. Exits 0 with one line of facts, or 1 with what is wrong.
"""

import argparse
import sys
import uuid
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

REMEDY = (
    "Look for another process on the chips (sudo lsof -w /dev/accel* /dev/vfio/*), a "
    "stale /tmp/libtpu_lockfile, and JAX without accelerator support; see "
    "Troubleshooting in tpu_setup/README.md."
)


def find_problems(
    *, platform: str, devices: int | None, processes: int | None
) -> list[str]:
    """The differences from the expected platform and counts, one sentence each."""
    problems = []
    found = jax.default_backend()
    if found != platform:
        problems.append(f"expected platform {platform}, found {found}. {REMEDY}")
    if devices is not None and jax.device_count() != devices:
        problems.append(f"expected {devices} devices, found {jax.device_count()}.")
    if processes is not None and jax.process_count() != processes:
        problems.append(
            f"expected {processes} processes, found {jax.process_count()}: run the "
            "check on all workers at once, with --distributed."
        )
    return problems


def all_reduce_total() -> int:
    """The sum 1 + 2 + ... + n over n devices, each contributing its own number."""
    devices = np.array(jax.devices())
    mesh = Mesh(devices, ("device",), axis_types=(AxisType.Auto,))
    numbers = np.arange(1, devices.size + 1, dtype=np.int32)
    shards = jax.make_array_from_callback(
        numbers.shape, NamedSharding(mesh, P("device")), lambda index: numbers[index]
    )
    total = jax.shard_map(
        lambda shard: lax.psum(jnp.sum(shard), "device"),
        mesh=mesh,
        in_specs=P("device"),
        out_specs=P(),
    )
    return int(jax.jit(total)(shards))


def check_all_reduce() -> list[str]:
    """The problem with a sum over all devices, if there is one."""
    count = jax.device_count()
    total, expected = all_reduce_total(), count * (count + 1) // 2
    if total == expected:
        return []
    return [f"a sum over all devices gave {total} instead of {expected}."]


def check_bucket(folder: str) -> list[str]:
    """The problem with writing, reading and deleting a small file, if there is one."""
    from etils import epath

    # The unique name keeps workers that check at the same time apart.
    path = epath.Path(folder) / f"check-devices-{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("written")
        text = path.read_text()
        path.unlink()
    except (OSError, ImportError) as error:
        return [
            f"cannot write to {folder}: {error}. Give the service account of the TPU "
            "roles/storage.objectAdmin on the bucket."
        ]
    return (
        []
        if text == "written"
        else [f"{folder} returned other bytes than were written."]
    )


def check(arguments: argparse.Namespace) -> list[str]:
    """All problems; if a check fails, the later checks are skipped."""
    try:
        if arguments.distributed:
            jax.distributed.initialize()
        problems = find_problems(
            platform=arguments.platform,
            devices=arguments.devices,
            processes=arguments.processes,
        )
    except (RuntimeError, ValueError) as error:
        return [f"JAX does not start on {arguments.platform} ({error}). {REMEDY}"]
    problems = problems or check_all_reduce()
    if not problems and arguments.bucket:
        problems = check_bucket(arguments.bucket)
    return problems


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--platform", required=True, choices=("tpu", "gpu", "cpu"))
    parser.add_argument("--devices", type=int, help="expected over all processes")
    parser.add_argument("--processes", type=int, help="expected number of processes")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes first (TPU VMs, SLURM)",
    )
    parser.add_argument("--bucket", help="gs:// folder to write a small file to")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 if everything is as expected."""
    arguments = parse_arguments(argv)
    problems = check(arguments)
    for problem in problems:
        print(f"check_devices: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(
        f"ok: {jax.device_count()} x {jax.devices()[0].device_kind}, "
        f"process {jax.process_index()} of {jax.process_count()}, jax {jax.__version__}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
