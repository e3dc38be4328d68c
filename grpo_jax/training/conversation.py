"""Conversations that a person watches or takes part in, one at a time.

They are drawn as in training: the ids of each turn are the policy's own, and what is
answered is appended to them.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from grpo_jax.config import SamplingConfig
from grpo_jax.environments.base import Message
from grpo_jax.environments.host import Host
from grpo_jax.environments.play import Play
from grpo_jax.models.limits import longest_prompt
from grpo_jax.reporting.text import Messages
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.rollout.encoding import prompt_problem
from grpo_jax.rollout.episodes import Playing
from grpo_jax.rollout.generate import GroupSampler
from grpo_jax.rollout.turns import Answer, Turns
from grpo_jax.tasks.base import Row
from grpo_jax.training._environments import EnvironmentFactory, Tools, open_episodes
from grpo_jax.training.evaluate import one_device
from grpo_jax.training.restore import Restored
from grpo_jax.weights.chat import Chat

# Receives messages as they are said, or a text about the conversation.
Show = Callable[[Messages], None]
# Tokens of a conversation, if the model's context has room for them.
_USUAL_LENGTH = 4096


def play_episode(
    policy: Restored,
    row: Row,
    *,
    tools: Tools | None = None,
    environment_factory: EnvironmentFactory | None = None,
    sampling: SamplingConfig,
    max_new_tokens: int,
    seed: int = 0,
    show: Show,
) -> Mapping[str, float] | None:
    """Play one episode, and show each message as soon as it is there.

    Args:
      row: with "prompt" and the columns that the environment needs.
      max_new_tokens: of the episode, what tools and the environment say included.
      seed: of the episode and of the sampling.

    Returns:
      The rewards that environments gave, by name; None for an episode that failed.

    Raises:
      ValueError: as `evaluate`, and for a prompt that has no room.
    """
    model, tokenizer = policy.model, policy.tokenizer
    sampling = policy_sampling(model.config, tokenizer, sampling)
    with Host(tools or (), environment_factory, policy.config.environments) as host:
        episodes = open_episodes(
            host,
            tokenizer,
            model.config,
            seed=seed,
            max_prompt_tokens=model.config.max_position_embeddings,
            max_new_tokens=max_new_tokens,
            stop_ids=sampling.stop_ids or (),
        )
        with contextlib.closing(
            episodes.begin([row], step=0, numbers=[0], members=1)
        ) as playing:
            show(playing.rows[0]["prompt"])
            _sample(
                policy,
                playing.prompts[0],
                _Watched(playing, show),
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
            )
            played = playing.finish()
            if played.counts["failed"][0, 0]:
                return None
            return played.columns["environment_rewards"][0]


def converse(
    policy: Restored,
    ask: Callable[[], str | None],
    *,
    tools: Tools | None = None,
    sampling: SamplingConfig,
    max_new_tokens: int | None = None,
    seed: int = 0,
    show: Show,
) -> None:
    """A conversation with a person, until they end it or the model's context is full.

    Args:
      ask: gives the person's next turn; None for the end.
      tools: functions that the policy may call before it answers.
      max_new_tokens: of the conversation behind the person's first turn; by default
        half the model's context, and at most 4,096.

    Raises:
      ValueError: for tools that the policy cannot call.
    """
    model, tokenizer = policy.model, policy.tokenizer
    sampling = policy_sampling(model.config, tokenizer, sampling)
    context = model.config.max_position_embeddings
    most = max_new_tokens or min(_USUAL_LENGTH, context // 2)
    with contextlib.ExitStack() as stack:
        host = None
        if tools:
            host = Host(tools, None, policy.config.environments)
            stack.enter_context(host)
        chat = Chat(tokenizer, () if host is None else host.schemas({}))
        limit = longest_prompt(context, new_tokens=most, context=context)

        def encode(messages: Sequence[Message]) -> list[int]:
            ids = chat.prompt(messages)
            vocab_size = model.config.vocab_size
            if problem := prompt_problem(ids, limit=limit, vocab_size=vocab_size):
                raise ValueError(f"the message {problem}.")
            return ids

        said = _ask_person(ask, encode, show)
        if said is None:
            return
        talk = _Talk(chat, host, ask, show, limit=most, stops=sampling.stop_ids or ())
        with contextlib.closing(talk):
            _sample(
                policy,
                said,
                talk,
                max_new_tokens=most,
                sampling=sampling,
                seed=seed,
            )


def _sample(
    policy: Restored,
    prompt: Sequence[int],
    turns: Turns,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    seed: int,
) -> None:
    """Draw one completion whose turns are answered."""
    context = policy.model.config.max_position_embeddings
    sampler = GroupSampler(policy.model, one_device(), max_prompt_tokens=context)
    sampler.update({"params": policy.params}, version=0)
    sampler.sample(
        [prompt],
        numbers=[0],
        key=jax.random.key(seed),
        group_size=1,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        turns=turns,
    )


def _ask_person(
    ask: Callable[[], str | None],
    encode: Callable[[Sequence[Message]], list[int]],
    show: Show,
) -> list[int] | None:
    """The ids of a person's next turn, asked for until it can be encoded."""
    while (text := ask()) is not None:
        messages: list[Message] = [{"role": "user", "content": text}]
        try:
            return encode(messages)
        except ValueError as error:
            show(f"({error})")
    return None


