"""The directory of a run: its lock, and its configuration.

The lock keeps two runs apart. A run whose configuration differs from `config.yaml` is
refused.
"""

import contextlib
import dataclasses
import fcntl
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.checkpointing.bucket import bucket_address, mirrored
from grpo_jax.checkpointing.retention import StepFolders, best_mode
from grpo_jax.config import EMBEDDED, TrainConfig, validation
from grpo_jax.config.files import load_config, to_yaml, write_text
from grpo_jax.reporting.logs import attach_log_file
from grpo_jax.tasks import names_file
from grpo_jax.training._manifest import (
    Origin,
    changes,
    has_begun,
    read_data,
    read_manifest,
)
from grpo_jax.weights.folder import remove_unfinished

# Fields that may change when a run is resumed: where it is stored, what is stored, and
# how work is spread over time and devices.
_FREE_FIELDS = (
    *("run_dir", "mesh", "report", "microbatch_size", "eval_batch_size", "remat"),
    *("packing", "attention"),
    *(f"checkpoint.{n}" for n in ("every", "keep", "keep_every", "grace_seconds")),
)


_SAME_ROWS = (
    "\nrows_sha256 and test_rows_sha256 are of the rows: resume with the same ones, "
    "with all their columns and in the same order."
)


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Holds the lock of a run directory, which is created if it is missing.

    Raises:
      ValueError: if another process holds it, or if the directory cannot be written.
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


def run_path(run_dir: str | None, task: str) -> Path:
    """The local directory of a run; by default a folder of `runs` named after its task.

    For a bucket, a new name in the folder of temporary files.
    """
    if (address := bucket_address(run_dir)) is not None:
        made = Path(tempfile.gettempdir()) / f"grpo-jax-{uuid.uuid4().hex[:12]}"
        return made / Path(address).name
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(task).stem).strip("-.") or "run"
    return Path(run_dir or Path("runs") / name).expanduser()


@contextlib.contextmanager
def open_run_dir(
    path: Path, config: TrainConfig, data: Mapping[str, Any]
) -> Iterator[tuple[Origin, Callable[[], None]]]:
    """Locks the directory for a run, and logs into it.

    Yields:
      The run's origin, and what is to be called before a checkpoint is saved: it sends
      the files of a run in a bucket there.

    Raises:
      ValueError: as `claim`, `mirrored` and `check_config`.
    """
    address = bucket_address(config.run_dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(claim(path))
        send = lambda: None  # noqa: E731
        if address is not None:
            stack.callback(_remove_empty, path.parent)
            send = stack.enter_context(mirrored(address, path))
        remove_unfinished(path)
        check_config(path, config, data)
        stack.enter_context(attach_log_file(path))
        yield Origin.read(read_manifest(path)), send


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_config(
    path: Path, config: TrainConfig, data: Mapping[str, Any] | None = None
) -> None:
    """Save the configuration of a new run; compare it if there is one already.

    Any run may follow one that wrote nothing, for example because its model was
    missing. `steps` may change where the learning rate is constant, but not below the
    steps that are done.

    Args:
      data: the result of `describe_data`; None compares the configuration only.

    Raises:
      ValueError: if the directory holds a run with another configuration or other
        rows, naming what differs. Other rewards are not refused.
    """
    if not (path / "config.yaml").exists() or not has_begun(path):
        write_text(path / "config.yaml", to_yaml(config))
        return
    before = read_config(path)
    steps = config.steps
    done = max(StepFolders(path / "checkpoints").steps(), default=0)
    moved = steps != before.steps and config.optimizer.schedule == "constant"
    if moved and steps >= done:
        before = dataclasses.replace(before, steps=steps)
    fields = validation.differences(
        _with_best_mode(before), _with_best_mode(config), ignore=_free_fields(config)
    )
    rows = list(changes(read_data(path), data or {}))
    if fields or rows:
        # Other fields may choose other rows; only equal ones need the explanation.
        hints = "" if fields else _SAME_ROWS
        if moved and steps < done:
            hints += f"\n{done} steps are done: steps may be {done} or more."
        lines = "\n  ".join(["", *fields, *rows])
        raise ValueError(
            "use another run_dir (--run-dir), or the same configuration to resume: "
            f"{config.run_dir or path} holds a run with another configuration (stored "
            "and new value)"
            f"{lines}{hints}"
        )
    if moved:
        write_text(path / "config.yaml", to_yaml(before))


def _free_fields(config: TrainConfig) -> tuple[str, ...]:
    """What may change: not how sequences are grouped where experts are balanced.

    The balance is of the tokens that are computed together.
    """
    fixed = set()
    if config.objective.router_aux_loss_coef:
        fixed = {"microbatch_size", "packing"}
        fixed |= {"mesh"} if config.mesh.mode == "pmap" else set()
    return tuple(name for name in _FREE_FIELDS if name not in fixed)


def _with_best_mode(config: TrainConfig) -> TrainConfig:
    """The configuration with the mode that its metric implies written out."""
    mode = best_mode(config.checkpoint)
    checkpoint = dataclasses.replace(config.checkpoint, best_mode=mode)
    return dataclasses.replace(config, checkpoint=checkpoint)


def read_config(path: Path) -> TrainConfig:
    """The configuration of a run.

    Raises:
      ValueError: if the directory holds no run, or its file cannot be read.
    """
    file = path / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{path} holds no run: it has no config.yaml.")
    return load_config(file)


def read_located_config(path: Path) -> TrainConfig:
    """The configuration of a run, with paths that are valid from any folder.

    A relative path is looked up in the folder where the run was started last, then in
    the current one.

    Raises:
      ValueError: as `read_config`, and if a local model is in neither of them.
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
