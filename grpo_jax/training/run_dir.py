"""The directory of a run: who owns it, what it was asked to do, how it stands.

A lock keeps two runs apart; `config.yaml` says what the run is and refuses another one;
`manifest.json` says where it ran and how it stands.
"""

import contextlib
import dataclasses
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
from grpo_jax.config import EMBEDDED, ObjectiveConfig, TrainConfig
from grpo_jax.reporting.metrics import METRICS_FILE, plain
from grpo_jax.training.best import best_mode
from grpo_jax.training.step_folders import StepFolders

Status = Literal["running", "preempted", "failed", "finished"]

# What does not make another run of it: where it is kept, what is kept of it, and how
# work is spread over time and devices.
_FREE_FIELDS = (
    *("run_dir", "mesh", "report", "microbatch_size", "eval_batch_size", "remat"),
    *(f"checkpoint.{n}" for n in ("every", "keep", "keep_every", "grace_seconds")),
)
_PACKAGES = ("grpo-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Settings that can change speed or bits. Only these: an environment holds secrets.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64")


class _Reader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number, as in version 1.2, and not a text."""


class _Writer(yaml.SafeDumper):
    """Writes texts so that `_Reader` reads them as texts: '1e-6' in quotes."""


for _kind in (_Reader, _Writer):
    _kind.add_implicit_resolver(
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


def check_config(
    path: Path, config: TrainConfig, data: Mapping[str, Any] | None = None
) -> None:
    """Save what a new run is, or compare it with what the old one was.

    A run that stopped before it wrote anything, say for want of its model, may be
    followed by any other. Other steps, not fewer than are done, continue a run whose
    learning rate is constant.

    Args:
      data: what `setup.describe_data` says of its rows and rewards; None compares the
        configuration alone.

    Raises:
      ValueError: if the directory holds a run of another configuration or on other
        rows, with the fields in which they differ. Other rewards are not refused.
    """
    if not (path / "config.yaml").exists() or not _has_begun(path):
        _write_config(path, config)
        return
    before = read_config(path)
    steps, done = (
        config.steps,
        max(StepFolders(path / "checkpoints").steps(), default=0),
    )
    moved = steps != before.steps and config.optimizer.schedule == "constant"
    if moved and steps >= done:
        before = dataclasses.replace(before, steps=steps)
    known, data = read_data(path), data or {}
    differing = [
        *validation.differences(
            _with_best_mode(before), _with_best_mode(config), ignore=_FREE_FIELDS
        ),
        *(
            f"{name}: {known[name]!r} and {data[name]!r}"
            for name in sorted(known.keys() & data.keys() - {"rewards"})
            if known[name] != data[name]
        ),
    ]
    if differing:
        few = f" {done} steps are done: steps may be {done} or more." if moved else ""
        raise ValueError(
            f"run_dir {path} holds a run with another configuration: "
            f"{'; '.join(differing)} (there and here). Use another run_dir, or the "
            f"same configuration to resume.{few}"
        )
    if moved:
        _write_config(path, before)


def _with_best_mode(config: TrainConfig) -> TrainConfig:
    """The configuration with a choice in place of the mode that the metric implies."""
    mode = best_mode(config.checkpoint)
    checkpoint = dataclasses.replace(config.checkpoint, best_mode=mode)
    return dataclasses.replace(config, checkpoint=checkpoint)


def read_data(path: Path) -> dict[str, Any]:
    """What the rows and rewards of a run were, as its manifest says.

    Nothing where that is unknown: a manifest that is missing, damaged or older.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return dict(manifest["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_config(path: Path, config: TrainConfig) -> None:
    text = yaml.dump(validation.to_dict(config), Dumper=_Writer, sort_keys=False)
    write_atomically(path / "config.yaml", text)


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
        values = yaml.load(file.read_text(encoding="utf-8"), _Reader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as YAML: {reason}") from error
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} must hold a mapping of fields, as config.yaml does.")
    values = _with_preset(values)
    name = values.get("model", EMBEDDED) if model is None else model
    defaults = validation.to_dict(TrainConfig(model=name))
    given = validation.overlay(defaults, {**values, "model": name})
    return validation.from_dict(TrainConfig, given)


def _with_preset(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values with `objective.preset`, which is no field, as the fields it means."""
    objective = values.get("objective")
    if not isinstance(objective, Mapping) or "preset" not in objective:
        return values
    others = {name: value for name, value in objective.items() if name != "preset"}
    preset = validation.to_dict(ObjectiveConfig.preset(objective["preset"]))
    return {**values, "objective": preset | others}


def write_manifest(
    path: Path,
    config: TrainConfig,
    mesh: Mesh,
    status: Status,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Record versions, devices, mesh, revision, seed, data and status of the run."""
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
        "data": dict(data or {}),
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
