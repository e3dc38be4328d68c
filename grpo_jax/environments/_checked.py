"""What environments return, checked, and as messages and numbers."""

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.environments._tools import blocks_text, is_blocks
from grpo_jax.environments.base import Message, Step

# Advantages are computed in float32, where a larger reward would be infinite.
_LARGEST = float(np.finfo(np.float32).max)
# What a row without a prompt begins with, as in TRL: the environment writes the rest.
_EMPTY_PROMPT: tuple[Message, ...] = ({"role": "user", "content": ""},)


class CheckedStep(NamedTuple):
    """A step of an environment: what the policy reads next, as messages."""

    messages: list[Message]
    reward: float | None
    done: bool


class NonsenseError(ValueError):
    """An environment returned something that breaks its contract."""


def opening(
    row: Mapping[str, Any], observation: Any, *, may_replace: bool
) -> list[Any]:
    """The messages that an episode begins with; the row stays as it is.

    A text is appended to the last message. Messages take the place of the prompt where
    the environment `may_replace` it. None leaves the prompt alone. A prompt that is a
    text is one message of the user.
    """
    prompt = row.get("prompt", _EMPTY_PROMPT)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages: list[dict[str, Any]] = [dict(message) for message in prompt]
    if observation is None:
        return messages
    if may_replace and not isinstance(observation, str):
        return checked_messages(observation, of="reset")
    text = blocks_text(observation) if is_blocks(observation) else observation
    if not isinstance(text, str):
        raise NonsenseError(
            f"reset returned {observation!r:.80}; expected a text, or None to leave "
            "the prompt as it is."
        )
    last = messages[-1]
    content = last["content"]
    if isinstance(content, str):
        return [*messages[:-1], {**last, "content": content + text}]
    blocks = [*content, {"type": "text", "text": text}]
    return [*messages[:-1], {**last, "content": blocks}]


def checked_step(step: Any) -> CheckedStep:
    """A step, without messages if the episode is over."""
    if not isinstance(step, Step):
        raise NonsenseError(
            f"step returned {step!r:.80}; expected Step(observation, reward, done)."
        )
    reward = checked_reward(step.reward, of="step")
    if _checked_flag(step.done):
        return CheckedStep([], reward, True)
    text = step.observation
    if isinstance(text, str):
        return CheckedStep([{"role": "user", "content": text}], reward, False)
    return CheckedStep(checked_messages(text, of="step"), reward, False)


def _checked_flag(done: Any) -> bool:
    # A text would be true, whatever it says.
    with contextlib.suppress(ValueError):  # a ragged list has no dimensions
        if np.asarray(done).dtype.kind in "bi" and np.ndim(done) == 0:
            if done in (0, 1):
                return bool(done)
    raise NonsenseError(f"step returned done={done!r:.80}; expected True or False.")


def checked_reward(reward: Any, *, of: str) -> float | None:
    """A reward as a float, or None for no reward."""
    if reward is None:
        return None
    problem = NonsenseError(
        f"{of} returned the reward {reward!r:.80}; expected a finite number, or None "
        "for no reward."
    )
    try:
        # A text is no number here, and neither is an array, even of one.
        is_one = not isinstance(reward, str | bytes) and np.ndim(reward) == 0
        value = float(reward) if is_one else math.nan
    except (TypeError, ValueError, OverflowError) as error:
        raise problem from error
    if not abs(value) <= _LARGEST:  # NaN as well
        raise problem
    return value


def checked_messages(messages: Any, *, of: str) -> list[Message]:
    """A copy of chat messages, at least one, which JSON can hold."""
    found: list[Any] = list(messages) if isinstance(messages, list | tuple) else []
    if not found or not all(map(_is_message, found)):
        raise NonsenseError(
            f"{of} returned {messages!r:.80}; expected a text, or a list of messages "
            'such as [{"role": "user", "content": "..."}].'
        )
    try:
        return json.loads(json.dumps([dict(message) for message in found]))
    except (TypeError, ValueError) as error:
        raise NonsenseError(
            f"{of} returned messages that JSON cannot hold: {error}"
        ) from error


def _is_message(value: Any) -> bool:
    if not (isinstance(value, Mapping) and isinstance(value.get("role"), str)):
        return False
    # A turn of calls alone has no content.
    return isinstance(value.get("content"), str | list) or "tool_calls" in value
