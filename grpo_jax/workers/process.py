"""Spawned processes that run code of users, so that the run survives what it does.

They are spawned, never forked, since the parent is multithreaded. They keep JAX on the
CPU and have bounded memory. This is no security boundary against hostile code.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

# Address space of a process; an allocation beyond it raises MemoryError there.
_MEMORY_LIMIT_BYTES = 4 * 2**30
# One start at a time, since it changes the environment variables of this process.
_STARTING = threading.Lock()


class Process(NamedTuple):
    """A process, and this end of the pipe to it."""

    process: Any
    connection: Any

    def kill(self) -> None:
        """Ends it at once, whatever it does."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()

    def exit_code(self) -> int | None:
        """Of one that died; None if it lives."""
        self.process.join(1.0)
        return self.process.exitcode


def pickled(thing: Any, *, what: str, setting: str) -> bytes:
    """A user's object as bytes for a process.

    Args:
        what: the object, for messages.
        setting: the field of the configuration that asks for the process.

    Raises:
        ValueError: it cannot be imported by name there: a lambda or an inner function.
    """
    try:
        return pickle.dumps(thing)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{what} cannot be isolated: {error}. Define it at the top level of a "
            f"module, or set {setting} to False."
        ) from error


def spawn(main: Callable[..., None], *arguments: Any) -> Process:
    """Starts a process that runs `main(connection, *arguments)`.

    `main` begins with `settle_in`. It must be importable by name, as what it is given.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs, *arguments), daemon=True)
    with _STARTING, _jax_on_cpu():
        process.start()
    # Only the child has this end open from now on, so that its death ends the pipe.
    theirs.close()
    return Process(process, ours)


def settle_in() -> None:
    """What such a process does first: it ends with its parent, and bounds its memory."""
    # Ctrl-C reaches every process of the terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    unlimited = hard == resource.RLIM_INFINITY
    limit = _MEMORY_LIMIT_BYTES if unlimited else min(_MEMORY_LIMIT_BYTES, hard)
    # Not every system can limit the address space; there the process has no limit.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@contextlib.contextmanager
def _jax_on_cpu() -> Any:
    """Keeps children off the accelerator.

    A child inherits the environment, and may import JAX with the user's script, before
    any code of ours could set this.
    """
    platforms = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        del os.environ["JAX_PLATFORMS"]
        if platforms is not None:
            os.environ["JAX_PLATFORMS"] = platforms


def _exit_with_parent() -> None:
    """Ends this process when its parent is gone, even in the middle of a function."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
