"""Folders of safetensors files: one `model.safetensors`, or shards with an index.

Opening a folder reads no values. `Tensor.read` reads the part that it is asked for.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from grpo_jax.config.files import write_json
from grpo_jax.weights._names import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# A shard is held in memory until it is written.
_MAX_SHARD_BYTES = 2_000_000_000

_DTYPES = ("F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class _FileTensor:
    """A tensor of an open safetensors file."""

    handle: Any
    name: str
    shape: tuple[int, ...]
    file: str

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.handle.get_slice(self.name)[index]


def open_folder(folder: pathlib.Path) -> Mapping[str, Tensor]:
    """The tensors of a folder by name, unread.

    Raises:
        ValueError: naming the file that is missing, damaged, of another format, or
            whose tensors are not those of the index or not floating point.
    """
    if (folder / SINGLE).is_file():
        return open_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
        if pickles:
            raise ValueError(
                f"{folder} has pickled weights only ({', '.join(pickles)}), which run "
                "code when they are read. Convert them once on a machine where you "
                "trust them: load them with transformers, then call "
                "save_pretrained(..., safe_serialization=True)"
            )
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")
    weight_map = _read_index(folder / INDEX)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{folder / INDEX} lists shards that are missing: {missing}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        shard = open_file(folder / file)
        listed = {name for name, place in weight_map.items() if place == file}
        if shard.keys() != listed:
            raise ValueError(
                f"{folder / file} and {folder / INDEX} disagree about these tensors: "
                f"{sorted(shard.keys() ^ listed)}"
            )
        tensors.update(shard)
    return tensors


def write_folder(
    folder: pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Writes named C-contiguous arrays: one file, or shards with an index if larger.

    Host memory holds at most one shard and the next tensor at a time.
    """
    shards: list[tuple[pathlib.Path, list[str]]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}.part"
        write_file(path, pending)
        shards.append((path, list(pending)))
        pending.clear()

    for name, values in tensors:
        held = sum(array.nbytes for array in pending.values())
        if pending and held + values.nbytes > max_shard_bytes:
            flush()
        pending[name] = values
        total += values.nbytes
    flush()
    # A name has the number of shards, which is known only now.
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE)
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def write_file(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes named C-contiguous arrays into one file."""
    # transformers refuses files that do not say which framework wrote them.
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    # save_file makes files that only the owner can read. Take the folder's permissions.
    path.chmod(path.parent.stat().st_mode & 0o666)


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one file by name, unread.

    Raises:
        ValueError: naming the file that is damaged or holds tensors of another format.
    """
    try:
        handle = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); download or copy it "
            "again"
        ) from error
    tensors: dict[str, Tensor] = {}
    for name in handle.keys():
        part = handle.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{name} in {path} is stored as {part.get_dtype()}; supported are "
                f"{', '.join(_DTYPES)}. Use a checkpoint that is not quantized"
            )
        tensors[name] = _FileTensor(handle, name, tuple(part.get_shape()), str(path))
    return tensors


def _read_index(path: pathlib.Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not an index of shards: it must be JSON with a weight_map of "
            "tensor names to files"
        ) from error
    outside = [file for file in files.values() if pathlib.PurePath(file).name != file]
    if outside:
        raise ValueError(f"{path} points outside its folder: {sorted(set(outside))}")
    return files
