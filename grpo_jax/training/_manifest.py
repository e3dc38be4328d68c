"""`manifest.json`: how a run began, where its parts ran, and its status."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from grpo_jax.config.files import to_jsonable, write_json
from grpo_jax.planning.devices import has_bfloat16_products
from grpo_jax.reporting.metrics import METRICS_FILE

Status = Literal["running", "preempted", "failed", "finished"]

_PACKAGES = ("grpo-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Settings that can change speed or bits. Only these: an environment holds secrets.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64")
_SHOWN = 8  # differences that a message lists


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a resumed run takes from its first start.

    Attributes:
      started: the time of that start; chat templates that ask for the date see it.
      commit: of the model on the hub; None for a local model, or if not known yet.
    """

    started: datetime.datetime = field(
        default_factory=lambda: datetime.datetime.now().astimezone()
    )
    commit: str | None = None

    def plain(self) -> dict[str, Any]:
        """As in the manifest."""
        return {
            "started": self.started.isoformat(timespec="seconds"),
            "model_commit": self.commit,
        }

    @classmethod
    def read(cls, manifest: Mapping[str, Any]) -> "Origin":
        """From the manifest; where an older version wrote it, the run begins now."""
        if "started" not in manifest:
            return cls()
        started = datetime.datetime.fromisoformat(manifest["started"])
        return cls(started=started, commit=manifest.get("model_commit"))


def has_begun(path: Path) -> bool:
    """Whether a run in this directory has saved a checkpoint or logged a metric."""
    metrics = path / METRICS_FILE
    return (path / "checkpoints").exists() or (
        metrics.exists() and metrics.stat().st_size > 0
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run that has begun; empty if it is missing or damaged."""
    if not has_begun(path):
        return {}
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def read_data(path: Path) -> dict[str, Any]:
    """Checksums of a run's rows, rewards, prompts and weights, from its manifest.

    Empty if the manifest is missing, damaged, or of a version without them.
    """
    data = read_manifest(path).get("data")
    return data if isinstance(data, dict) else {}


class Record:
    """Writes the manifest of a run; `enabled` on the first process only."""

    def __init__(
        self,
        path: Path,
        seed: int,
        mesh: Mesh,
        origin: Origin,
        *,
        enabled: bool = True,
    ) -> None:
        self._path, self._seed, self._origin = path, seed, origin
        self._enabled = enabled
        # Read once: edits to the code during the run do not change what runs.
        self._machine = _machine(mesh) if enabled else {}
        self._data: Mapping[str, Any] = {}
        self._began = 0

    def check(self, data: Mapping[str, Any]) -> None:
        """Refuse data or a model that differ from those the run began with.

        Raises:
          ValueError: naming what differs.
        """
        self._data = data
        if self._enabled:
            check_data(self._path, data)

    def changed_machine(self) -> list[str]:
        """A warning if the run so far used other software or hardware."""
        parts = _parts(read_manifest(self._path)) if self._enabled else []
        found = list(_changes(parts[-1], self._machine)) if parts else []
        if not found:
            return []
        return [
            f"other software or hardware than before: {'; '.join(_first(found))} "
            "(then and now); the numbers may differ from those of a run that was not "
            "stopped, in their last bits at first"
        ]

    def write(self, status: Status, *, step: int = 0) -> None:
        """Write the status, the start of the run, its software and hardware.

        `parts` gets a new entry whenever the latter two have changed, with the step
        after which this process began.

        Args:
          step: the last one that is done; of a failed run the one that failed.
        """
        if not self._enabled:
            return
        if status == "running":
            self._began = step
        parts, machine = _parts(read_manifest(self._path)), self._machine
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if not parts or list(_changes(parts[-1], machine)):
            parts = [*parts, {"step": self._began, "time": time, **machine}]
        manifest = {
            "status": status,
            "step": step,
            "time": time,
            **self._origin.plain(),
            "command": sys.argv,
            "directory": os.getcwd(),
            "platform": platform.platform(),
            **machine,
            "seed": self._seed,
            "data": self._data,
            "parts": parts,
        }
        write_json(self._path / "manifest.json", manifest)


def check_data(path: Path, data: Mapping[str, Any]) -> None:
    """Refuse to resume or open a run with another model or other prompts.

    Raises:
      ValueError: naming what differs from the manifest.
    """
    found = list(changes(read_data(path), data))
    if found:
        lines = "".join(f"\n  {line}" for line in _first(found))
        raise ValueError(
            "use another run_dir (--run-dir), or bring back the original files: the "
            f"run in {path} began with another model or other prompts (stored and new "
            f"value){lines}\nweights and model_config are of the model's files, and "
            "the prompts_sha256 of the prompts as its tokenizer and chat template "
            "encode them."
        )


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A text for each value that differs, of the entries that both have.

    An entry may be a mapping. Reward functions are left out, because they may change.
    Of a SHA-256 the text has the first 12 digits.
    """
    now = to_jsonable(now)
    for name in sorted(then.keys() & now.keys() - {"rewards"}):
        old, new = then[name], now[name]
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            old, new = {"": old}, {"": new}
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                path = f"{name}.{key}" if key else name
                text = f"{path}: {old.get(key)!r} and {new.get(key)!r}"
                yield re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)


def _first(found: list[str]) -> list[str]:
    more = len(found) - _SHOWN
    return found[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])


def _machine(mesh: Mesh) -> dict[str, Any]:
    """The software and hardware that numbers depend on."""
    devices = mesh.devices.flat
    # It decides in which dtype a run updates, if the run leaves it open.
    fast = devices[0].platform == "cpu" and has_bfloat16_products()
    more = " with fast bfloat16" if fast else ""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "backend": jax.default_backend(),
        "devices": [
            f"{device.platform}:{device.device_kind}{more}" for device in devices
        ],
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "git_revision": _git_revision(),
        "environment": {v: os.environ[v] for v in _VARIABLES if v in os.environ},
    }


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    def counted(machine: Mapping[str, Any]) -> dict[str, Any]:
        kinds = Counter(machine.get("devices", ()))
        devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        return {**machine, "devices": devices}

    return changes(counted(then), counted(now))


def _parts(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a run so far; an older version's manifest has the newest only."""
    if "parts" in manifest or "versions" not in manifest:
        return list(manifest.get("parts", []))
    names = ("python", "versions", "backend", "devices", "processes", "mesh")
    names += ("git_revision", "environment")
    return [{name: manifest[name] for name in names if name in manifest}]


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
