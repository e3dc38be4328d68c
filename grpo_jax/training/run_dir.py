"""The directory of a run: who owns it, and what it was asked to do.

A lock keeps two runs apart; `config.yaml` says what the run is and refuses another one.
"""

import contextlib
import dataclasses
import fcntl
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from grpo_jax import validation
from grpo_jax.config import EMBEDDED, ObjectiveConfig, TrainConfig
from grpo_jax.tasks import names_file
from grpo_jax.training.best import best_mode
from grpo_jax.training.files import write_atomically
from grpo_jax.training.manifest import (
    changes,
    has_begun,
    read_data,
    read_manifest,
)
from grpo_jax.training.step_folders import StepFolders

# What does not make another run of it: where it is kept, what is kept of it, and how
# work is spread over time and devices.
_FREE_FIELDS = (
    *("run_dir", "mesh", "report", "microbatch_size", "eval_batch_size", "remat"),
    *(f"checkpoint.{n}" for n in ("every", "keep", "keep_every", "grace_seconds")),
)


_SAME_ROWS = (
    " A digest (..._sha256) is that of the rows: bring back the same ones, with all "
    "their columns and in the same order."
)


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
    if not (path / "config.yaml").exists() or not has_begun(path):
        _write_config(path, config)
        return
    before = read_config(path)
    steps = config.steps
    done = max(StepFolders(path / "checkpoints").steps(), default=0)
    moved = steps != before.steps and config.optimizer.schedule == "constant"
    if moved and steps >= done:
        before = dataclasses.replace(before, steps=steps)
    other_data = list(changes(read_data(path), data or {}))
    differing = [
        *validation.differences(
            _with_best_mode(before), _with_best_mode(config), ignore=_FREE_FIELDS
        ),
        *other_data,
    ]
    if differing:
        hints = _SAME_ROWS if other_data else ""
        if moved:
            hints += f" {done} steps are done: steps may be {done} or more."
        raise ValueError(
            f"run_dir {path} holds a run with another configuration: "
            f"{'; '.join(differing)} (there and here). Use another run_dir, or the "
            f"same configuration to resume.{hints}"
        )
    if moved:
        _write_config(path, before)


def _with_best_mode(config: TrainConfig) -> TrainConfig:
    """The configuration with a choice in place of the mode that the metric implies."""
    mode = best_mode(config.checkpoint)
    checkpoint = dataclasses.replace(config.checkpoint, best_mode=mode)
    return dataclasses.replace(config, checkpoint=checkpoint)


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


def read_located_config(path: Path) -> TrainConfig:
    """The configuration of a run, to be used from any folder.

    What it names by a relative path is that of the folder in which the run was started
    last, or, where it is not there any more, that of the current one.

    Raises:
      ValueError: as `read_config`, and if its model, which was no model of the hub, is
        in neither.
    """
    config, manifest = read_config(path), read_manifest(path)
    if "directory" not in manifest:
        return config
    start = Path(manifest["directory"])

    def located(name: str) -> str:
        there = start / Path(name).expanduser()
        return str(there) if there.exists() else name

    task, data = config.task, config.data
    found = dataclasses.replace(
        config,
        task=located(task) if names_file(task) else task,
        data=None if data is None else located(data),
    )
    if config.model == EMBEDDED or manifest.get("model_commit") is not None:
        return found
    model = located(config.model)
    if not Path(model).expanduser().exists():
        raise ValueError(
            f"the model of the run in {path} was {model!r}, a file or folder that is "
            f"neither in {start}, where the run was started, nor here. Bring it back, "
            "or change its path in config.yaml."
        )
    return dataclasses.replace(found, model=model)


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
