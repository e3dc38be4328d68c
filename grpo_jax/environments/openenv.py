"""Environments of OpenEnv in this process, without a server; tested with 0.10.0.

https://github.com/huggingface/OpenEnv. Nothing of it is imported here: the caller's
environments do that. It is in no extra, because it needs a web server and user
interfaces.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from grpo_jax.environments.base import Step, TextEnvironment

# Fields of every observation or action, which are not what it says.
_COMMON = {"done", "reward", "metadata"}


class _Environment(Protocol):
    """What is used of `openenv.core.env_server.interfaces.Environment`."""

    def reset(self, *, seed: int, **columns: Any) -> Any:
        """The first observation."""
        ...

    def step(self, action: Any) -> Any:
        """The observation after an action, with reward and done."""
        ...

    def close(self) -> Any:
        """Free what it holds."""
        ...


def openenv_environment(
    make: Callable[[], _Environment],
    *,
    action: type[Any] | None = None,
    to_action: Callable[[str], Any] | None = None,
    to_text: Callable[[Any], str] | None = None,
    columns: Sequence[str] = (),
) -> Callable[[], TextEnvironment]:
    """Returns a factory of environments that play those of `make` in this process.

    Each instance makes one environment and resets it for each episode. Rewards of the
    observations are added up. A text that is no valid action costs a turn: the policy
    reads what is wrong with it, and has the reward 0.0 for the turn. The seed goes to
    `reset`: an environment is deterministic if it follows it, and many ignore it.

    Args:
      make: the class of the environment, or what else makes one.
      action: the class of its actions. If a text is all that one needs, it is the
        policy's turn; else the turn must be JSON with the fields of an action.
      to_action: makes the action of a turn, in place of `action`; raises `ValueError`
        for a text that is no action.
      to_text: makes the text of an observation. By default it is the text of its only
        field besides done, reward and metadata, else JSON of those fields.
      columns: of the row, which go to `reset` by name.

    Raises:
      ValueError: unless exactly one of `action` and `to_action` is given.
    """
    if action is not None and to_action is None:
        to_action = functools.partial(_action_of, action)
    elif action is not None or to_action is None:
        raise ValueError(
            "give either the class of the actions, action=..., or a function from the "
            "policy's text to an action, to_action=..."
        )
    return functools.partial(OpenEnv, make, to_action, to_text or _text_of, columns)


class OpenEnv(TextEnvironment):
    """One episode after the other; made by `openenv_environment`."""

    def __init__(
        self,
        make: Callable[[], _Environment],
        to_action: Callable[[str], Any],
        to_text: Callable[[Any], str],
        columns: Sequence[str] = (),
    ) -> None:
        self._environment = make()
        self._to_action, self._to_text = to_action, to_text
        self._columns = tuple(columns)

    def reset(self, *, seed: int, **row: Any) -> str:
        """Begin an episode; returns the text of the first observation."""
        chosen = {name: row[name] for name in self._columns}
        observation = self._environment.reset(seed=seed, **chosen)
        if observation.done:
            raise ValueError(
                f"{type(self._environment).__name__} was over at its reset: there is "
                "nothing to play."
            )
        return self._to_text(observation)

    def step(self, text: str) -> Step:
        """Take the action that the text stands for."""
        try:
            action = self._to_action(text)
        except ValueError as error:
            return Step(f"This is not a valid action: {_summary(error)}", 0.0)
        observation = self._environment.step(action)
        reward = observation.reward
        return Step(
            "" if observation.done else self._to_text(observation),
            None if reward is None else float(reward),
            bool(observation.done),
        )

    def close(self) -> None:
        """Close the environment; nothing can be played with this one any more."""
        self._environment.close()


def _action_of(kind: type[Any], text: str) -> Any:
    """The action that a text stands for; a `ValueError` says what is wrong with it."""
    fields = {k: field for k, field in kind.model_fields.items() if k not in _COMMON}
    required = [name for name, field in fields.items() if field.is_required()]
    only = required or list(fields)
    if len(only) == 1 and fields[only[0]].annotation is str:
        return kind(**{only[0]: text})
    return kind.model_validate_json(text.strip())


def _text_of(observation: Any) -> str:
    fields = observation.model_dump(mode="json", exclude=_COMMON)
    values = list(fields.values())
    if len(values) == 1 and isinstance(values[0], str):
        return values[0]
    return json.dumps(fields)


def _summary(error: ValueError) -> str:
    """The message in one line, without the links that pydantic adds."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if not line.startswith("For further"))
