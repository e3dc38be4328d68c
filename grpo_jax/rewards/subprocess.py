"""A persistent process that calls reward functions, so that the run survives them.

The process is spawned, never forked (the parent is multithreaded), runs on the CPU with
a bounded memory, and is killed and replaced when it hangs. This contains hangs, crashes
and memory blow-ups; it is no security boundary against hostile code.
"""

import asyncio
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pickle
import resource
import signal
import threading
from collections.abc import Iterator
from typing import Any

from grpo_jax.rewards.convention import Batch, Failure, Outcome, RewardCall

# Address space of the worker; an allocation beyond it is a MemoryError there.
MEMORY_LIMIT_BYTES = 4 * 2**30
# Time for a new process to import the reward functions' modules.
START_SECONDS = 120.0


class Worker:
    """Calls reward functions in a process of their own.

    Construction starts the process and raises `ValueError` if the functions cannot be
    found there: they must be importable by name, so no lambda and no inner function.
    """

    def __init__(self, calls: tuple[RewardCall, ...]) -> None:
        for call in calls:
            _check_importable(call)
        self._pickled = pickle.dumps(calls)
        self._count = len(calls)
        self._process: Any = None
        self._connection: Any = None
        self.start()

    def start(self) -> None:
        """Starts the process unless it runs, and waits until it is ready."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._pickled), daemon=True
        )
        with _environment(JAX_PLATFORMS="cpu"):
            self._process.start()
        # Only the child holds its end now, so its death is seen as the end of the pipe.
        theirs.close()
        problem = self._receive(START_SECONDS)
        if problem is not None:
            self.stop()
            raise ValueError(
                "the reward worker could not start. Reward functions to isolate must "
                "be importable by name, and a script that defines them must start its "
                f"run under `if __name__ == '__main__':`. {problem.details}"
            )

    def run_all(
        self, batch: Batch, *, timeout: float | None
    ) -> list[Outcome | Failure]:
        """Returns what each function gives for the batch, one after another."""
        return [self.run(index, batch, timeout=timeout) for index in range(self._count)]

    def run(
        self, index: int, batch: Batch, *, timeout: float | None
    ) -> Outcome | Failure:
        """Returns what call number `index` gives for the batch in `timeout` seconds.

        A process that hangs or dies is replaced at the next call; its start does not
        count.
        """
        self.start()
        try:
            self._connection.send((index, batch))
        except OSError:  # it died since the last call
            return self._died()
        return self._receive(timeout)

    def stop(self) -> None:
        """Kills the process; `start` makes another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._connection.close()
            self._process = None

    def _receive(self, timeout: float | None) -> Any:
        """The next message of the process, or the failure that came instead."""
        try:
            if self._connection.poll(timeout):
                return self._connection.recv()
        except (EOFError, OSError):
            return self._died()
        except BaseException:
            self.stop()  # or the answer would be taken for that of the next call
            raise
        self.stop()
        return Failure(
            kind="timeout",
            cause="timeout",
            details=f"No answer within {timeout:.3g} s; the worker was killed.",
        )

    def _died(self) -> Failure:
        self._process.join(1.0)
        code = self._process.exitcode
        self.stop()
        return Failure(
            kind="crash", cause="crash", details=f"The worker died, exit code {code}."
        )


def _check_importable(call: RewardCall) -> None:
    try:
        pickle.dumps(call)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"reward function {call.name!r} cannot be isolated: {error}. Define it at "
            "the top level of a module, or set rewards.isolate to False."
        ) from error


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets environment variables for the processes started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Any, pickled: bytes) -> None:
    """The worker's main: answers (index, batch) with an Outcome or a Failure."""
    # Ctrl-C reaches every process of the terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _limit_memory()
    try:
        calls = pickle.loads(pickled)
    except Exception as error:
        details = f"{type(error).__name__}: {error}"
        connection.send(Failure(kind="error", cause="import", details=details))
        return
    connection.send(None)
    with asyncio.Runner() as loop:
        while True:
            try:
                index, batch = connection.recv()
            except EOFError:
                return
            answer = _answer(calls[index], batch, loop)
            try:
                connection.send(answer)
            except Exception as error:  # what the function logged cannot be sent
                details = f"{calls[index].name}: cannot send what it logged: {error}"
                connection.send(Failure(kind="invalid", cause="value", details=details))


def _answer(call: RewardCall, batch: Batch, loop: asyncio.Runner) -> Outcome | Failure:
    answer = loop.run(call.run_async(batch)) if call.is_async else call.run(batch)
    if isinstance(answer, Outcome):
        return answer
    kind = "crash" if isinstance(answer.exception, MemoryError) else answer.kind
    # Exceptions may hold anything, also what cannot be pickled; the traceback is text.
    return dataclasses.replace(answer, kind=kind, exception=None)


def _exit_with_parent() -> None:
    """Ends this process when its parent is gone, even in the middle of a function."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    # Not every system can limit the address space; there the worker goes unlimited.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
