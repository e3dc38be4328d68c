"""A folder that appears whole or not at all."""

import contextlib
import fnmatch
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

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


@contextlib.contextmanager
def replaced_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder to write into, moved to `folder` when the block ends well.

    An export that is there already is replaced; an exception leaves it as it was.

    Raises:
        ValueError: `folder` is a file, or holds files that no export has.
    """
    folder = folder.resolve()
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, because a rename is atomic within one file system only.
    scratch = pathlib.Path(
        tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
    )
    try:
        written = scratch / "new"
        written.mkdir()
        yield written
        _swap(folder, written, old=scratch / "old")
    finally:
        shutil.rmtree(scratch)


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
