"""Episodes that are played at once, while the policy draws its turns."""

import asyncio
import concurrent.futures
import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.environments._episode import Episode, InterruptedCallError
from grpo_jax.environments._pool import Pool
from grpo_jax.environments._seat import Act, Answer, Name
from grpo_jax.environments.base import Message
from grpo_jax.environments.outcome import Failure, Reply, Result

Row = Mapping[str, Any]


class Play:
    """Episodes of a number of rows, some for each; made by `Host.play`.

    Episode `row * members + member` is one member's. What the environments answer is
    worked out beside the caller: `send` gives a turn, `wait` the reply. `results` ends
    the episodes. `close` gives the environments back, so call it when nobody looks at
    them any more.

    Attributes:
      openings: for each row, the messages that its episodes begin with, or the failure
        of its group, whose episodes are over.
    """

    openings: list[list[Message] | Failure]

    def __init__(
        self,
        pool: Pool,
        rows: Sequence[Row],
        names: Sequence[Name],
        *,
        seeds: Sequence[int],
        members: int,
        reward_names: Mapping[str, str],
    ) -> None:
        """Begins the episodes, and returns when all have begun.

        Args:
          names: of the factory of each row.
          reward_names: by the class of an environment, whose `type_id` it is.

        Raises:
          ValueError: members of a group began differently.
        """
        self._pool = pool
        self._rows = rows
        self._names = names
        self._members = members
        self._reward_names = reward_names
        self._seats: list[Any] = []
        self._lost: set[int] = set()
        self._turns: dict[int, concurrent.futures.Future[Reply]] = {}
        self._rewards: dict[int, asyncio.Task[float]] = {}
        self._episodes = [self._episode(i) for i in range(len(rows) * members)]
        try:
            self.openings = self._run(self._begin(seeds))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._episodes)

    def send(self, episode: int, message: Message) -> None:
        """Gives a turn of the policy; returns at once.

        Args:
          message: the assistant's, with "content", and "tool_calls" if it calls tools.

        Raises:
          ValueError: the episode is over, or its last turn has no reply yet.
        """
        if episode in self._turns or self._episodes[episode].is_over:
            state = "awaits a reply" if episode in self._turns else "is over"
            raise ValueError(f"episode {episode} {state}; it takes no turn.")
        self._turns[episode] = self._pool.loop.start(self._turn(episode, message))

    def wait(self, episodes: Iterable[int]) -> dict[int, Reply]:
        """The replies to the last turns of these episodes, once all are there.

        Raises:
          KeyboardInterrupt: by Ctrl-C, also in the middle of the code of a tool.
          ValueError: an episode awaits no reply.
        """
        replies = {}
        for episode in episodes:
            if episode not in self._turns:
                raise ValueError(f"episode {episode} awaits no reply; send a turn.")
            replies[episode] = _result(self._turns[episode])
            del self._turns[episode]
        return replies

    def results(self) -> list[Result]:
        """Ends all episodes, and gives what became of each, in their order.

        Environments compute their rewards now, unless their episodes were over before.
        """
        for turn in self._turns.values():
            _result(turn)
        self._turns.clear()
        return self._run(self._results())

    def digest(self) -> str:
        """Equal for plays that observed the same: openings, replies and failures."""
        digests = (episode.digest for episode in self._episodes)
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def close(self) -> None:
        """Gives the environments back, to be reset for other episodes."""
        self._run(self._close())

    def __enter__(self) -> "Play":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, coroutine: Any) -> Any:
        return _result(self._pool.loop.start(coroutine))

    def _name(self, episode: int) -> Name:
        return self._names[episode // self._members]

    def _episode(self, number: int) -> Episode:
        async def act(act: Act, limit: float | None) -> Answer:
            return self._settled(
                number, act, await self._pool.place.act(self._seats[number], act, limit)
            )

        name = self._name(number)
        report = functools.partial(self._pool.log, name)
        return Episode(self._pool.kinds[name], self._pool.config, act, report)

    def _settled(self, number: int, act: Act, answer: Answer) -> Answer:
        if answer.interrupted:
            raise InterruptedCallError
        self._pool.log(self._name(number), act, answer.failure)
        if answer.lost:
            self._lost.add(number)
        return answer

    async def _begin(self, seeds: Sequence[int]) -> list[list[Message] | Failure]:
        numbers = range(len(self._episodes))
        opened = await asyncio.gather(
            *(self._pool.take(self._name(number)) for number in numbers)
        )
        self._seats = [seat for seat, _ in opened]
        made = [
            self._settled(number, Act("open"), answer)
            for number, (_, answer) in enumerate(opened)
        ]
        answers: dict[int, list[Answer]] = {}
        groups = {}
        for index, row in enumerate(self._rows):
            group = range(index * self._members, (index + 1) * self._members)
            answers[index] = [made[n] for n in group if made[n].failure is not None]
            if not answers[index]:
                act = Act("reset", arguments=row, seed=seeds[index])
                limit = self._episodes[group[0]].limit
                groups[index] = [(self._seats[n], act, limit) for n in group]
        found = await self._pool.place.resets(list(groups.values()))
        for index, of_group in zip(groups, found, strict=True):
            answers[index] = [
                self._settled(number, Act("reset"), answer)
                for number, answer in enumerate(of_group, index * self._members)
            ]
        return [self._opening(index, answers[index]) for index in range(len(seeds))]

    def _opening(self, index: int, answers: Sequence[Answer]) -> Any:
        """What the episodes of a group begin with, or the failure of one for all."""
        first = index * self._members
        failed = [answer for answer in answers if answer.failure is not None]
        openings = []
        for offset in range(self._members):
            answer = failed[0] if failed else answers[offset]
            openings.append(self._episodes[first + offset].begin(answer))
        members = self._episodes[first : first + self._members]
        failure = next((one.failure for one in members if one.failure), None)
        if failure is not None:
            for one in members:
                one.abandon(failure)
            return failure
        if any(opening != openings[0] for opening in openings):
            self._raise_differing(index, openings)
        return openings[0]

    def _raise_differing(self, index: int, openings: Sequence[Any]) -> None:
        kind = self._pool.kinds[self._names[index]]
        other = next(opening for opening in openings if opening != openings[0])
        raise ValueError(
            f"environment {kind.class_name} began differently for members of one "
            "group, whose rewards are compared with each other: "
            f"{openings[0][-1]['content']!r:.200} and {other[-1]['content']!r:.200}. "
            "Give its `reset` a parameter `seed`, and draw all that is random from it."
        )

    async def _turn(self, number: int, message: Message) -> Reply:
        reply = await self._episodes[number].answer(message)
        if reply.done:
            self._end(number)
        return reply

    def _end(self, number: int) -> "asyncio.Task[float]":
        """Starts the computation of the reward, once."""
        if number not in self._rewards:
            reward = self._episodes[number].reward()
            self._rewards[number] = asyncio.create_task(reward)
        return self._rewards[number]

    async def _results(self) -> list[Result]:
        numbers = range(len(self._episodes))
        rewards = await asyncio.gather(*(self._end(number) for number in numbers))
        return [self._result(*given) for given in enumerate(rewards)]

    def _result(self, number: int, reward: float) -> Result:
        episode, kind = self._episodes[number], self._pool.kinds[self._name(number)]
        own = self._reward_names.get(kind.type_id)
        names = self._reward_names.values()
        return Result(
            rewards={name: reward if name == own else math.nan for name in names},
            failure=episode.failure,
            turns=episode.turns,
            calls=episode.calls,
            failed_calls=episode.failed_calls,
            seconds=dict(episode.seconds),
            environment_seconds=episode.environment_seconds,
            environment=self._pool.place.environment(self._seats[number]),
        )

    async def _close(self) -> None:
        seats, self._seats = self._seats, []
        self._lost |= {n for n, turn in self._turns.items() if not turn.done()}
        failed = []
        for number, seat in enumerate(seats):
            name = self._name(number)
            if number in self._lost:
                self._pool.lose(seat)
            elif self._episodes[number].failure is None:
                self._pool.give_back(name, seat)
            else:
                failed.append(self._pool.discard(seat))
        # At once, for each may take a time limit of its own.
        await asyncio.gather(*failed)


def _result(future: concurrent.futures.Future) -> Any:
    try:
        return future.result()
    except InterruptedCallError:
        raise KeyboardInterrupt from None
