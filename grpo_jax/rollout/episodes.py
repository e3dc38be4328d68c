"""Episodes: completions of several turns, which tools or environments answer.

The token ids of a completion are the record: what the policy drew, and between its
turns what the chat template puts there. Nothing that was drawn is tokenized again.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from grpo_jax.environments.base import Message
from grpo_jax.environments.host import Host
from grpo_jax.environments.outcome import Failure
from grpo_jax.environments.play import Play
from grpo_jax.rollout.encoding import as_messages
from grpo_jax.rollout.turns import Answer
from grpo_jax.tasks.base import Row
from grpo_jax.weights.chat import Chat
from grpo_jax.weights.tokenizer import Tokenizer

# An answer is fed this many turns of the engine after its question, or once nothing is
# left to draw. Tools run so long beside the devices, and the order of all that is drawn
# does not depend on how fast they are.
_BESIDE = 2

_LOG = logging.getLogger(__name__)


class Episodes:
    """Opens the episodes of rows: their prompts, and what answers their turns."""

    def __init__(
        self,
        host: Host,
        tokenizer: Tokenizer,
        *,
        seed: int,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        problem: Callable[[Sequence[int]], str | None],
    ) -> None:
        """Episodes of a run.

        Args:
          seed: from which those of the episodes follow, with the step and the prompt.
          problem: what is wrong with a prompt's token ids; None for nothing.
        """
        self._host, self._tokenizer, self._seed = host, tokenizer, seed
        self._limit, self._stop_ids = max_new_tokens, frozenset(stop_ids)
        self._problem = problem
        self._chats: dict[str, Chat] = {}
        self._warned = False

    def encode(self, row: Row) -> list[int]:
        """The token ids of a row's own prompt, with the tools of its environment.

        Raises:
          ValueError: for a chat template that has no room for tools, rewrites earlier
            turns or refuses the messages.
        """
        ids = self.chat(row).prompt(as_messages(self._tokenizer, row["prompt"]))
        # An environment may bring a prompt of its own.
        return ids or [self._tokenizer.pad_id]

    def chat(self, row: Row) -> Chat:
        """The conversation format with the tools of a row's environment."""
        schemas = self._host.schemas(row)
        name = repr(schemas)
        if name not in self._chats:
            self._chats[name] = Chat(self._tokenizer, schemas)
        return self._chats[name]

    def begin(
        self, rows: Sequence[Row], *, step: int, numbers: Sequence[int], members: int
    ) -> "Playing":
        """Begin an episode of each member of the groups of these rows.

        A group whose environment cannot begin, or whose prompt does not fit, is sampled
        without an environment and has no rewards.

        Args:
          step: with the number of its prompt it makes the seed of a group.
        """
        seeds = [
            int(np.random.SeedSequence([self._seed, step, number]).generate_state(1)[0])
            for number in numbers
        ]
        play = self._host.play(rows, seeds=seeds, members=members)
        opened, prompts, failed = [], [], set()
        for n, (row, opening) in enumerate(zip(rows, play.openings, strict=True)):
            ids: list[int] = []
            if not isinstance(opening, Failure):
                ids = self._opened(row, opening)
            if ids:
                row = {**row, "prompt": opening}
            else:
                failed.add(n)
                ids = self.encode(row)
            opened.append(row)
            prompts.append(ids)
        return Playing(
            play,
            [self.chat(row) for row in rows],
            rows=opened,
            prompts=prompts,
            failed=failed,
            members=members,
            limit=self._limit,
            stop_ids=self._stop_ids,
            has_tools=bool(self._host.tools),
        )

    def _opened(self, row: Row, opening: Sequence[Message]) -> list[int]:
        """The token ids of what an environment shows; none if they cannot be used."""
        try:
            ids = self.chat(row).prompt(opening)
        except ValueError as error:  # an environment may say anything
            self._warn(f"cannot be encoded: {error}")
            return []
        if problem := self._problem(ids):
            self._warn(problem)
            return []
        return ids

    def _warn(self, problem: str) -> None:
        if not self._warned:
            _LOG.warning(
                "the prompt of a group, with what its environment shows, %s; it has no "
                "reward, and further such groups are only counted",
                problem,
            )
        self._warned = True


@dataclasses.dataclass(kw_only=True)
class Trajectory:
    """One completion, turn by turn.

    Attributes:
      messages: the policy's and those that answer them, without the prompt.
      length: how many of its tokens `messages` has.
      turns: of the policy.
      is_over: whether nothing answers its last turn.
      is_cut: whether an answer did not fit behind it and was dropped.
      problem: why an answer cannot be given to the policy; the episode has failed.
    """

    messages: list[Message] = dataclasses.field(default_factory=list)
    length: int = 0
    turns: int = 0
    is_over: bool = False
    is_cut: bool = False
    problem: str | None = None


