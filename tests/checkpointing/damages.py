"""What can happen to the files of a checkpoint; `step` is its folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path


def data_file(step: Path) -> Path:
    """The largest file of the parameters: their values."""
    return largest_file(step / "params")


def largest_file(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(
        byte ^ 0xFF for byte in content[middle : middle + 64]
    )
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_text(path: Path, old: str, new: str) -> None:
    """As a flipped bit may: the file is still JSON."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


# The step cannot be used.
DAMAGES = {
    "flipped data": lambda step: flip(data_file(step)),
    "truncated data": lambda step: truncate(data_file(step)),
    "no data": lambda step: data_file(step).unlink(),
    "flipped moments": lambda step: flip(largest_file(step / "optimizer")),
    "flipped index": lambda step: flip(largest_file(step / "params" / "d")),
    "flipped index of moments": lambda step: flip(largest_file(step / "optimizer/d")),
    "truncated manifest": lambda step: truncate(step / "params" / "manifest.ocdbt"),
    "no manifest": lambda step: (step / "params" / "manifest.ocdbt").unlink(),
    "flipped manifest": lambda step: flip(step / "params" / "manifest.ocdbt"),
    "no _METADATA": lambda step: (step / "params" / "_METADATA").unlink(),
    "empty _METADATA": lambda step: (step / "params" / "_METADATA").write_bytes(b""),
    "unknown kind of key": lambda step: change_text(
        step / "params" / "_METADATA", '"key_type": 2', '"key_type": 6'
    ),
    "other kind of key": lambda step: change_text(
        step / "optimizer" / "_METADATA", '"key_type": 1', '"key_type": 2'
    ),
    "renamed key": lambda step: change_text(
        step / "params" / "_METADATA", '"key": "embed"', '"key": "emled"'
    ),
    "renamed field": lambda step: change_text(
        step / "params" / "_METADATA", '"value_metadata"', '"value_metedata"'
    ),
    "other format": lambda step: change_text(
        step / "params" / "_METADATA", '"use_zarr3"', '"use_zarr1"'
    ),
    "other type in _CHECKPOINT_METADATA": lambda step: change_text(
        step / "_CHECKPOINT_METADATA",
        '"commit_timestamp_nsecs": 1',
        '"commit_timestamp_nsecs": 1.',
    ),
    "no _CHECKPOINT_METADATA": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "truncated meta": lambda step: truncate(step / "meta" / "data.json"),
    "binary meta": lambda step: flip(step / "meta" / "data.json"),
    "meta changed": lambda step: change_json(
        step / "meta" / "data.json", lambda meta: meta["run"].update(position=31)
    ),
    "schema changed": lambda step: change_json(
        step / "meta" / "data.json", lambda meta: meta.update(schema=41)
    ),
    "shape changed": lambda step: change_json(
        step / "meta" / "data.json",
        lambda meta: next(iter(meta["arrays"].values())).update(shape=[1, 2]),
    ),
    "no meta": lambda step: (step / "meta" / "data.json").unlink(),
    "no meta folder": lambda step: shutil.rmtree(step / "meta"),
    "no params folder": lambda step: shutil.rmtree(step / "params"),
    "no optimizer folder": lambda step: shutil.rmtree(step / "optimizer"),
    "empty step": empty,
}

# These files hold no values: the step is as good as before.
HARMLESS = {
    "flipped _CHECKPOINT_METADATA": lambda step: flip(step / "_CHECKPOINT_METADATA"),
    "no _sharding": lambda step: (step / "params" / "_sharding").unlink(),
    "no array metadata": lambda step: shutil.rmtree(
        step / "params" / "array_metadatas"
    ),
    "no commit marker": lambda step: [
        path.unlink() for path in step.rglob("commit_success.txt")
    ],
}
