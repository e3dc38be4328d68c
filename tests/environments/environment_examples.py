"""Tools and environments of users, importable by name in worker processes."""

import asyncio
import os
import random
import signal
import threading

import numpy as np

from grpo_jax.environments.base import Step, TextEnvironment


def at_some_limit(check, first=0.3):
    """Runs `check(limit)` with longer limits while it fails.

    What hangs is late at any limit. What is good may be late at the first, where the
    machine has other work.
    """
    for limit in (first, 10.0 * first):
        try:
            return check(limit)
        except AssertionError:
            continue
    return check(100.0 * first)


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "function": function}


def says(text="", *calls):
    """A turn of the policy."""
    message = {"role": "assistant", "content": text}
    return message | ({"tool_calls": list(calls)} if calls else {})


def results(reply):
    return [message["content"] for message in reply.messages]


def product(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: One of them.
        b: The other.

    Returns:
        Their product.
    """
    return a * b


async def later(a: int) -> int:
    """Give a number back after a pause.

    Args:
        a: The number.
    """
    await asyncio.sleep(0)
    return a


def table(rows: int) -> list[tuple]:
    """List squares.

    Args:
        rows: How many.
    """
    return [(n, n * n) for n in range(rows)]


def process_id() -> int:
    """Tell where this runs."""
    return os.getpid()


def alarmed() -> str:
    """Set a handler, which works on the main thread only."""
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, before)
    return "on the main thread"


def nested() -> int:
    """Run a coroutine, as many clients of services do."""
    return asyncio.run(later(7))


def trouble(what: str) -> str:
    """Do what is asked, all of it bad.

    Args:
        what: Which.
    """
    match what:
        case "raise":
            raise KeyError("no such thing")
        case "die":
            os._exit(3)
        case "hang":
            threading.Event().wait()
        case "leave":
            raise SystemExit("bye")
    return f"did {what}"


class Count:
    """The target is the environment's own choice, from the global generators."""

    def reset(self, **row) -> str | None:
        self.count = 0
        self.target = random.randint(1, 1000) + int(np.random.randint(1000))
        return f" Count to {self.target}."

    def add(self, step: int) -> int:
        """Add to the count.

        Args:
            step: How much.
        """
        self.count += step
        return self.count

    def get_reward(self) -> float:
        return float(self.count == self.target)


class Door:
    """Opens for the word in the row; reads its columns, and has no reward."""

    def reset(self, *, word, **row):
        self.word = word
        self.is_open = False

    async def say(self, word: str) -> str:
        """Say a word to the door.

        Args:
            word: The word.
        """
        await asyncio.sleep(0)
        self.is_open = word == self.word
        return "open" if self.is_open else "shut"

    def trouble(self, what: str) -> str:
        """Do what is asked, all of it bad.

        Args:
            what: Which.
        """
        return trouble(what)

    async def dream(self) -> str:
        """Wait for ever."""
        await asyncio.Event().wait()
        return ""

    @property
    def seen(self):
        raise AssertionError("a property was evaluated")


class Echo(TextEnvironment):
    """Says things back; some of them have effects."""

    opened = 0
    closed = 0

    def reset(self, *, seed, **row):
        if row.get("broken"):
            trouble(row["broken"])
        self.turns = 0
        self.draws = random.Random(seed)
        return f" seed {seed}"

    def step(self, text):
        self.turns += 1
        match text:
            case "raise" | "die" | "hang" | "leave":
                trouble(text)
            case "bad reward":
                return Step("more", float("nan"))
            case "bad type":
                return "more"
            case "bad message":
                return Step([{"role": "user"}], 1.0)
            case "process":
                return Step(str(os.getpid()), 0.0)
            case "unseeded":
                return Step(str(random.SystemRandom().random()), 0.0)
            case "messages":
                return Step([{"role": "tool", "name": "t", "content": "c"}])
            case "bye":
                return Step("never shown", 0.5, True)
        return Step(f"{text} {self.turns} {self.draws.random():.6f}", 1.0)

    def close(self):
        type(self).closed += 1


def locks() -> list:
    """Give what stays in its process."""
    return [threading.Lock()]


def stop() -> str:
    """Stop."""
    raise KeyboardInterrupt


class Doomed:
    """Its process ends while none of its code runs."""

    def reset(self, **row):
        pass

    async def wait(self) -> str:
        """Wait for ever."""
        asyncio.get_running_loop().call_later(0.01, os._exit, 3)
        await asyncio.Event().wait()
        return ""

    def get_reward(self) -> float:
        return 1.0
