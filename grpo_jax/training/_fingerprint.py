"""Checksums of the data and the model that a run began with."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32

from grpo_jax.checkpointing.checksum import array_checksums
from grpo_jax.models.config import RUN_FIELDS, ModelConfig
from grpo_jax.parallel.mesh import named_leaves
from grpo_jax.rewards.source import describe_rewards
from grpo_jax.tasks.base import Row, Task


def describe_data(task: Task, held_out: Sequence[Row]) -> dict[str, Any]:
    """The rows and reward functions of a run, as far as they need no model.

    Checksums cover up to 1,000 rows, evenly chosen, or 3 if rows are made or read on
    demand. Of values that JSON does not have, only the type counts.
    """
    return {
        "task": task.name,
        "rows": len(task.train),
        "rows_sha256": _rows_sha256(task.train),
        "test_rows": len(held_out),
        "test_rows_sha256": _rows_sha256(held_out),
        "rewards": describe_rewards(task.rewards),
    }


def _rows_sha256(rows: Sequence[Row]) -> str:
    count = min(len(rows), 1000 if isinstance(rows, list | tuple) else 3)
    chosen = [dict(rows[i * len(rows) // count]) for i in range(count)]
    text = json.dumps(chosen, skipkeys=True, default=lambda value: str(type(value)))
    return hashlib.sha256(text.encode()).hexdigest()


def describe_weights(params: PyTree, *, frozen: bool) -> dict[str, str]:
    """A checksum of each initial parameter, by its path.

    They are computed on the devices from the parameters, not from the files. The frozen
    base of adapters has a dtype that depends on the machine. So its values are first
    rounded to bfloat16, which agrees on all machines. All processes must call it.
    """
    # One array at a time, so that no rounded copy of all is there.
    numbers = {
        path: int(_checksums([leaf], rounded=frozen)[0])
        for path, leaf in named_leaves(params).items()
    }
    return {path: f"{number:08x}" for path, number in numbers.items()}


def describe_architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model's configuration that are not at their defaults."""
    values = dataclasses.asdict(config)
    for field in dataclasses.fields(config):
        if field.name in RUN_FIELDS or values[field.name] == field.default:
            del values[field.name]
    return values


@functools.partial(jax.jit, static_argnames="rounded")
def _checksums(arrays: Sequence[Array], *, rounded: bool) -> UInt32[Array, " arrays"]:
    if rounded:
        arrays = [array.astype(jnp.bfloat16) for array in arrays]
    return array_checksums(arrays)
