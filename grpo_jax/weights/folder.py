"""A folder that appears whole or not at all."""

import contextlib
import fcntl
import fnmatch
import glob
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from grpo_jax.config.files import fsync

# What an export consists of; a folder that holds anything else is not replaced.
_OURS = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)
# Ends the names of folders that are being written.
_UNFINISHED = ".grpo-jax-unfinished"


@contextlib.contextmanager
def replaced_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder to write into, moved to `folder` when the block ends well.

    An export that is there already is replaced; an exception leaves it as it was.

    Raises:
        ValueError: `folder` is a file, or holds files that no export has.
    """
    folder = folder.resolve()
    _check_replaceable(folder)
    scratch = _make_scratch(folder)
    try:
        with _locked(scratch, needed=False):
            written = scratch / "new"
            written.mkdir()
            yield written
            for path in filter(pathlib.Path.is_file, written.rglob("*")):
                fsync(path)
            _swap(folder, written, old=scratch / "old")
    finally:
        shutil.rmtree(scratch)


def remove_unfinished(parent: pathlib.Path, name: str = "*") -> None:
    """Removes what `replaced_folder` left when it was killed, as far as possible.

    What another process is still writing stays. Where the kill fell between the two
    renames of a replacement, the new folder takes its place.

    Args:
        parent: where the folders stand.
        name: of the folder that was to be replaced; any by default.
    """
    for scratch in parent.glob(f".{name}-*{_UNFINISHED}"):
        target = scratch.name[1 : -len(_UNFINISHED)].rpartition("-")[0]
        # Without the lock another process may be writing it.
        with contextlib.suppress(OSError), _locked(scratch):
            if (scratch / "old").exists() and not (parent / target).exists():
                (scratch / "new").rename(parent / target)
            shutil.rmtree(scratch)


def _make_scratch(folder: pathlib.Path) -> pathlib.Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder.parent, glob.escape(folder.name))
        # Beside its place, because a rename is atomic within one file system only.
        made = tempfile.mkdtemp(_UNFINISHED, f".{folder.name}-", folder.parent)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}); give another folder to "
            "export into"
        ) from error
    return pathlib.Path(made)


@contextlib.contextmanager
def _locked(folder: pathlib.Path, *, needed: bool = True) -> Iterator[None]:
    """Holds a lock on a folder, which ends with the process.

    Raises OSError if it is held, or, where it is `needed`, if there are no locks.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.nullcontext() if needed else contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)


def _swap(folder: pathlib.Path, new: pathlib.Path, *, old: pathlib.Path) -> None:
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


def _check_replaceable(folder: pathlib.Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to export into")
    foreign = sorted(
        path.name
        for path in folder.iterdir()
        if not any(fnmatch.fnmatch(path.name, kind) for kind in _OURS)
    )
    if foreign:
        raise ValueError(
            f"{folder} holds files that are not of an earlier export ({foreign}) and "
            "would be lost; choose an empty or new folder"
        )