class _Watched:
    """Episodes of one row with one member, whose messages are shown as they come."""

    def __init__(self, playing: Playing, show: Show) -> None:
        self._playing, self._show = playing, show
        self._shown = 0

    def ended(self, number: int, sample: int, ids: list[int]) -> None:
        self._playing.ended(number, sample, ids)
        self._show_new()

    def answers(self, *, wait: bool) -> list[Answer]:
        answers = self._playing.answers(wait=wait)
        self._show_new()
        if self._playing.trajectories[0][0].is_cut:
            self._show("(the answer to this turn does not fit into --max-new-tokens)")
        return answers

    def _show_new(self) -> None:
        messages = self._playing.trajectories[0][0].messages
        if new := messages[self._shown :]:
            self._show(new)
        self._shown = len(messages)


class _Talk:
    """Answers the policy's turns with results of tools, else with those of a person."""

    def __init__(
        self,
        chat: Chat,
        host: Host | None,
        ask: Callable[[], str | None],
        show: Show,
        *,
        limit: int,
        stops: Sequence[int],
    ) -> None:
        self._chat, self._host, self._ask, self._show = chat, host, ask, show
        self._limit, self._stops = limit, frozenset(stops)
        self._length = 0  # tokens that were shown
        self._turn: tuple[list[int], dict[str, Any]] | None = None  # not answered yet
        self._play: Play | None = None  # of the calls since the person's last turn

    def ended(self, number: int, sample: int, ids: list[int]) -> None:
        message = self._chat.message(ids[self._length :])
        self._length = len(ids)
        self._show([message])
        self._turn = ids, message

    def answers(self, *, wait: bool) -> list[Answer]:
        if self._turn is None:
            return []
        (ids, message), self._turn = self._turn, None
        tokens = None
        if ids[-1] in self._stops:
            tokens = self._of_tools(ids, message)
            if tokens is None:
                suffix = functools.partial(self._chat.suffix, ids)
                tokens = _ask_person(self._ask, suffix, self._show)
                if tokens is None:
                    return [Answer(0, 0, None)]
        if tokens is None or len(ids) + len(tokens) >= self._limit:
            self._show(f"(the conversation has reached {self._limit} tokens)")
            return [Answer(0, 0, None)]
        self._length += len(tokens)
        return [Answer(0, 0, tokens)]

    def _of_tools(self, ids: list[int], message: Message) -> list[int] | None:
        """The tokens of the results of calls; None where the person answers."""
        if self._host is None or not message.get("tool_calls"):
            self.close()
            return None
        if self._play is None:
            self._play = self._host.play([{}], seeds=[0], members=1)
        self._play.send(0, message)
        reply = self._play.wait([0])[0]
        if reply.done:
            self.close()
            return None
        self._show(reply.messages)
        return self._chat.suffix(ids, reply.messages)

    def close(self) -> None:
        if self._play is not None:
            self._play.results()
            self._play.close()
            self._play = None
