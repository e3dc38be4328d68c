"""A persistent process that calls reward functions, so that the run survives them.

It is killed and replaced when it hangs. This contains hangs, crashes and memory
blow-ups.
"""

import asyncio
import dataclasses
from typing import Any

from grpo_jax.rewards._convention import Failure, Outcome, RewardCall, RewardInputs
from grpo_jax.workers.process import (
    Process,
    packed,
    pickle_for_process,
    settle_in,
    spawn,
    unpacked,
)

# Time in which a new process must import the reward functions' modules.
_START_SECONDS = 120.0


class Worker:
    """Calls reward functions in a separate process.

    Construction starts the process and raises `ValueError` if it cannot import the
    functions by name: a lambda or an inner function is refused.
    """

    def __init__(self, calls: tuple[RewardCall, ...]) -> None:
        for call in calls:
            what = f"reward function {call.name!r}"
            pickle_for_process(call, what=what, setting="rewards.isolate")
        self._pickled = packed(calls)
        self._count = len(calls)
        self._process: Process | None = None
        self.start()

    def start(self) -> Process:
        """Starts the process unless it runs, and waits until it is ready."""
        if self._process is not None:
            return self._process
        self._process = process = spawn(_serve, self._pickled)
        problem = self._receive(process, _START_SECONDS)
        if problem is not None:
            self.stop()
            raise ValueError(
                "the reward worker could not start. Reward functions to isolate must "
                "be importable by name, and a script that defines them must start its "
                f"run under `if __name__ == '__main__':`. {problem.details}"
            )
        return process

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
        process = self.start()
        try:
            process.connection.send((index, inputs))
        except OSError:  # it died since the last call
            return self._died(process)
        return self._receive(process, timeout)

    def stop(self) -> None:
        """Kills the process; `start` makes another."""
        # Taken first: a run that fails may end the process while a thread waits for it.
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def _receive(self, process: Process, timeout: float | None) -> Any:
        """The next message of the process, or a failure if none comes."""
        try:
            if process.connection.poll(timeout):
                return process.connection.recv()
        except (EOFError, OSError):
            return self._died(process)
        except BaseException:
            self.stop()  # else the next call would read this late answer
            raise
        self.stop()
        return Failure(
            kind="timeout",
            cause="timeout",
            details=f"No answer within {timeout:.3g} s; the worker was killed.",
        )

    def _died(self, process: Process) -> Failure:
        code = process.exit_code()
        self.stop()
        return Failure(
            kind="crash", cause="crash", details=f"The worker died, exit code {code}."
        )


def _serve(connection: Any, pickled: bytes) -> None:
    """The worker's main: answers (index, inputs) with an Outcome or a Failure."""
    settle_in()
    try:
        calls: tuple[RewardCall, ...] = unpacked(pickled)
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
