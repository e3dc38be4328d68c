"""What a checkpoint holds, as JSON beside its arrays: written, read, compared.

The inventory names each array with shape, dtype and digest, carries what the run wants
to remember, and is sealed by a checksum of its own.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from grpo_jax.checkpointing.checksum import array_digests
from grpo_jax.checkpointing.corruption import DamageError
from grpo_jax.config.files import to_jsonable
from grpo_jax.parallel.mesh import named_leaves

SCHEMA = 1
_SHOWN = 8  # differences that an error message lists


def make_inventory(
    items: Mapping[str, PyTree],
    run: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
) -> dict:
    """The inventory of `items`, with the run's own JSON values under ``run``.

    Returns:
      ``schema`` (1), ``run``, ``metrics`` (numbers by name, null for those that are not
      finite), ``arrays`` (path -> ``shape``, ``dtype``, ``digest``) and ``sha256`` of
      all these as sorted JSON. Waits until the arrays are computed.
    """
    leaves = named_leaves(items)
    digests = np.asarray(array_digests(list(leaves.values()))).tolist()
    content = {
        "schema": SCHEMA,
        "run": dict(run),
        "metrics": to_jsonable(metrics or {}),
        "arrays": {
            path: {
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "digest": digest,
            }
            for (path, leaf), digest in zip(leaves.items(), digests, strict=True)
        },
    }
    # Through text and back: the checksum is of what a reader will see.
    content = json.loads(json.dumps(content))
    return content | {"sha256": checksum(content)}


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of the JSON of all but the checksum itself."""
    plain = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def check_inventory(inventory: Any, *, name: str) -> None:
    """Raises unless the inventory is whole and of a schema that is known here.

    Raises:
      ValueError: if a newer version of the package wrote it.
      DamageError: if it is not what was written.
    """
    if not isinstance(inventory, dict) or not isinstance(inventory.get("schema"), int):
        raise DamageError("its inventory is not one")
    # Whatever its schema, it is sealed like this: a changed number is damage.
    if inventory.get("sha256") != checksum(inventory):
        raise DamageError("its inventory does not match its checksum")
    if inventory["schema"] > SCHEMA:
        raise ValueError(
            f"checkpoint {name} has schema {inventory['schema']}, this version of "
            f"grpo_jax reads schema {SCHEMA}; use the version that wrote it, or newer."
        )


def check_fits(inventory: Mapping[str, Any], like: PyTree, *, name: str) -> None:
    """Raises unless the arrays on disk are those of `like`: same paths, shapes, dtypes.

    Only the top-level entries that `like` has are compared.

    Raises:
      ValueError: naming each array that differs.
    """
    there = {
        path: f"{array['dtype']} {tuple(array['shape'])}"
        for path, array in inventory["arrays"].items()
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
        more = len(differences) - _SHOWN
        shown = differences[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(
            f"checkpoint {name} does not fit this model and optimizer:\n  "
            + "\n  ".join(shown)
            + "\nUse the configuration that it was saved with, or another directory."
        )


def check_digests(inventory: Mapping[str, Any], items: PyTree) -> None:
    """Raises unless every array of `items` has the digest that it was saved with.

    Raises:
      DamageError: naming the arrays that differ.
    """
    leaves = named_leaves(items)
    if all(isinstance(leaf, jax.Array) for leaf in leaves.values()):
        digests = np.asarray(array_digests(list(leaves.values()))).tolist()
    else:
        # Host arrays visit the device one by one: together they may not fit.
        digests = [int(array_digests([leaf])[0]) for leaf in leaves.values()]
    changed = [
        path
        for path, digest in zip(leaves, digests, strict=True)
        if inventory["arrays"][path]["digest"] != digest
    ]
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise DamageError(f"changed values in {', '.join(changed[:_SHOWN])}{more}")
