"""Message environments of the tinker cookbook, tested with tinker-cookbook 0.6.1.

https://github.com/thinking-machines-lab/tinker-cookbook. Nothing of it is imported
here: the caller's environments do that. It is in no extra, because it needs torch.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from grpo_jax.environments.base import Message, Step, TextEnvironment


class _MessageStepResult(Protocol):
    """What is used of `tinker_cookbook.rl.message_env.MessageStepResult`."""

    @property
    def reward(self) -> float:
        """For this turn."""
        ...

    @property
    def episode_done(self) -> bool:
        """Whether the episode is over."""
        ...

    @property
    def next_messages(self) -> Sequence[Any]:
        """The whole conversation from its first message on."""
        ...


class _MessageEnv(Protocol):
    """What is used of `tinker_cookbook.rl.message_env.MessageEnv`."""

    async def initial_observation(self) -> Sequence[Any]:
        """The messages that the policy reads first."""
        ...

    async def step(self, message: Any) -> _MessageStepResult:
        """Answer the policy's message."""
        ...


def tinker_environment(make: Callable[..., Any]) -> Callable[[], TextEnvironment]:
    """Returns a factory of environments that play the message environments of `make`.

    `make(*, seed, **row)`, which may be `async`, returns the `MessageEnv` of one
    episode. Its first messages take the place of the prompt, and its rewards are added
    up. It gets the policy's turn as an assistant's message with the text as it is, with
    thinking and tool calls unparsed: one that answers `tool_calls`, such as
    `AgentToolMessageEnv`, ends at the first turn. It is deterministic if its own code
    is, given the row and the seed.

    Group rewards and `EnvFromMessageEnv`, which works on tokens, are not used. `step`
    raises `ValueError` if a conversation does not go on where it was: what stands
    there has been read and answered.
    """
    return functools.partial(Tinker, make)


class Tinker(TextEnvironment):
    """One episode after the other; made by `tinker_environment`."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._environment: _MessageEnv | None = None
        self._conversation: list[Any] = []

    async def reset(self, *, seed: int, **row: Any) -> Sequence[Message]:
        """Begin an episode with a new environment; returns its first messages."""
        made = self._make(seed=seed, **row)
        environment: _MessageEnv = await made if inspect.isawaitable(made) else made
        self._environment = environment
        # Copied: an environment may return the list that it goes on to append to.
        first = await environment.initial_observation()
        self._conversation = copy.deepcopy(list(first))
        return [_plain(message) for message in self._conversation]

    async def step(self, text: str) -> Step:
        """Answer a turn with the messages that the environment adds after it."""
        if self._environment is None:
            raise RuntimeError("the episode is over, or has not begun: call reset.")
        message = {"role": "assistant", "content": text}
        result = await self._environment.step(dict(message))
        if result.episode_done:
            self._environment = None
            return Step(reward=float(result.reward), done=True)
        before = [*self._conversation, message]
        conversation = copy.deepcopy(list(result.next_messages))
        if conversation[: len(before)] != before:
            raise ValueError(
                f"{type(self._environment).__name__} changed the conversation: its "
                f"next_messages must be the {len(before)} messages so far, the "
                "policy's as the last one, and what follows."
            )
        self._conversation = conversation
        new = [_plain(message) for message in conversation[len(before) :]]
        return Step(observation=new, reward=float(result.reward))


def _plain(message: Any) -> Message:
    """A message with text only, its parts joined."""
    content = message["content"]
    if not isinstance(content, str):
        kinds = {part["type"] for part in content} - {"text"}
        if kinds:
            raise ValueError(
                f"a message has parts of the kinds {sorted(kinds)}; only text can be "
                "read here."
            )
        content = "".join(part["text"] for part in content)
    return {**message, "content": content}
