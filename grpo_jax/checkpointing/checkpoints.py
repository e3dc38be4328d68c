"""Checkpoints of a run: saved while it goes on, verified when they are read.

Layout, readable with Orbax alone: ``<directory>/<step>/`` holds the checkpointables
``params``, ``optimizer`` (``step`` and ``opt_state``) and ``meta`` (JSON: ``schema``,
``run``, ``metrics`` by name, ``arrays`` with shape, dtype and digest by path,
``sha256``). A frozen base under adapters is not saved. Orbax itself has no checksums
and never falls back.

    from orbax.checkpoint import v1 as ocp
    meta = ocp.load_checkpointables("checkpoints/100", {"meta": None})["meta"]
"""

import contextlib
import gc
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from grpo_jax.checkpointing.corruption import (
    BROKEN,
    READ_ERRORS,
    DamageError,
    damage_of,
    no_good_one,
    patiently,
)
from grpo_jax.checkpointing.metadata import (
    check_digests,
    check_fits,
    check_inventory,
    make_inventory,
)
from grpo_jax.checkpointing.retention import BestStep
from grpo_jax.checkpointing.step_folders import StepFolders
from grpo_jax.checkpointing.targets import (
    host_targets,
    restore_targets,
    savable,
)
from grpo_jax.config import CheckpointConfig
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.agreement import Agreement, end_of_work

_LOG = logging.getLogger(__name__)

# Seconds that a process which fails waits for what it still writes.
_LAST_SECONDS = 60.0

# A step by its number, or the best one that is kept; None is the newest.
Step = int | Literal["best"] | None


