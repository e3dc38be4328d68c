"""Keeps two machines from running in one folder of a bucket."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from grpo_jax.checkpointing._gcs import Objects

LOCK = "run.lock"
_LOG = logging.getLogger(__name__)
# A lock that its holder has not renewed for so many seconds is of a machine that is
# gone. Ages are by the clock of the storage.
_STALE = 120.0
_LOOK = 5.0
_RENEWAL = 30.0  # seconds between two renewals while other things take long


class LostLockError(Exception):
    """Another machine has taken the folder over, and writes there now."""


@contextlib.contextmanager
def every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Calls a function in the background within it, until a lock is lost.

    If the storage fails, the next call tries again.
    """
    end = threading.Event()

    def keep() -> None:
        while not end.wait(seconds):
            try:
                act()
            except LostLockError as error:
                _LOG.error("%s", error)
                return
            except OSError as error:
                _LOG.warning("the next try is in %.0f s: %s", seconds, error)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


class BucketLock:
    """An object that only one can create: the storage decides between two.

    The holder renews it. A lock that is not renewed is waited for, and then taken over.
    """

    def __init__(
        self, objects: Objects, *, wait: Callable[[float], None] = time.sleep
    ) -> None:
        """Takes the lock.

        Raises:
          ValueError: if another process holds it.
          OSError: if the bucket cannot be written.
        """
        self._objects, self._wait = objects, wait
        me = {"host": socket.gethostname(), "process": os.getpid()}
        content = json.dumps(me).encode()
        try:
            objects.write(LOCK, content, new=True)
        except FileExistsError:
            self._remove_stale()
            try:
                objects.write(LOCK, content, new=True)
            except FileExistsError:
                raise self._in_use() from None
        self._generation, _, _ = objects.state(LOCK)
        self._renewed = time.monotonic()

    def renew(self) -> None:
        """Shows that the holder lives.

        Raises:
          LostLockError: if another machine has it.
        """
        now = time.monotonic()
        try:
            self._objects.touch(LOCK, self._generation)
            self._renewed = now
        except (FileExistsError, FileNotFoundError):
            raise LostLockError(
                f"another machine has taken over {self._objects.address}, because "
                f"this one did not renew {LOCK} for {_STALE:.0f} s. This run sends "
                "nothing more, and ends at its next checkpoint."
            ) from None

    def check(self) -> None:
        """Renews a lock that was not renewed for a while; raises as `renew`.

        To be called before each write. The storage allows a change of an object about
        once a second, so it cannot be renewed each time.
        """
        if time.monotonic() - self._renewed > _RENEWAL:
            self.renew()

    def kept(self) -> AbstractContextManager[None]:
        """Renews in the background within it, for what takes long by itself."""
        return every(_RENEWAL, self.check)

    def release(self) -> None:
        """Lets others have the folder; a lock that was lost stays theirs."""
        try:
            self._objects.remove_generation(LOCK, self._generation)
        except OSError as error:
            _LOG.warning("%s was not removed: %s", LOCK, error)

    def _remove_stale(self) -> None:
        """Returns once a lock is gone, or has not been renewed for long."""
        try:
            generation, renewals, age = self._objects.state(LOCK)
            if age < _STALE:
                _LOG.info(
                    "%s was in use %.0f s ago; waiting until it is clear that its run "
                    "has ended",
                    self._objects.address,
                    age,
                )
            while age < _STALE:
                self._wait(min(_LOOK, _STALE - age))
                now = self._objects.state(LOCK)
                if now[:2] != (generation, renewals):
                    raise self._in_use()
                age = now[2]
            self._objects.remove_generation(LOCK, generation)
        except FileNotFoundError:
            pass  # its holder has ended
        except FileExistsError:
            raise self._in_use() from None

    def _in_use(self) -> ValueError:
        try:
            holder = json.loads(self._objects.read(LOCK))
            by = f" (process {holder['process']} on {holder['host']})"
        except (OSError, ValueError, KeyError, TypeError):
            by = ""
        return ValueError(
            f"run_dir {self._objects.address} is in use by another run{by}; wait or "
            "choose another."
        )
