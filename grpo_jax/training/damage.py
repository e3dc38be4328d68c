"""Which errors are held against the files of a checkpoint.

Bytes that were changed make readers fail in ways that nobody lists. So whatever reading
raises counts as damage, unless it tells of the machine: memory, permission, a storage
that is away. What could blame good files is excluded otherwise: the inventory and the
targets are checked before anything is read, and a step is set aside only once an older
one was read in the same way, so a bug costs none.
"""

import errno
import traceback

# What readers raise when bytes make no sense to them. TensorStore: ValueError.
READ_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
)
# Of these, what a missing or broken file does.
_BROKEN = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# The rest of TensorStore's errors, by the code that they begin with.
_OF_THE_MACHINE = (
    "ABORTED",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
)


class DamageError(Exception):
    """A checkpoint whose files do not hold what was written; the text says why."""


def damage_of(error: BaseException) -> DamageError | None:
    """The damage that an error in reading tells of; None if files are not to blame.

    It carries the traceback as a note and not as its cause, whose frames would keep
    alive what the reader has open.
    """
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause)
    blamed = isinstance(cause, READ_ERRORS)
    if isinstance(cause, OSError):
        blamed = isinstance(cause, _BROKEN) or cause.errno == errno.EIO
    if not blamed or text.startswith(_OF_THE_MACHINE):
        return None
    damage = DamageError(f"{type(cause).__name__}: {text[:200]}")
    damage.add_note("".join(traceback.format_exception(error)))
    return damage


def no_good_one(damaged: dict[int, DamageError], others: list[int]) -> str:
    """What is wrong with each damaged step and what to do; `others` were not tried."""
    reasons = "; ".join(f"{step} is damaged ({why})" for step, why in damaged.items())
    remedy = "Bring the files back, or start over in another directory"
    if others:
        remedy = f"Steps that exist besides: {others}"
    return f"{reasons}. {remedy}."
