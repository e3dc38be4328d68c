"""Environments that wait to be played again, and where they live."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from grpo_jax.config import EnvironmentsConfig
from grpo_jax.environments._seat import Act, Answer, Kind, Name
from grpo_jax.environments.outcome import Failure
from grpo_jax.workers.event_loop import EventLoop

_logger = logging.getLogger(__name__)

# Time in which an environment must be made. It may start a server or load a file.
_OPEN_SECONDS = 600.0


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
        self._logged: set[tuple[str, str]] = set()

    def probe(self, name: Name) -> Answer:
        """A description of a factory's environments, by making the first of them."""
        return self.loop.start(self._probe(name)).result()

    async def take(self, name: Name) -> tuple[Any, Answer]:
        """A seat with an environment, made anew if none waits."""
        waiting = self._waiting.setdefault(name, [])
        if waiting:
            return waiting.pop(), Answer()
        seat = self.place.seat(name)
        return seat, await self.place.act(seat, Act("open"), _OPEN_SECONDS)

    def give_back(self, name: Name, seat: Any) -> None:
        """A seat whose environment can be reset again."""
        self.place.rest(seat)
        self._waiting.setdefault(name, []).append(seat)

    async def discard(self, name: Name, seat: Any) -> None:
        """Closes an environment that is not used again, if it is not a tool."""
        answer = await self.place.act(seat, Act("close"), self.limit)
        self.log(name, Act("close"), answer.failure)

    def close(self) -> None:
        """Closes the environments that wait, and ends threads and processes."""
        self.loop.start(self._close()).result()
        self.loop.stop()

    async def _probe(self, name: Name) -> Answer:
        seat = self.place.seat(name)
        opened = await self.place.act(seat, Act("open"), None)
        if opened.failure is not None or opened.interrupted:
            return opened
        described = await self.place.act(seat, Act("describe"), None)
        if described.failure is None:
            self.kinds[name] = described.value
            self.give_back(name, seat)
        return described

    async def _close(self) -> None:
        waiting = [(name, s) for name, seats in self._waiting.items() for s in seats]
        self._waiting = {}
        await asyncio.gather(*(self.discard(name, seat) for name, seat in waiting))
        self.place.close()

    @property
    def limit(self) -> float | None:
        """Seconds of one call."""
        return self.config.tool_timeout_seconds

    def log(self, name: Name, act: Act, failure: Failure | None) -> None:
        """Reports a failure, the first of its kind in full and the others not."""
        if failure is None:
            return
        what = f"{self.kinds[name].class_name}.{act.kind}"
        then = "such episodes have no reward"
        if act.kind == "tool":
            what = act.name
            then = "the policy reads the error message"
        key = (what, failure.cause)
        if key not in self._logged:
            self._logged.add(key)
            _logger.warning(
                "%s failed (%s); %s, and further failures of this kind are only "
                "counted. %s",
                *(what, failure.cause, then, failure.details),
            )
