"""Checkpoints of a run, saved in the background and verified when they are read.

Layout, readable with Orbax alone: ``<directory>/<step>/`` holds the checkpointables
``params``, ``optimizer`` (``step`` and ``opt_state``) and ``meta`` (JSON: ``schema``,
``run``, ``metrics`` by name, ``arrays`` with shape, dtype and digest by path,
``sha256``). A run with carry-over adds ``carried`` and ``carried_cache``. A frozen base
under adapters is not saved. Orbax has no checksums and falls back to no older step.

    from orbax.checkpoint import v1 as ocp
    meta = ocp.load_checkpointables("checkpoints/100", {"meta": None})["meta"]
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from grpo_jax.checkpointing import _orbax
from grpo_jax.checkpointing._best_step import BestStep
from grpo_jax.checkpointing._bucket_folders import BucketFolders
from grpo_jax.checkpointing._corruption import (
    CorruptCheckpointError,
    with_retries,
)
from grpo_jax.checkpointing._metadata import (
    check_checksums,
    check_fits,
    check_metadata,
    make_metadata,
)
from grpo_jax.checkpointing._targets import (
    host_targets,
    listed_arrays,
    restore_targets,
    savable,
)
from grpo_jax.checkpointing.retention import StepFolders
from grpo_jax.config import CheckpointConfig
from grpo_jax.parallel import mesh
from grpo_jax.parallel.agreement import Agreement, end_of_work

_LOG = logging.getLogger(__name__)

# Seconds that a failing process waits for its own unfinished save.
_LAST_SECONDS = 60.0

# Which checkpoint to read: a step, the best one that is kept, or (None) the newest.
Step = int | Literal["best"] | None
# What more to read of a checkpoint, given its arrays by path.
_More = Callable[[Mapping[str, jax.ShapeDtypeStruct]], dict[str, PyTree]]


class Checkpoints:
    """The checkpoints in one folder, on storage that all processes share.

    Every process makes the same calls in the same order.

    Attributes:
      failed_saves: saves that did not end in a checkpoint.
    """

    def __init__(
        self,
        directory: Path | str,
        config: CheckpointConfig,
        *,
        report: Callable[[str], None] = _LOG.warning,
        before_save: Callable[[], None] | None = None,
        read_only: bool = False,
    ) -> None:
        """Opens a folder, which need not exist yet.

        Args:
          directory: the folder, or its address ``gs://bucket/...``.
          report: called with a message for each corrupt step and each failed save.
          before_save: called by the first process; its OSError makes the save fail.
          read_only: never change the folder. Set by all readers but the run that holds
            the lock of its directory.
        """
        self.failed_saves = 0
        self._read_only = read_only
        self._folders = _folders_in(directory)
        self._before_save = before_save
        self._config = config
        self._report = report
        self._running: tuple[int, Future[None]] | None = None
        self._best = BestStep(config, self._read_metadata, report=report)

    def steps(self) -> list[int]:
        """The steps on disk, oldest first; waits for a running save."""
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
          meta: JSON values to store beside the arrays.
          metrics: numbers of the step by name; the best step is chosen by them.
          wait: return only when the checkpoint is complete.
        """

        def prepare(_: float) -> None:
            if jax.process_index() == 0:
                if self._before_save is not None:
                    self._before_save()
                self._folders.prepare(step)

        self._finish()
        saved = jax.tree.map(savable, dict(items))
        metadata = make_metadata(saved, meta, metrics)
        error = end_of_work(prepare)
        if error is not None:
            self._count_failure(step, error)
            return
        self._best.saving(step, metadata["metrics"])
        content = {**saved, "meta": metadata}
        try:
            running = _orbax.start_save(self._folders, step, content)
        except OSError as failure:
            # Kept until `_finish`, where all processes learn of it together.
            running = Future()
            running.set_exception(failure)
        self._running = step, running
        if wait:
            self._finish()

    def restore(
        self,
        like: Mapping[str, PyTree],
        *,
        step: Step = None,
        more: _More | None = None,
    ) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        """The newest good checkpoint: its step, its pytrees, its `meta`.

        Newer steps that are corrupt are renamed to ``<step>.damaged`` once an older
        good one is found, unless the folder is read-only. A storage error that may pass
        (EIO) is retried for some seconds, then raised unchanged.

        Args:
          like: arrays or `ShapeDtypeStruct` with the wanted shardings, whatever mesh
            the checkpoint was saved on. Arrays without a mesh beside others with one
            are replicated on it.
          step: exactly this step, or "best"; None is the newest.
          more: returns further items to read, given all arrays of the checkpoint by
            path; for items whose shapes are not known before.

        Returns:
          None if there is no checkpoint.

        Raises:
          ValueError: if `step` does not exist or is corrupt, if every checkpoint is
            corrupt, if the arrays on disk differ from `like` in path, shape or dtype,
            or do not divide over its mesh, or if a newer version wrote them. Nothing
            is renamed then.
        """
        return self._find(step, dict(like), more)

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
        """Waits for a running save."""
        self._finish()

    def abandon(self) -> None:
        """Waits for this process's part of a running save, after an error.

        The other processes may be anywhere, so nothing is agreed with them. A step that
        they do not complete does not count as one.
        """
        if self._running is not None:
            (_, running), self._running = self._running, None
            with contextlib.suppress(Exception):
                running.result(_LAST_SECONDS)

    def _finish(self) -> None:
        """Waits for a running save, then removes steps that are no longer kept."""
        if self._running is None:
            return
        (step, running), self._running = self._running, None
        error = end_of_work(running.result)
        if error is not None:
            self._count_failure(step, error)
            del error, running  # they hold what is collected
            _orbax.collect_leftovers()
        elif jax.process_index() == 0:
            try:
                self._folders.remove_old(
                    keep=self._config.keep,
                    keep_every=self._config.keep_every,
                    best=self._best.among(self._folders.steps()),
                )
            except OSError as failure:
                self._report(f"old checkpoints stay until the next save: {failure}")

    def _count_failure(self, step: int, error: Exception) -> None:
        # What TensorStore and JAX raise when storage or another process fails.
        if not isinstance(error, OSError | ValueError | RuntimeError):
            raise error
        self.failed_saves += 1
        if jax.process_index() == 0:
            # The files of the failed save would keep a full disk full.
            self._folders.remove_leftovers()
        text = str(error)
        # Long ones repeat the path, and end with what went wrong.
        shown = text if len(text) <= 400 else f"{text[:150]} ... {text[-250:]}"
        self._report(
            f"checkpoint {step} could not be saved: {shown} "
            f"({self.failed_saves} failed so far; the run goes on)"
        )

    def _find(
        self, step: Step, like: dict[str, PyTree] | None, more: _More | None = None
    ) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        """The first good candidate; corrupt ones before it are quarantined."""
        self._finish()
        _barrier("old checkpoints are removed")
        directory, wanted = self._folders.directory, step
        if wanted == "best":
            wanted = self._best.among(steps := self._folders.steps())
            if wanted is None:
                raise ValueError(
                    "no checkpoint is known to be the best: the run's checkpoint."
                    f"keep_best is {self._config.keep_best!r}; steps that exist: "
                    f"{steps}."
                )
        corrupt: dict[int, CorruptCheckpointError] = {}
        for candidate in with_retries(lambda: self._folders.candidates(wanted)):
            try:
                items, metadata = self._load(candidate, like, more)
            except CorruptCheckpointError as error:
                if self._read_only and candidate not in self._folders.steps():
                    self._report(
                        f"checkpoint {candidate} was removed while it was read"
                    )
                    return self._find(step, like, more)  # there are newer ones by now
                corrupt[candidate] = error
                continue
            for bad, reason in corrupt.items():
                self._quarantine(bad, str(reason), instead=candidate)
            return candidate, items, metadata["run"]
        if not corrupt:
            return None
        reasons = "; ".join(f"{bad} is damaged ({why})" for bad, why in corrupt.items())
        others = [other for other in self.steps() if other not in corrupt]
        remedy = "Bring the files back, or start over in another directory"
        if others:
            remedy = f"Other steps that exist: {others}"
        raise ValueError(
            f"no good checkpoint in {directory}: {reasons}. {remedy}."
        ) from next(iter(corrupt.values()))

    def _load(
        self, step: int, like: dict[str, PyTree] | None, more: _More | None
    ) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """The verified items and metadata; raises CorruptCheckpointError."""
        path = self._folders.path(step)
        metadata = _read_together(self._folders, step, {"meta": None})["meta"]
        check_metadata(metadata, name=str(path))
        if like is None:
            targets = {"params": host_targets(metadata)}
        else:
            check_fits(metadata, like, name=str(path))
            if more is not None:
                like = like | more(listed_arrays(metadata))
            targets = restore_targets(like)
        items = _read_together(self._folders, step, targets)
        if like is not None:
            # NumPy arrays become uncommitted JAX arrays, which can join any mesh.
            items = jax.tree.map(jnp.asarray, items)
        check_checksums(metadata, items)
        return items, metadata

    def _read_metadata(self, step: int) -> dict[str, Any]:
        """The metadata alone, read by this process without the others."""
        # Not with Orbax. It numbers its barriers by counting calls, so a process that
        # reads more often than the others would wait for them at another number.
        read = functools.partial(self._folders.read_json, step, "meta/data.json")
        metadata = with_retries(read)
        check_metadata(metadata, name=str(self._folders.path(step)))
        return metadata

    def _quarantine(self, step: int, reason: str, *, instead: int) -> None:
        fate = "it stays where it is"
        if not self._read_only:
            name = f"{step}.damaged"
            if jax.process_index() == 0:
                name = self._folders.quarantine(step)
            _barrier(f"checkpoint {step} is quarantined")
            fate = f"it was renamed to {name}"
        self._report(
            f"checkpoint {step} is damaged ({reason}); {fate}, step {instead} is used"
        )


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _folders_in(directory: Path | str) -> StepFolders | BucketFolders:
    if str(directory).startswith("gs://"):
        return BucketFolders(str(directory))
    return StepFolders(Path(directory).absolute())


def _read_together(
    folders: StepFolders | BucketFolders, step: int, targets: dict[str, Any]
) -> dict[str, Any]:
    """The items, read on all processes; if one finds corruption, all raise it."""
    items, corruption = None, None
    with Agreement().phase(f"reading {folders.path(step)}"):
        try:
            items = with_retries(lambda: _orbax.read(folders, step, targets))
        except CorruptCheckpointError as error:
            corruption = error
    failed = mesh.gather_rows(np.array([corruption is not None]))
    if items is None or failed.any():
        raise corruption or CorruptCheckpointError(
            f"process {failed.argmax()} cannot read it"
        )
    return items
