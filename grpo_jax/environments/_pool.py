"""Environments that wait to be played again, and where they live."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from grpo_jax.config import EnvironmentsConfig
from grpo_jax.environments._seat import (
    OPEN_SECONDS,
    Act,
    Answer,
    Kind,
    Name,
    UnknownToolError,
)
from grpo_jax.environments.outcome import Failure
from grpo_jax.workers.event_loop import EventLoop

_logger = logging.getLogger(__name__)

# Time in which all environments must close at the end of the run.
_CLOSE_SECONDS = 60.0


class Place(Protocol):
    """Where environments live and acts are done: in this process, or in others."""

    def seat(self, name: Name) -> Any:
        """A new seat, not yet open."""
        ...

    def environment(self, seat: Any) -> Any:
        """The environment at a seat; None if it is in another process."""
        ...

    async def act(self, seat: Any, act: Act, limit: float | None) -> Answer:
        """The answer of an act within `limit` seconds."""
        ...

    async def resets(
        self, groups: Sequence[Sequence[tuple[Any, Act, float | None]]]
    ) -> list[list[Answer]]:
        """The answers of each group's resets, up to the first that failed."""
        ...

    def rest(self, seat: Any) -> None:
        """The seat's episode is over."""
        ...

    def is_sound(self, seat: Any) -> bool:
        """Whether the environment at a seat can still be reset."""
        ...

    def close(self) -> None:
        """Ends threads and processes."""
        ...


class Pool:
    """What all plays of a run share: the place, and the seats that wait there.

    An environment is made once and reset often.
    """

    def __init__(self, place: Place, config: EnvironmentsConfig) -> None:
        self.place = place
        self.kinds: dict[Name, Kind] = {}
        self.config = config
        self.loop = EventLoop("environments")
        self._waiting: dict[Name, list[Any]] = {}
        # All that are open, by their ids.
        self._all: dict[int, tuple[Name, Any]] = {}
        self._logged: set[tuple[str, str, str]] = set()

    def probe(self, name: Name) -> Answer:
        """A description of a factory's environments, by making the first of them."""
        return self.loop.start(self._probe(name)).result()

    async def take(self, name: Name) -> tuple[Any, Answer]:
        """A seat with an environment, made anew if none waits."""
        waiting = self._waiting.setdefault(name, [])
        while waiting:
            seat = waiting.pop()
            if self.place.is_sound(seat):
                return seat, Answer()
        return await self._open(name, OPEN_SECONDS)

    def give_back(self, name: Name, seat: Any) -> None:
        """A seat whose environment can be reset again."""
        self.place.rest(seat)
        self._waiting.setdefault(name, []).append(seat)

    def lose(self, seat: Any) -> None:
        """A seat where code may still run: it is left alone."""
        self._all.pop(id(seat), None)

    async def discard(self, seat: Any) -> None:
        """Closes an environment that is not used again, if `close` is not a tool."""
        if entry := self._all.pop(id(seat), None):
            name, _ = entry
            answer = await self.place.act(seat, Act("close"), self.limit)
            self.log(name, Act("close"), answer.failure)

    def close(self) -> None:
        """Closes all environments, and ends threads and processes."""
        self.loop.start(self._close()).result()
        self.loop.stop()

    async def _open(self, name: Name, limit: float | None) -> tuple[Any, Answer]:
        seat = self.place.seat(name)
        answer = await self.place.act(seat, Act("open"), limit)
        if answer.failure is None:
            self._all[id(seat)] = (name, seat)
        return seat, answer

    async def _probe(self, name: Name) -> Answer:
        seat, opened = await self._open(name, None)
        if opened.failure is not None or opened.interrupted:
            return opened
        described = await self.place.act(seat, Act("describe"), None)
        if described.failure is None and not described.interrupted:
            self.kinds[name] = described.value
            self.give_back(name, seat)
        return described

    async def _close(self) -> None:
        seats = [seat for _, seat in self._all.values()]
        closing = [asyncio.create_task(self.discard(seat)) for seat in seats]
        if closing:
            await asyncio.wait(closing, timeout=_CLOSE_SECONDS)
        self.place.close()

    @property
    def limit(self) -> float | None:
        """Seconds of one call."""
        return self.config.tool_timeout_seconds

    def log(self, name: Name, act: Act, failure: Failure | None) -> None:
        """Reports a failure, the first of its kind in full and the others not."""
        if failure is None:
            return
        kind = self.kinds.get(name)
        what = f"{kind.class_name if kind else name}.{act.kind}"
        then = "such episodes have no reward"
        if act.kind == "tool":
            what = act.name
            then = "the policy reads the error message"
        # Names that no tool has are of one kind, however many a policy invents.
        unknown = failure.cause == UnknownToolError.__name__
        # One call can return nonsense of several kinds: what was expected tells them.
        expected = (
            failure.message.rpartition(";")[2] if failure.kind == "invalid" else ""
        )
        key = ("" if unknown else what, failure.cause, expected)
        if key not in self._logged:
            self._logged.add(key)
            _logger.warning(
                "%s failed (%s); %s, and further failures of this kind are only "
                "counted. %s",
                *(what, failure.cause, then, failure.details),
            )
