"""One episode: the policy's turns answered, counted, and digested."""

import asyncio
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from grpo_jax.config import EnvironmentsConfig
from grpo_jax.environments._checked import (
    CheckedStep,
    NonsenseError,
    checked_reward,
)
from grpo_jax.environments._seat import Act, Answer, Kind, failed, timed_out
from grpo_jax.environments._tools import Call, calls_of, error_text
from grpo_jax.environments.base import Message
from grpo_jax.environments.outcome import Failure, Reply


class InterruptedCallError(Exception):
    """Ctrl-C came in the middle of a user's code."""


class Caller(Protocol):
    """Does an act at the seat of an episode, within seconds, and logs a failure."""

    async def __call__(self, act: Act, limit: float | None) -> Answer: ...


class Episode:
    """What has happened in one episode. Its coroutines belong to the host's loop."""

    def __init__(
        self,
        kind: Kind,
        config: EnvironmentsConfig,
        caller: Caller,
        report: Callable[[Act, Failure], None],
    ) -> None:
        self._kind = kind
        self._config = config
        self._caller = caller
        self._report = report  # of a failure that no call had
        self._rounds = 0  # turns that were answered
        self._used = 0.0  # seconds in calls, of those of the episode
        self._hash = hashlib.sha256()
        self._step_rewards: list[float | None] = []
        self.failure: Failure | None = None
        self.is_over = False
        self.turns = self.calls = self.failed_calls = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.environment_seconds = 0.0

    @property
    def limit(self) -> float | None:
        """Seconds that the next call may take."""
        call = self._config.tool_timeout_seconds
        whole = self._config.episode_timeout_seconds
        if whole is None:
            return call
        left = max(whole - self._used, 0.0)
        return left if call is None else min(call, left)

    @property
    def digest(self) -> str:
        """Equal for episodes that observed the same, turn by turn."""
        return self._hash.hexdigest()

    def begin(self, answer: Answer) -> list[Message]:
        """The opening, from the answer of the reset."""
        self._account(answer)
        if answer.failure is not None:
            self._fail(answer.failure)
        if self.failure is not None:
            return []
        self._observe(answer.value)
        return answer.value

    def abandon(self, failure: Failure) -> None:
        """End an episode whose group cannot be played."""
        self._fail(failure)

    async def answer(self, message: Message) -> Reply:
        """What stands after a turn of the policy."""
        self.turns += 1
        calls = calls_of(message)
        most = self._config.max_tool_calling_iterations
        if most is not None and self._rounds >= most:
            reply = Reply(done=True)
        elif calls:
            self._rounds += 1
            reply = await self._call_tools(calls)
        elif self._kind.is_text:
            self._rounds += 1
            reply = await self._step(message, last=self._rounds == most)
        else:
            reply = Reply(done=True)
        self.is_over = reply.done
        return reply

    async def reward(self) -> float:
        """The reward that the environment gives to the episode; NaN for none."""
        self.is_over = True
        if self.failure is not None or not self._kind.has_reward:
            return math.nan
        if self._kind.is_text:
            return self._sum()
        answer = await self._caller(Act("reward"), self.limit)
        self._account(answer)
        if answer.failure is not None:
            self._fail(answer.failure)
        if self.failure is not None:
            return math.nan
        self._observe({"reward": answer.value})
        return math.nan if answer.value is None else answer.value

    def _sum(self) -> float:
        given = [reward for reward in self._step_rewards if reward is not None]
        if self._step_rewards and not given:
            return math.nan
        try:
            checked_reward(total := math.fsum(given), of="all steps of an episode")
        except NonsenseError as error:
            failure = failed(error).failure
            assert failure is not None, "it is no interrupt"
            self._report(Act("step"), failure)
            self._fail(failure)
            return math.nan
        return total

    async def _step(self, message: Message, *, last: bool) -> Reply:
        act = Act("step", arguments=message.get("content") or "")
        answer = await self._caller(act, self.limit)
        self._account(answer)
        if answer.failure is not None:
            self._fail(answer.failure)
        if self.failure is not None:
            return Reply(done=True)
        step: CheckedStep = answer.value
        self._observe(step)
        self._step_rewards.append(step.reward)
        done = step.done or last
        return Reply(messages=() if done else tuple(step.messages), done=done)

    async def _call_tools(self, calls: Sequence[Call]) -> Reply:
        """Plain tools one after another, then the async ones at once, as in TRL."""
        later = [call for call in calls if call.name in self._kind.async_tools]
        answers: dict[int, Answer] = {}
        for call in calls:
            if call not in later and self.failure is None:
                answers[id(call)] = answer = await self._tool(call)
                self._spend(answer.seconds)
        if later and self.failure is None:
            together = await asyncio.gather(*map(self._tool, later))
            self._spend(max(answer.seconds for answer in together))
            answers |= {id(c): a for c, a in zip(later, together, strict=True)}
        if self.failure is not None:
            return Reply(done=True)
        messages = []
        for call in calls:
            answer = answers[id(call)]
            failure = answer.failure
            content = error_text(failure.message) if failure else answer.value
            messages.append({"role": "tool", "name": call.name, "content": content})
        self._observe(messages)
        return Reply(messages=tuple(messages))

    async def _tool(self, call: Call) -> Answer:
        if call.problem:
            failure = Failure(
                kind="error",
                cause="unsupported call",
                message=call.problem,
                details=call.problem,
            )
            answer = Answer(failure=failure)
        else:
            act = Act("tool", name=call.name, arguments=call.arguments)
            answer = await self._caller(act, self.limit)
        self.calls += 1
        self.failed_calls += answer.failure is not None
        if call.name in self._kind.tools:
            self.seconds[call.name] += answer.seconds
        self._lose(answer)
        return answer

    def _account(self, answer: Answer) -> None:
        """The time of a call of the environment, which may be gone by now."""
        self.environment_seconds += answer.seconds
        self._lose(answer)
        self._spend(answer.seconds)

    def _lose(self, answer: Answer) -> None:
        if answer.gone and answer.failure is not None:
            self._fail(answer.failure)

    def _spend(self, seconds: float) -> None:
        self._used += seconds
        whole = self._config.episode_timeout_seconds
        if whole is not None and self._used >= whole:
            self._fail(timed_out(whole))

    def _fail(self, failure: Failure) -> None:
        if self.failure is None:
            self.failure = failure
            self.is_over = True
            self._observe({"failure": failure.kind})

    def _observe(self, observed: Any) -> None:
        text = json.dumps(observed, sort_keys=True, default=str)
        self._hash.update(text.encode() + b"\n")
