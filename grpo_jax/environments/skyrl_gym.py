"""Environments of SkyRL-Gym, https://github.com/NovaSky-AI/SkyRL; tested with 0.4.0.

The registered ones need the extra `environments`.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from grpo_jax.environments.base import Message, Step, TextEnvironment


class _BaseTextEnv(Protocol):
    """What is used of `skyrl_gym.envs.base_text_env.BaseTextEnv`."""

    def init(self, prompt: Any) -> tuple[Any, Any]:
        """The messages that the policy reads first, and metadata."""
        ...

    def step(self, action: str) -> Any:
        """A mapping with observations, reward and done."""
        ...

    def close(self) -> Any:
        """Free what it holds."""
        ...


def skyrl_gym_environment(
    make: str | Callable[..., _BaseTextEnv],
    *,
    env_config: Any = None,
    max_turns: int | None = None,
) -> Callable[[], TextEnvironment]:
    """Returns a factory of environments that play those of SkyRL-Gym.

    Each episode makes a new one. Its messages take the place of the prompt, its rewards
    are added up, and `postprocessed_action` is ignored: what the policy sampled stays
    in the conversation as it was sampled. Nothing of the package is seeded: an
    environment is deterministic if its own code is, given the row and the seed.

    Args:
      make: a registered name, such as "gsm8k_multi_turn", whose environment gets the
        columns of the row as `extras` ("reward_spec" and what else it asks for); or a
        callable `make(*, seed, **row)` that returns the environment of an episode.
      env_config: of a registered environment, a `DictConfig` or what else it takes.
      max_turns: of a registered environment; None for its own limit.

    Raises:
      ValueError: for a name that is not registered.
    """
    if not isinstance(make, str):
        if env_config is not None or max_turns is not None:
            raise ValueError(
                "env_config and max_turns belong to a registered environment; a "
                "callable that makes environments gives them itself."
            )
        return functools.partial(SkyRLGym, make)
    registry = _library().envs.registration.registry
    if make not in registry:
        raise ValueError(
            f"skyrl_gym has no environment {make!r}; it has "
            f"{', '.join(sorted(registry))}. Register yours, or give a callable."
        )
    registered = functools.partial(_registered, make, env_config, max_turns)
    return functools.partial(SkyRLGym, registered)


class SkyRLGym(TextEnvironment):
    """One episode after the other; made by `skyrl_gym_environment`."""

    def __init__(self, make: Callable[..., _BaseTextEnv]) -> None:
        self._make = make
        self._environment: _BaseTextEnv | None = None

    def reset(self, *, seed: int, **row: Any) -> Sequence[Message] | None:
        """Begin an episode; returns None where the environment keeps the prompt."""
        self.close()
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, str):
            messages = copy.deepcopy(list(prompt))  # it may change what it gets
        before = copy.deepcopy(messages)
        self._environment = self._make(seed=seed, **row)
        opening, _ = self._environment.init(messages)
        return None if opening == before else copy.deepcopy(list(opening))

    def step(self, text: str) -> Step:
        """Answer a turn; the environment is closed at the end of the episode."""
        if self._environment is None:
            raise RuntimeError("the episode is over, or has not begun: call reset.")
        answer = self._environment.step(text)
        done = bool(answer["done"])
        if done:
            self.close()
        observations = copy.deepcopy(list(answer["observations"]))
        reward = answer["reward"]
        return Step(observations, None if reward is None else float(reward), done)

    def close(self) -> None:
        """Close the environment of an episode that was cut off, if there is one."""
        environment, self._environment = self._environment, None
        if environment is not None:
            environment.close()


def _registered(
    name: str,
    env_config: Any,
    max_turns: int | None,
    *,
    seed: int,
    **row: Any,
) -> _BaseTextEnv:
    extras = copy.deepcopy(row)
    if max_turns is not None:
        extras["max_turns"] = max_turns
    return _library().make(name, env_config=env_config, extras=extras)


def _library() -> Any:
    try:
        import skyrl_gym
    except ImportError as error:
        raise ValueError(
            "registered environments of SkyRL-Gym need the skyrl-gym library: "
            "pip install 'grpo-jax[environments]'."
        ) from error
    return skyrl_gym
