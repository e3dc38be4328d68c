"""Which errors mean that a checkpoint's files are damaged.

A step is given up only for damage: any other error must stop the run, or a bug would
cost every checkpoint.
"""

import errno
import json

# What storage and decoders say of bytes that are missing or make no sense.
_BROKEN = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    json.JSONDecodeError,
    UnicodeDecodeError,
    KeyError,  # of Orbax's description of the tree
)
# TensorStore says it in a ValueError; other beginnings tell of permission or memory.
_LOST_BYTES = (
    "DATA_LOSS:",
    "NOT_FOUND:",
    "OUT_OF_RANGE:",
    "FAILED_PRECONDITION:",
    "INVALID_ARGUMENT:",
    "Error opening",
    "Error reading",
)
# Orbax: its description of the tree contradicts the inventory, which was checked.
_CONTRADICTIONS = ("tree structures do not match", "with the stored shape")


class DamageError(Exception):
    """A checkpoint whose files do not hold what was written; the text says why."""


def damage_of(error: BaseException) -> str | None:
    """Why files are to blame for an error that reading them raised; None if not.

    A wrong configuration, lack of memory or of permission, and bugs are not damage.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    broken = isinstance(error, _BROKEN)
    if isinstance(error, OSError):
        broken |= error.errno == errno.EIO
    if isinstance(error, ValueError):
        broken |= text.startswith(_LOST_BYTES)
        broken |= any(words in text for words in _CONTRADICTIONS)
    return f"{type(error).__name__}: {text[:200]}" if broken else None


def no_good_one(damaged: dict[int, str], others: list[int]) -> str:
    """What is wrong with each damaged step and what to do; `others` were not tried."""
    reasons = "; ".join(f"{step} is damaged ({why})" for step, why in damaged.items())
    remedy = "Bring the files back, or start over in another directory"
    if others:
        remedy = f"Steps that exist besides: {others}"
    return f"{reasons}. {remedy}."
