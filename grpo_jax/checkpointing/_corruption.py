"""Which read errors mean that a checkpoint is corrupt, and which are the machine's.

Changed bytes make readers fail in ways that nobody can list. Therefore every error in
reading counts as corruption, except errors of the machine: memory, permission, storage
that is away. Errors that may pass are retried.

Two rules protect good files from a bug in the reader. Metadata and targets are checked
before anything is read. A step is quarantined only after an older one was read in the
same way.
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
# The OSErrors that a missing or broken file raises. Any other error number is the
# machine's: a mounted bucket, a network or a disk gives EIO for files that are good.
BROKEN = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_BROKEN_NUMBERS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# Errors that may pass.
_TRANSIENT_NUMBERS = (
    *(errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET),
    *(errno.ECONNABORTED, errno.ENOTCONN, errno.EREMOTEIO, errno.EHOSTUNREACH),
)
# TensorStore's errors begin with a code and end with the error of the system.
_TRANSIENT_CODES = ("ABORTED", "DEADLINE_EXCEEDED", "UNAVAILABLE")
_MACHINE_CODES = (
    *_TRANSIENT_CODES,
    *("CANCELLED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED"),
)
_SYSTEM_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")
# Seconds between tries.
PAUSES = (1.0, 4.0, 10.0)


class CorruptCheckpointError(Exception):
    """The files of a checkpoint have changed or are missing; the text says how."""


def corruption_of(error: BaseException) -> CorruptCheckpointError | None:
    """The corruption that a read error shows; None if the files are not to blame.

    The traceback is attached as a note. As the cause it would keep its frames alive,
    and with them the files that the reader has open.
    """
    cause, number = _root_cause(error)
    text = str(cause)
    if not isinstance(cause, READ_ERRORS) or text.startswith(_MACHINE_CODES):
        return None
    if isinstance(cause, OSError) or number is not None:
        if not isinstance(cause, BROKEN) and number not in _BROKEN_NUMBERS:
            return None
    corruption = CorruptCheckpointError(f"{type(cause).__name__}: {text[:200]}")
    corruption.add_note("".join(traceback.format_exception(error)))
    return corruption


def with_retries(read: Callable[[], T]) -> T:
    """The result of `read`, which is retried after errors that may pass."""
    for pause in PAUSES:
        try:
            return read()
        except Exception as error:
            if not _is_transient(error):
                raise
        time.sleep(pause)
    try:
        return read()
    except Exception as error:
        if _is_transient(error):
            error.add_note(
                f"The storage failed {len(PAUSES) + 1} times; nothing was changed. "
                "Start again when it works. If it stays broken, move the files that "
                "cannot be read elsewhere."
            )
        raise


def _is_transient(error: BaseException) -> bool:
    cause, number = _root_cause(error)
    if isinstance(cause, BROKEN):
        return False
    return number in _TRANSIENT_NUMBERS or str(cause).startswith(_TRANSIENT_CODES)


def _root_cause(error: BaseException) -> tuple[BaseException, int | None]:
    """The first error of the chain, and its number in the operating system."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError):
        return error, error.errno
    number = _SYSTEM_ERROR.search(str(error))
    return error, int(number.group(1)) if number else None
