"""The metadata of a checkpoint, as JSON beside its arrays: written, read, compared.

It lists each array with shape, dtype and checksum, and carries the run's own values. A
checksum of its own protects it.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from grpo_jax.checkpointing._corruption import CorruptCheckpointError
from grpo_jax.checkpointing.checksum import array_checksums
from grpo_jax.config.files import to_jsonable
from grpo_jax.parallel.mesh import named_leaves

_SCHEMA = 1
_SHOWN = 8  # differences that an error message lists


def make_metadata(
    items: Mapping[str, PyTree],
    run: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
) -> dict:
    """The metadata of `items`, with the run's own JSON values under ``run``.

    Returns:
      ``schema`` (1), ``run``, ``metrics`` (numbers by name, null for those that are not
      finite), ``arrays`` (path -> ``shape``, ``dtype``, ``digest``) and ``sha256`` of
      all these as sorted JSON. Waits until the arrays are computed.
    """
    leaves = named_leaves(items)
    checksums = np.asarray(array_checksums(list(leaves.values()))).tolist()
    content = {
        "schema": _SCHEMA,
        "run": dict(run),
        "metrics": to_jsonable(metrics or {}),
        "arrays": {
            path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": value}
            for (path, leaf), value in zip(leaves.items(), checksums, strict=True)
        },
    }
    # To text and back, so that the checksum is that of the values a reader will see.
    content = json.loads(json.dumps(content))
    return content | {"sha256": metadata_sha256(content)}


def metadata_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of the sorted JSON of all entries but ``sha256``."""
    others = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def check_metadata(metadata: Any, *, name: str) -> None:
    """Raises unless the metadata is intact and its schema is known.

    Raises:
      ValueError: if a newer version of the package wrote it.
      CorruptCheckpointError: if it has changed since it was written.
    """
    if not isinstance(metadata, dict) or not isinstance(metadata.get("schema"), int):
        raise CorruptCheckpointError("its metadata cannot be read")
    # First the checksum, which every schema has: a changed schema is corruption.
    if metadata.get("sha256") != metadata_sha256(metadata):
        raise CorruptCheckpointError("its metadata does not match its checksum")
    if metadata["schema"] > _SCHEMA:
        raise ValueError(
            f"checkpoint {name} has schema {metadata['schema']}, this version of "
            f"grpo_jax reads schema {_SCHEMA}; use the version that wrote it, or newer."
        )


def check_fits(metadata: Mapping[str, Any], like: PyTree, *, name: str) -> None:
    """Raises unless the arrays on disk are those of `like`: same paths, shapes, dtypes.

    Only the top-level entries that `like` has are compared.

    Raises:
      ValueError: naming each array that differs.
    """
    there = {
        path: f"{array['dtype']} {tuple(array['shape'])}"
        for path, array in metadata["arrays"].items()
        if path.split("/")[0] in like
    }
    here = {
        path: f"{leaf.dtype} {tuple(leaf.shape)}"
        for path, leaf in named_leaves(like).items()
    }
    differences = [
        f"{path}: {there.get(path, 'absent')} in the checkpoint, "
        f"{here.get(path, 'absent')} here"
        for path in sorted(there.keys() | here.keys())
        if there.get(path) != here.get(path)
    ]
    if differences:
        raise ValueError(
            f"checkpoint {name} does not fit this model and optimizer:\n  "
            + "\n  ".join(_shortened(differences))
            + "\nUse the configuration that it was saved with, or another directory."
        )


def check_checksums(metadata: Mapping[str, Any], items: PyTree) -> None:
    """Raises unless every array of `items` has the checksum that it was saved with.

    Raises:
      CorruptCheckpointError: naming the arrays that differ.
    """
    leaves = named_leaves(items)
    if all(isinstance(leaf, jax.Array) for leaf in leaves.values()):
        checksums = np.asarray(array_checksums(list(leaves.values()))).tolist()
    else:
        # Host arrays visit the device one by one: together they may not fit.
        checksums = [int(array_checksums([leaf])[0]) for leaf in leaves.values()]
    changed = [
        path
        for path, checksum in zip(leaves, checksums, strict=True)
        if metadata["arrays"][path]["digest"] != checksum
    ]
    if changed:
        shown = ", ".join(_shortened(changed))
        raise CorruptCheckpointError(f"changed values in {shown}")


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
