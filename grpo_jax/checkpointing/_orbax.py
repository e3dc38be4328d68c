"""Orbax's part of a checkpoint: it writes and reads the files of one.

Orbax makes all processes meet at barriers while it saves, and a process that failed
comes to none of them. What the others still do of that save goes on in the background:
a part that waits does so for up to 20 minutes, a part that is late still writes files.
"""

import contextlib
import functools
import gc
import itertools
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator

from grpo_jax.checkpointing._bucket_folders import BucketFolders
from grpo_jax.checkpointing._corruption import (
    READ_ERRORS,
    CorruptCheckpointError,
    corruption_of,
)
from grpo_jax.checkpointing.retention import StepFolders
from grpo_jax.parallel import mesh
from grpo_jax.parallel.processes import leave_processes

# Items of a run that continues completions in the next step: what the host and what
# the devices hold of them.
_CARRIED = ("carried", "carried_cache")

_numbers = itertools.count()


def start_save(
    folders: StepFolders | BucketFolders, step: int, content: Mapping[str, Any]
) -> Future[None]:
    """Starts to write a checkpoint; the future ends as soon as this process's part has.

    On return the arrays have left the devices. All processes must call this at the same
    point.

    Raises:
      OSError: if nothing could be started here; the others learn of it in the
        background.
    """
    number = _agreed_number()
    path = str(folders.unfinished(step, number))
    if jax.process_count() > 1:
        _leave_at_exit()
    with _handlers():
        response = ocp.save_checkpointables_async(path, dict(content))
    ended: Future[None] = Future()
    complete = functools.partial(folders.complete, step, number)
    threading.Thread(
        target=_follow, args=(response, complete, ended), daemon=True
    ).start()
    return ended


def read(
    folders: StepFolders | BucketFolders, step: int, targets: dict[str, Any]
) -> dict[str, PyTree]:
    """The items of a step, read by this process without the others.

    Raises:
      CorruptCheckpointError: if its files have changed or are missing.
    """
    for name in targets:
        if not folders.has(step, name):
            raise CorruptCheckpointError(f"folder {name} is missing")
    # A failed read of Orbax leaves coroutines that were never awaited. They are
    # collected here, where Python's warning about them is ignored.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            # Alone: a process that cannot read its part must not keep others waiting.
            with _handlers(alone=jax.process_count() > 1):
                return ocp.load_checkpointables(str(folders.path(step)), targets)
        except READ_ERRORS as error:
            corruption = corruption_of(error)
            if corruption is None:
                raise
        gc.collect()
    raise corruption


def collect_leftovers() -> None:
    """Frees what a failed save left behind.

    Python would warn at any time of its coroutines, which were never awaited.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        gc.collect()


def _agreed_number() -> int:
    """A number that no save had before, the same on all processes.

    Orbax names its barriers by the number of operations that a process has begun. One
    that had to repeat a read would meet the others at none of them.
    """
    begun = int(OperationIdGenerator.get_current_operation_id())
    known = mesh.gather_rows(np.array([[next(_numbers), begun]]))
    number, furthest = known.max(axis=0)
    for _ in range(furthest - begun):
        OperationIdGenerator.next_operation_id()
    return int(number)


@functools.cache
def _leave_at_exit() -> None:
    """Has Python leave the other processes at its end, however it comes to it.

    It joins threads there, also those that wait for a process that has failed.
    """
    # `atexit` is too late: its functions are called when the threads have been joined.
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(leave_processes)


def _follow(
    response: ocp.AsyncResponse[None],
    complete: Callable[[], None],
    ended: Future[None],
) -> None:
    """Ends the future with the save, which process 0 then completes."""
    try:
        if jax.process_count() > 1:
            # The response itself ends after all of its parts, of which one may still
            # wait for a process that has failed.
            response._thread_runner._future.result()  # type: ignore[attr-defined]
        response.result()
        if jax.process_index() == 0:
            complete()
    except BaseException as error:
        ended.set_exception(error)
        with contextlib.suppress(BaseException):
            response.result()
    else:
        ended.set_result(None)


def _handlers(*, alone: bool = False) -> ocp.Context:
    """How Orbax writes and reads each folder, whatever its own metadata says.

    Args:
      alone: do not wait for other processes.
    """
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.PyTreeHandler, checkpointable_name="params")
    registry.add(ocp.handlers.PyTreeHandler, checkpointable_name="optimizer")
    for name in _CARRIED:
        registry.add(ocp.handlers.PyTreeHandler, checkpointable_name=name)
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
    context = ocp.Context()
    context.checkpointables_options.registry = registry
    # Compression saves 8 % of float32 weights and doubles the processor time of a save.
    context.array_options.saving.use_compression = False
    # Names of saves are new, so no barrier has to stand around a look for old files.
    context.file_options.skip_sync_file_validations = True
    if alone:
        process = jax.process_index()
        context.multiprocessing_options.primary_host = process
        context.multiprocessing_options.active_processes = {process}
        context.multiprocessing_options.barrier_sync_key_prefix = f"alone-{process}"
    return context
