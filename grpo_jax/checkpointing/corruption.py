"""Which errors are held against the files of a checkpoint.

Bytes that were changed make readers fail in ways that nobody lists. So whatever reading
raises counts as damage, unless it tells of the machine: memory, permission, a storage
that is away, or that fails for a moment, which is tried again. What could blame good
files is excluded otherwise: the inventory and the targets are checked before anything
is read, and a step is set aside only once an older one was read in the same way, so a
bug costs none.
"""

import errno
import re
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

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
# Of these, what a missing or broken file does. Any other error number is the machine's:
# a mounted bucket, a network or a disk gives EIO for files that are good.
BROKEN = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_BROKEN_NUMBERS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# What may be over in a moment.
_TRANSIENT_NUMBERS = (
    *(errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET),
    *(errno.ECONNABORTED, errno.ENOTCONN, errno.EREMOTEIO, errno.EHOSTUNREACH),
)
# TensorStore's errors begin with a code; what the system said stands at their end.
_TRANSIENT_CODES = ("ABORTED", "DEADLINE_EXCEEDED", "UNAVAILABLE")
_OF_THE_MACHINE = (
    *_TRANSIENT_CODES,
    *("CANCELLED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED"),
)
_SYSTEM_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")
# Seconds between tries.
PAUSES = (1.0, 4.0, 10.0)


class DamageError(Exception):
    """A checkpoint whose files do not hold what was written; the text says why."""


def damage_of(error: BaseException) -> DamageError | None:
    """The damage that an error in reading tells of; None if files are not to blame.

    It carries the traceback as a note and not as its cause, whose frames would keep
    alive what the reader has open.
    """
    cause, number = _cause_of(error)
    text = str(cause)
    if not isinstance(cause, READ_ERRORS) or text.startswith(_OF_THE_MACHINE):
        return None
    if isinstance(cause, OSError) or number is not None:
        if not isinstance(cause, BROKEN) and number not in _BROKEN_NUMBERS:
            return None
    damage = DamageError(f"{type(cause).__name__}: {text[:200]}")
    damage.add_note("".join(traceback.format_exception(error)))
    return damage


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns, tried again while it fails in ways that may pass."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except Exception as error:
            if pause is None and _may_pass(error):
                error.add_note(
                    f"The storage failed {len(PAUSES) + 1} times; nothing was changed. "
                    "Start again when it works; where it is broken for good, move what "
                    "cannot be read away."
                )
            if pause is None or not _may_pass(error):
                raise
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _may_pass(error: BaseException) -> bool:
    cause, number = _cause_of(error)
    if isinstance(cause, BROKEN):
        return False
    return number in _TRANSIENT_NUMBERS or str(cause).startswith(_TRANSIENT_CODES)


def _cause_of(error: BaseException) -> tuple[BaseException, int | None]:
    """The first of the errors that led to this one, and its number in the system."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError):
        return error, error.errno
    told = _SYSTEM_ERROR.search(str(error))
    return error, int(told.group(1)) if told else None


def no_good_one(damaged: dict[int, DamageError], others: list[int]) -> str:
    """What is wrong with each damaged step and what to do; `others` were not tried."""
    reasons = "; ".join(f"{step} is damaged ({why})" for step, why in damaged.items())
    remedy = "Bring the files back, or start over in another directory"
    if others:
        remedy = f"Steps that exist besides: {others}"
    return f"{reasons}. {remedy}."