class Playing:
    """The episodes of a step; answers the sampler's completions (see `Turns`).

    Attributes:
      rows: of the groups, with the prompts that the policy sees.
      prompts: their token ids.
      trajectories: a list of G per group.
    """

    def __init__(
        self,
        play: Play,
        chats: Sequence[Chat],
        *,
        rows: Sequence[Row],
        prompts: list[list[int]],
        failed: set[int],
        members: int,
        limit: int,
        stop_ids: frozenset[int],
        has_tools: bool,
    ) -> None:
        self._play, self._chats = play, chats
        self.rows, self.prompts = rows, prompts
        self._failed, self._members = failed, members
        self._limit, self._stop_ids = limit, stop_ids
        self._has_tools = has_tools
        self.trajectories = [[Trajectory() for _ in range(members)] for _ in rows]
        self._turn = 0  # of the engine
        # Completions that wait, in order: since which turn, and all their tokens.
        self._waiting: list[tuple[int, int, int, list[int]]] = []

    def ended(self, number: int, sample: int, ids: list[int]) -> None:
        """A completion has ended a turn: ask its environment for an answer."""
        one, chat = self.trajectories[number][sample], self._chats[number]
        turn = ids[one.length :]
        message = chat.message(turn)
        one.messages.append(message)
        one.length, one.turns = len(ids), one.turns + 1
        one.is_over = number in self._failed or turn[-1] not in self._stop_ids
        if not one.is_over:
            self._play.send(number * self._members + sample, message)
        self._waiting.append((self._turn, number, sample, ids))

    def answers(self, *, wait: bool) -> list[Answer]:
        """Answers that are due, in the order in which their questions came."""
        self._turn += 1
        due, later = [], []
        for asked in self._waiting:
            since, number, sample, _ = asked
            over = self.trajectories[number][sample].is_over
            is_due = wait or over or self._turn - since > _BESIDE
            (due if is_due else later).append(asked)
        self._waiting = later
        episodes = [
            number * self._members + sample
            for _, number, sample, _ in due
            if not self.trajectories[number][sample].is_over
        ]
        replies = self._play.wait(episodes)
        answers = []
        for _, number, sample, ids in due:
            reply = replies.get(number * self._members + sample)
            tokens = None
            if reply is not None and not reply.done:
                tokens = self._continue(number, sample, ids, reply.messages)
            answers.append(Answer(number, sample, tokens))
        return answers

    def _continue(
        self, number: int, sample: int, ids: list[int], messages: Sequence[Message]
    ) -> list[int] | None:
        """The tokens of an answer; None where they leave no room for a turn."""
        one, chat = self.trajectories[number][sample], self._chats[number]
        try:
            tokens = chat.suffix(ids, messages)
        except ValueError as error:  # an environment may say anything
            one.problem = str(error)
            return None
        if len(ids) + len(tokens) >= self._limit:
            one.is_cut = True
            return None
        one.messages += messages
        one.length += len(tokens)
        return tokens

    def completions(self) -> list[list[list[Message]]]:
        """The messages of each completion, as reward functions see them."""
        return [[one.messages for one in group] for group in self.trajectories]

    def last_turns(self) -> list[list[str]]:
        """The text of each completion's last turn of the policy."""
        return [
            [
                next(m["content"] for m in reversed(one) if m["role"] == "assistant")
                for one in group
            ]
            for group in self.completions()
        ]

    def is_cut(self) -> Bool[np.ndarray, "N G"]:
        """Which completions ended because an answer did not fit behind them."""
        return np.array([[one.is_cut for one in g] for g in self.trajectories])

    def finish(self) -> "Played":
        """What reward functions are told of the episodes, and what is counted.

        `close` follows when they have been called, for they may see the environments.
        """
        results = self._play.results()
        shape = len(self.rows), self._members
        all_of = [one for group in self.trajectories for one in group]
        failed = [
            result.failure is not None or one.problem is not None
            for result, one in zip(results, all_of, strict=True)
        ]
        for number in self._failed:
            start = number * self._members
            failed[start : start + self._members] = [True] * self._members
        of_all: dict[str, list[Any]] = {
            "turns": [one.turns for one in all_of],
            "failed": failed,
            "dropped_answers": [one.is_cut for one in all_of],
        }
        if self._has_tools:
            of_all |= {
                "calls": [result.calls for result in results],
                "failed_calls": [result.failed_calls for result in results],
                "malformed_calls": [
                    sum("malformed" in message for message in one.messages)
                    for one in all_of
                ],
                "tool_seconds": [sum(result.seconds.values()) for result in results],
            }
        counts = {k: np.array(v).reshape(shape) for k, v in of_all.items()}
        columns: dict[str, list[Any]] = {
            "environment_rewards": [result.rewards for result in results]
        }
        environments = [result.environment for result in results]
        if any(one is not None for one in environments):
            columns["environments"] = environments
        return Played(columns=columns, counts=counts, digest=self._play.digest())

    def close(self) -> None:
        """Give the environments back, to be reset for other episodes."""
        self._play.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Played:
    """Episodes that are over.

    Attributes:
      columns: for reward functions, a value per completion.
      counts: ``[N, G]`` by name; `failed` are those that have no reward.
      digest: of all that was answered.
    """

    columns: dict[str, list[Any]]
    counts: dict[str, np.ndarray]
    digest: str
