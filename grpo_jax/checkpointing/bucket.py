"""A run directory in a bucket: ``gs://bucket/folder``.

An object is written whole or not at all, and cannot be appended to. Therefore a run
keeps its small files in a local folder and sends those that have changed: before each
checkpoint, every half minute, and at its end. Checkpoints are written to the bucket
only.
"""

import atexit
import contextlib
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from grpo_jax.checkpointing._bucket_folders import BucketFolders
from grpo_jax.checkpointing._bucket_lock import LOCK, BucketLock, every
from grpo_jax.checkpointing._corruption import with_retries
from grpo_jax.checkpointing._gcs import Objects

_INTERVAL = 30.0  # seconds between two looks for changed files
_CHECKPOINTS = "checkpoints"
# What a local copy has: the files on top, and, on request, those of this folder.
_COMPLETIONS = "completions"


def bucket_address(run_dir: str | Path | None) -> str | None:
    """A run directory as ``gs://bucket/folder``; None if it is a local one.

    `pathlib.Path` writes the two slashes as one.

    Raises:
      ValueError: for parts "", "." or "..", which would lead out of the folder.
    """
    found = re.fullmatch(r"gs:/{1,2}([^/].*?)/*", str(run_dir))
    if found is None:
        return None
    if not {"", ".", ".."}.isdisjoint(found[1].split("/")):
        raise ValueError(
            f"run_dir {run_dir}: no part of an address may be empty, '.' or '..'; "
            "write gs://BUCKET/FOLDER."
        )
    return f"gs://{found[1]}"


def local_copy(run_dir: str | Path, *, completions: bool = False) -> Path:
    """A run directory on this machine: itself, or the small files of one in a bucket.

    A copy has an empty folder for each checkpoint, and is removed when Python ends.

    Args:
      completions: copy them as well.

    Raises:
      ValueError: if the bucket holds no run there, or cannot be read.
    """
    address = bucket_address(run_dir)
    if address is None:
        return Path(run_dir)
    made = tempfile.mkdtemp(prefix="grpo-jax-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    folder = Path(made) / address.removeprefix("gs://")
    folder.mkdir(parents=True)
    objects = Objects(address)
    try:
        _fetch(objects, folder, completions=completions)
    except OSError as error:
        raise ValueError(_unreadable(address, error)) from error
    if not any(folder.iterdir()):
        raise ValueError(f"{address} holds no run: there are no files in it.")
    return folder


@contextlib.contextmanager
def mirrored(address: str, folder: Path) -> Iterator[Callable[[], None]]:
    """Within it, a local folder and a bucket hold the same run, under a lock.

    First what the bucket holds is copied to the folder, which must be empty. When the
    block ends the files are sent once more, and the folder is removed.

    Yields:
      A function that sends the files that have changed.

    Raises:
      ValueError: if another run uses the address, or the bucket cannot be used.
      OSError: at the end, if files could not be sent. They stay in the folder.
    """
    try:
        objects = Objects(address)
        lock = BucketLock(objects)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(_unreadable(address, error)) from error
        raise
    try:
        with lock.kept():
            _fetch(objects, folder, completions=True)
            mirror = _Mirror(objects, folder, lock)
            try:
                with every(_INTERVAL, mirror.send):
                    yield mirror.send
            finally:
                mirror.send_last()
    finally:
        lock.release()


class _Mirror:
    """Sends what changes in a folder to a bucket."""

    def __init__(self, objects: Objects, folder: Path, lock: BucketLock) -> None:
        self._objects, self._folder, self._lock = objects, folder, lock
        self._sent = self._files()
        self._sending = threading.Lock()

    def send(self) -> None:
        """Sends the files that have changed since, and removes those that are gone.

        Raises:
          OSError: if the storage fails; the next call tries again.
          LostLockError: if another machine writes there now.
        """
        self._lock.renew()
        with self._sending:
            files = self._files()
            for name, state in files.items():
                if state != self._sent.get(name):
                    # One that was removed meanwhile is removed by the next call.
                    with contextlib.suppress(FileNotFoundError):
                        self._lock.check()
                        self._objects.upload(self._folder / name, name)
                        self._sent[name] = state
            for name in self._sent.keys() - files.keys():
                self._lock.check()
                self._objects.remove(name)
                del self._sent[name]

    def send_last(self) -> None:
        """Sends what is left, and removes the folder."""
        try:
            with_retries(self.send)
        except OSError as error:
            error.add_note(f"The files that could not be sent are in {self._folder}")
            raise
        shutil.rmtree(self._folder, ignore_errors=True)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Time and size of each file, by its name."""
        found = {}
        for path in self._folder.rglob("*"):
            name = path.relative_to(self._folder)
            hidden = any(part.startswith(".") for part in name.parts)
            if hidden or path.suffix == ".tmp" or path.name == LOCK:
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    state = path.stat()
                    found[name.as_posix()] = state.st_mtime_ns, state.st_size
        return found


def _fetch(objects: Objects, folder: Path, *, completions: bool) -> None:
    """Copies the small files, and makes an empty folder for each checkpoint."""
    names = [name for name in objects.files() if name != LOCK]
    if completions:
        names += [f"{_COMPLETIONS}/{name}" for name in objects.files(_COMPLETIONS)]
    for name, content in objects.read_all(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    steps = BucketFolders(f"{objects.address}/{_CHECKPOINTS}").steps()
    for step in steps:
        (folder / _CHECKPOINTS / str(step)).mkdir(parents=True)


def _unreadable(address: str, error: OSError) -> str:
    bucket = address.removeprefix("gs://").partition("/")[0]
    if isinstance(error, FileNotFoundError):
        return (
            f"there is no bucket {bucket!r}, which {address} names; create it (gcloud "
            "storage buckets create), or correct the name."
        )
    why = " ".join(str(error).split())
    return (
        f"{address} cannot be used: {why:.300}. Log in (gcloud auth "
        "application-default login), or give the service account of this machine the "
        f"role storage.objectAdmin on the bucket {bucket!r}."
    )