class Checkpoints:
    """The checkpoints in one folder, on storage that all processes share.

    Every process makes the same calls in the same order.

    Attributes:
      failed_saves: saves that did not end in a checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        report: Callable[[str], None] = _LOG.warning,
        read_only: bool = False,
    ) -> None:
        """Opens a folder, which need not be there yet.

        Args:
          report: is told of each damaged step and each failed save, with the step.
          read_only: leave the folder as it is, whatever is found in it: for all but
            the run that holds the lock of its directory.
        """
        self.failed_saves = 0
        self._read_only = read_only
        self._folders = StepFolders(Path(directory).absolute())
        self._config = config
        self._report = report
        self._running: tuple[int, ocp.AsyncResponse[None] | Future] | None = None
        self._best = BestStep(config, self._inventory, report=report)

    def steps(self) -> list[int]:
        """The steps on disk, oldest first; waits for the save that still runs."""
        self._finish()
        return self._folders.steps()

    def save(
        self,
        step: int,
        items: Mapping[str, PyTree],
        meta: Mapping[str, Any],
        *,
        metrics: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> None:
        """Starts to write a checkpoint, after the save before it has ended.

        On return the arrays have left the devices: they may be donated. A step that
        exists is replaced. A save that fails is reported and counted, and leaves the
        other steps as they are.

        Args:
          items: the pytrees of arrays, by the name of their folder: `params` and
            `optimizer`.
          meta: JSON values to remember beside the arrays.
          metrics: numbers of the step by name, by which the best one is known.
          wait: return only when the checkpoint is complete.
        """
        self._finish()
        saved = jax.tree.map(savable, dict(items))
        inventory = make_inventory(saved, meta, metrics)
        error = end_of_work(lambda _: self._prepare())
        if error is not None:
            self._count_failure(step, error)
            return
        self._best.saving(step, inventory["metrics"])
        self._running = (
            step,
            _save(self._folders.path(step), {**saved, "meta": inventory}),
        )
        if wait:
            self._finish()

    def restore(
        self, like: Mapping[str, PyTree], *, step: Step = None
    ) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        """The newest good checkpoint: its step, its pytrees, its `meta`.

        Newer steps that are damaged are renamed to ``<step>.damaged`` once an older
        good one is found, unless the folder is only read. An error of the storage that
        may pass (EIO) is waited for, some seconds, and then raised as it is.

        Args:
          like: arrays or `ShapeDtypeStruct` with the wanted shardings, whatever mesh
            the checkpoint was saved on. Arrays without a mesh beside others with one
            are replicated on it.
          step: exactly this step, or "best"; None takes the newest.

        Returns:
          None if there is no checkpoint.

        Raises:
          ValueError: if `step` does not exist or is damaged, if every checkpoint is
            damaged, if the arrays on disk differ from `like` in path, shape or dtype,
            or do not divide over its mesh, or if a newer version wrote them. Nothing
            is renamed then.
        """
        return self._find(step, dict(like))

    def restore_params(
        self, step: Step = None, *, like: PyTree | None = None
    ) -> tuple[int, PyTree, dict[str, Any]]:
        """As `restore`, the parameters alone: step, parameters, `meta`.

        Args:
          like: as for `restore`; None gives NumPy arrays in nested dicts, whatever
            devices there are.

        Raises:
          ValueError: as `restore`, and if there is no checkpoint.
        """
        found = self._find(step, None if like is None else {"params": like})
        if found is None:
            raise ValueError(f"there is no checkpoint in {self._folders.directory}.")
        step, items, meta = found
        return step, items["params"], meta

    def close(self) -> None:
        """Waits for the save that still runs."""
        self._finish()

    def abandon(self) -> None:
        """Waits for what this process still writes, after an error that ends it.

        Other processes may be elsewhere; a step that they do not complete is none.
        """
        if self._running is not None:
            (_, response), self._running = self._running, None
            with contextlib.suppress(Exception):
                response.result(_LAST_SECONDS)

    def _finish(self) -> None:
        """Wait for the running save, then remove steps that are no longer kept."""
        if self._running is None:
            return
        (step, response), self._running = self._running, None
        error = end_of_work(response.result)
        if error is not None:
            self._count_failure(step, error)
        else:
            if jax.process_index() == 0:
                self._remove_old()

    def _remove_old(self) -> None:
        try:
            self._folders.remove_old(
                keep=self._config.keep,
                keep_every=self._config.keep_every,
                best=self._best.among(self._folders.steps()),
            )
        except OSError as error:
            self._report(f"old checkpoints stay until the next save: {error}")

    def _prepare(self) -> None:
        if jax.process_index() == 0:
            self._folders.directory.mkdir(parents=True, exist_ok=True)
            self._folders.remove_leftovers()

    def _count_failure(self, step: int, error: Exception) -> None:
        # What TensorStore and JAX raise when storage or another process fails.
        if not isinstance(error, OSError | ValueError | RuntimeError):
            raise error
        self.failed_saves += 1
        if jax.process_index() == 0:
            # What was written so far would keep a full disk full.
            self._folders.remove_leftovers()
        self._report(
            f"checkpoint {step} could not be saved: {str(error)[:300]} "
            f"({self.failed_saves} failed so far; the run goes on)"
        )

    def _find(
        self, step: Step, like: dict[str, PyTree] | None
    ) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        self._finish()
        _wait_for_all("old checkpoints are removed")
        damaged: dict[int, DamageError] = {}
        wanted = self._best.named(self._folders.steps()) if step == "best" else step
        for candidate in patiently(lambda: self._folders.candidates(wanted)):
            try:
                items, inventory = self._load(candidate, like)
            except DamageError as error:
                if self._read_only and candidate not in self._folders.steps():
                    self._report(
                        f"checkpoint {candidate} was removed while it was read"
                    )
                    return self._find(step, like)  # which has newer ones
                damaged[candidate] = error
                continue
            for bad, reason in damaged.items():
                self._set_aside(bad, str(reason), instead=candidate)
            return candidate, items, inventory["run"]
        if damaged:
            others = [other for other in self.steps() if other not in damaged]
            raise ValueError(
                f"no good checkpoint in {self._folders.directory}: "
                + no_good_one(damaged, others)
            ) from next(iter(damaged.values()))
        return None

    def _load(
        self, step: int, like: dict[str, PyTree] | None
    ) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """The items of a step and its inventory, verified; raises DamageError."""
        path = self._folders.path(step)
        inventory = _read_together(path, {"meta": None})["meta"]
        check_inventory(inventory, name=str(path))
        if like is None:
            targets = {"params": host_targets(inventory)}
        else:
            check_fits(inventory, like, name=str(path))
            targets = restore_targets(like)
        items = _read_together(path, targets)
        if like is not None:
            # Host arrays become arrays of the default device, free to join any mesh.
            items = jax.tree.map(jnp.asarray, items)
        check_digests(inventory, items)
        return items, inventory

    def _inventory(self, step: int) -> dict[str, Any]:
        """The inventory alone, read by this process for itself."""
        path = self._folders.path(step)
        # Without Orbax, which counts what it reads and saves: a process that read more
        # than the others would wait for them under another number.
        file = path / "meta" / "data.json"
        inventory = json.loads(patiently(lambda: file.read_text(encoding="utf-8")))
        check_inventory(inventory, name=str(path))
        return inventory

    def _set_aside(self, step: int, reason: str, *, instead: int) -> None:
        fate = "it stays where it is"
        if not self._read_only:
            name = f"{step}.damaged"
            if jax.process_index() == 0:
                name = self._folders.set_aside(step)
            _wait_for_all(f"checkpoint {step} is set aside")
            fate = f"it was set aside as {name}"
        self._report(
            f"checkpoint {step} is damaged ({reason}); {fate}, step {instead} is used"
        )


def _save(path: Path, items: dict[str, Any]) -> "ocp.AsyncResponse[None] | Future":
    """Starts to write a folder; what fails at once is told like what fails later."""
    try:
        with _handlers():
            return ocp.save_checkpointables_async(str(path), items, overwrite=True)
    except OSError as error:
        failed: Future[None] = Future()
        failed.set_exception(error)
        return failed


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _handlers(*, alone: bool = False) -> ocp.Context:
    """How each folder is written and read, whatever Orbax's own notes on it say.

    Args:
      alone: do not wait for other processes.
    """
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.PyTreeHandler, checkpointable_name="params")
    registry.add(ocp.handlers.PyTreeHandler, checkpointable_name="optimizer")
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
    context = ocp.Context()
    context.checkpointables_options.registry = registry
    # Float32 weights shrink by 8 %, for half the processor time of a save.
    context.array_options.saving.use_compression = False
    if alone:
        process = jax.process_index()
        context.multiprocessing_options.primary_host = process
        context.multiprocessing_options.active_processes = {process}
        context.multiprocessing_options.barrier_sync_key_prefix = f"alone-{process}"
    return context


def _read_together(path: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """What `_read` returns; damage that one process meets is damage for all."""
    items, damage = None, None
    with Agreement().phase(f"reading {path}"):
        try:
            items = patiently(lambda: _read(path, targets))
        except DamageError as error:
            damage = error
    damaged = meshes.gather_rows(np.array([damage is not None]))
    if items is None or damaged.any():
        raise damage or DamageError(f"process {damaged.argmax()} cannot read it")
    return items


def _read(path: Path, targets: dict[str, Any]) -> dict[str, Any]:
    for name in targets:
        try:
            (path / name / ".").stat()
        except BROKEN as error:
            raise DamageError(f"folder {name} is missing") from error
    # Orbax leaves coroutines behind when it fails. They are collected here: the warning
    # that they were never awaited says nothing.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            # Alone: a process that cannot read its part must not keep others waiting.
            with _handlers(alone=jax.process_count() > 1):
                return ocp.load_checkpointables(str(path), targets)
        except READ_ERRORS as error:
            damage = damage_of(error)
            if damage is None:
                raise
        gc.collect()
    raise damage
