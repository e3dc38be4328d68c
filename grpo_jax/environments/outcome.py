"""What playing an episode gives: replies to its turns, and a result in the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_jax.environments.base import Message

FailureKind = Literal["error", "timeout", "crash", "invalid"]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a call of a tool or an environment has no answer.

    Attributes:
      kind: "error" for an exception, "timeout" beyond a time limit, "crash" if the
        process died, "invalid" for an answer that breaks the contract.
      cause: failures of the same cause are logged once, such as "ZeroDivisionError".
      message: one line, which the policy reads if it was a tool.
      details: for the log, such as a traceback.
    """

    kind: FailureKind
    cause: str
    message: str
    details: str


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What stands after a turn of the policy.

    Attributes:
      messages: tool results in the order of the calls, or the environment's messages.
        Empty if the episode ends with the policy's turn.
      done: whether the policy gets no other turn.
    """

    messages: tuple[Message, ...] = ()
    done: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """An episode that is over.

    Attributes:
      rewards: by the names of `Host.reward_names`; NaN for no reward, which a name has
        that belongs to another class.
      failure: why the episode has no reward at all; None for a sound one.
      turns: turns of the policy that were sent.
      calls: calls of tools, failed ones included.
      failed_calls: calls whose result is an error message.
      seconds: in calls, by the name of the tool.
      environment_seconds: in the environment's reset, steps and reward.
      environment: the instance that played; None without one, and if it lives in
        another process.
    """

    rewards: Mapping[str, float]
    failure: Failure | None = None
    turns: int = 0
    calls: int = 0
    failed_calls: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    environment_seconds: float = 0.0
    environment: Any = None
