"""The directory of a run: who owns it, what it was asked to do, how it stands.

A lock keeps two runs apart; `config.yaml` says what the run is and refuses another one;
`manifest.json` says where it ran and how it stands.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import yaml
from jax.sharding import Mesh

from grpo_jax import validation
from grpo_jax.config import EMBEDDED, TrainConfig
from grpo_jax.reporting.metrics import METRICS_FILE, plain

Status = Literal["running", "preempted", "failed", "finished"]

# What does not make another run of it: where it is kept and how work is spread.
_FREE_FIELDS = ("run_dir", "mesh", "report", "checkpoint.grace_seconds")
_PACKAGES = ("grpo-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Settings that can change speed or bits. Only these: an environment holds secrets.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64")


class _Yaml(yaml.SafeLoader):
    """YAML in which 1e-6 is a number, as in version 1.2, and not a text."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Holds the lock of a run directory, which is made if need be.

    Raises:
      ValueError: if another process works in it, or it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "run.lock", "a")
    except OSError as error:
        raise ValueError(
            f"run_dir {path} cannot be written ({error.strerror}); choose another."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"run_dir {path} is in use by another run; wait or choose another."
            ) from error
        yield


def check_config(path: Path, config: TrainConfig) -> None:
    """Save the configuration of a new run, or compare it with that of an old one.

    A run that stopped before it wrote anything, say for want of its model, may be
    followed by any other.

    Raises:
      ValueError: if the directory holds a run of another configuration, with the fields
        in which they differ.
    """
    file = path / "config.yaml"
    if not file.exists() or not _has_begun(path):
        write_atomically(
            file, yaml.safe_dump(validation.to_dict(config), sort_keys=False)
        )
        return
    differing = validation.differences(read_config(path), config, ignore=_FREE_FIELDS)
    if differing:
        raise ValueError(
            f"run_dir {path} holds a run with another configuration: "
            f"{'; '.join(differing)} (there and here). Use another run_dir, or the "
            "same configuration to resume."
        )


def read_config(path: Path) -> TrainConfig:
    """The configuration a run was started with.

    Raises:
      ValueError: if the directory holds no run, or its file was made by hand wrongly.
    """
    file = path / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{path} holds no run: it has no config.yaml.")
    return load_config(file)


def load_config(file: Path, *, model: str | None = None) -> TrainConfig:
    """The configuration in a YAML file; fields left out take the model's defaults.

    Args:
      model: stands in for the model that the file names.

    Raises:
      ValueError: for a file that is not YAML, an unknown field or a wrong value.
    """
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Yaml)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as YAML: {reason}") from error
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} must hold a mapping of fields, as config.yaml does.")
    name = values.get("model", EMBEDDED) if model is None else model
    defaults = validation.to_dict(TrainConfig(model=name))
    given = validation.overlay(defaults, {**values, "model": name})
    return validation.from_dict(TrainConfig, given)


def write_manifest(path: Path, config: TrainConfig, mesh: Mesh, status: Status) -> None:
    """Record versions, devices, mesh, revision, seed and the status of the run."""
    devices = mesh.devices.flat
    manifest = {
        "status": status,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "backend": jax.default_backend(),
        "devices": [f"{device.platform}:{device.device_kind}" for device in devices],
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "git_revision": _git_revision(),
        "seed": config.seed,
        "environment": {v: os.environ[v] for v in _VARIABLES if v in os.environ},
    }
    write_json(path / "manifest.json", manifest)


def set_status(path: Path, status: Status) -> None:
    """Change the status in the manifest of a run."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    write_json(path / "manifest.json", manifest | {"status": status})


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write strict JSON, for people to read as well."""
    write_atomically(file, json.dumps(plain(values), indent=2, allow_nan=False) + "\n")


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _has_begun(path: Path) -> bool:
    metrics = path / METRICS_FILE
    return (path / "checkpoints").exists() or (
        metrics.exists() and metrics.stat().st_size > 0
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the code, with a mark if files differ from it; None if unknown.

    Code that was copied without its history has it in a file `REVISION`.
    """
    here = Path(__file__).parent
    copied = here.parent.parent / "REVISION"
    if copied.is_file():
        return copied.read_text(encoding="utf-8").strip()
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
