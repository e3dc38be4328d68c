"""A persistent process that calls reward functions, so that the run survives them.

The process is spawned, never forked (the parent is multithreaded). It runs on the CPU
with bounded memory, and is killed and replaced when it hangs. This contains hangs,
crashes and memory blow-ups. It is no security boundary against hostile code.
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
from typing import Any

from grpo_jax.rewards._convention import Failure, Outcome, RewardCall, RewardInputs

# Address space of the worker; an allocation beyond it raises MemoryError there.
_MEMORY_LIMIT_BYTES = 4 * 2**30
# Time in which a new process must import the reward functions' modules.
_START_SECONDS = 120.0


class Worker:
    """Calls reward functions in a separate process.

    Construction starts the process and raises `ValueError` if it cannot import the
    functions by name: a lambda or an inner function is refused.
    """

    def __init__(self, calls: tuple[RewardCall, ...]) -> None:
        for call in calls:
            try:
                pickle.dumps(call)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"reward function {call.name!r} cannot be isolated: {error}. "
                    "Define it at the top level of a module, or set rewards.isolate to "
                    "False."
                ) from error
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
        # The child must not take the accelerator. It inherits the environment, and may
        # import JAX with the user's script, before any code of ours could set this.
        platforms = os.environ.get("JAX_PLATFORMS")
        os.environ["JAX_PLATFORMS"] = "cpu"
        try:
            self._process.start()
        finally:
            del os.environ["JAX_PLATFORMS"]
            if platforms is not None:
                os.environ["JAX_PLATFORMS"] = platforms
        # Only the child has this end open from now on, so that its death ends the pipe.
        theirs.close()
        problem = self._receive(_START_SECONDS)
        if problem is not None:
            self.stop()
            raise ValueError(
                "the reward worker could not start. Reward functions to isolate must "
                "be importable by name, and a script that defines them must start its "
                f"run under `if __name__ == '__main__':`. {problem.details}"
            )

    def run_all(
        self, inputs: RewardInputs, *, timeout: float | None
    ) -> list[Outcome | Failure]:
        """The answer of each function, called one after another."""
        return [self.run(i, inputs, timeout=timeout) for i in range(self._count)]

    def run(
        self, index: int, inputs: RewardInputs, *, timeout: float | None
    ) -> Outcome | Failure:
        """The answer of function number `index`, in `timeout` seconds.

        A process that hung or died is replaced by the next call; its start does not
        count against the time.
        """
        self.start()
        try:
            self._connection.send((index, inputs))
        except OSError:  # it died since the last call
            return self._died()
        return self._receive(timeout)

    def stop(self) -> None:
        """Kills the process; `start` makes another."""
        # Taken first: a run that fails may end the process while a thread waits for it.
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.join()
            process.close()
            self._connection.close()

    def _receive(self, timeout: float | None) -> Any:
        """The next message of the process, or a failure if none comes."""
        try:
            if self._connection.poll(timeout):
                return self._connection.recv()
        except (EOFError, OSError):
            return self._died()
        except BaseException:
            self.stop()  # else the next call would read this late answer
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


def _serve(connection: Any, pickled: bytes) -> None:
    """The worker's main: answers (index, inputs) with an Outcome or a Failure."""
    # Ctrl-C reaches every process of the terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    unlimited = hard == resource.RLIM_INFINITY
    limit = _MEMORY_LIMIT_BYTES if unlimited else min(_MEMORY_LIMIT_BYTES, hard)
    # Not every system can limit the address space; there the worker has no limit.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        calls: tuple[RewardCall, ...] = pickle.loads(pickled)
    except Exception as error:
        details = f"{type(error).__name__}: {error}"
        connection.send(Failure(kind="error", cause="import", details=details))
        return
    connection.send(None)
    with asyncio.Runner() as loop:
        while True:
            try:
                index, inputs = connection.recv()
            except EOFError:
                return
            call = calls[index]
            answer = (
                loop.run(call.run_async(inputs)) if call.is_async else call.run(inputs)
            )
            if isinstance(answer, Failure):
                crash = isinstance(answer.exception, MemoryError)
                kind = "crash" if crash else answer.kind
                # An exception may hold values that cannot be pickled. Its traceback is
                # in the details.
                answer = dataclasses.replace(answer, kind=kind, exception=None)
            try:
                connection.send(answer)
            except Exception as error:  # the function logged values that do not pickle
                details = f"{call.name}: cannot send what it logged: {error}"
                connection.send(Failure(kind="invalid", cause="value", details=details))


def _exit_with_parent() -> None:
    """Ends this process when its parent is gone, even in the middle of a function."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
