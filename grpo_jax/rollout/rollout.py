"""A rollout: the completions of a step, group by group, and their rewards."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.rollout.episodes import Playing
from grpo_jax.tasks.base import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """The groups of a step, on the host: a prompt with its G completions each.

    Attributes:
      rows: the N rows of the task.
      prompts: ``[N, P]`` right-padded ids; `prompt_lengths` ``[N]``.
      tokens, logp: ``[N, G, T]`` as sampled, cut to the longest completion's bucket.
      lengths, finished: ``[N, G]``.
      mask: ``[N, G, T]`` True for the tokens that the policy drew.
      staleness: ``[N, G, T]`` updates between the policy that drew a token and that of
        the step; None without carry-over, where that of the step drew all.
      began_before: ``[N]`` whether a group began in an earlier step; None alike.
      completions: a list of G per group: the texts, or with environments and a prompt
        of messages the messages that follow it.
      keep: ``[N]`` False for groups that the update leaves out.
      rewards: ``[N, G]`` weighted sums, NaN where a completion has none.
      rewards_by_name: the unweighted rewards of each function, ``[N, G]``.
      failures_by_name: on which completions a function failed, ``[N, G]``; codes of
        `reward_metrics`.
      extra: columns that reward functions logged, a list of G values per group.
      logged: numbers that reward functions logged, a value per call.
      played: what tools and environments did, ``[N, G]`` counts by name.
      playing: the episodes, until they are rewarded.
      digest: of all that tools and environments answered; "" without them.
      seconds: the time of each phase, by the name of its metric (``time/rollout``).
    """

    rows: Sequence[Row]
    prompts: Int[np.ndarray, "N P"]
    prompt_lengths: Int[np.ndarray, " N"]
    tokens: Int[np.ndarray, "N G T"]
    logp: Float[np.ndarray, "N G T"]
    lengths: Int[np.ndarray, "N G"]
    finished: Bool[np.ndarray, "N G"]
    mask: Bool[np.ndarray, "N G T"]
    completions: Sequence[Sequence[Any]]
    keep: Bool[np.ndarray, " N"]
    rewards: Float[np.ndarray, "N G"]
    staleness: Int[np.ndarray, "N G T"] | None = None
    began_before: Bool[np.ndarray, " N"] | None = None
    rewards_by_name: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    failures_by_name: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    extra: dict[str, list[list[Any]]] = dataclasses.field(default_factory=dict)
    logged: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    played: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    playing: Playing | None = None
    digest: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def records(self, step: int, advantages: np.ndarray) -> list[dict[str, Any]]:
        """One dict per completion, group by group, for people to read."""
        return [
            {
                # First, so that no column of a reward function hides a field.
                **{name: values[n][g] for name, values in self.extra.items()},
                "step": step,
                "prompt": self.rows[n]["prompt"],
                "completion": self.completions[n][g],
                "rewards": {k: v[n, g] for k, v in self.rewards_by_name.items()},
                "reward": self.rewards[n, g],
                "advantage": advantages[n, g],
                "length": int(self.mask[n, g].sum()),
                "finished": self.finished[n, g],
                **{name: values[n, g] for name, values in self.played.items()},
            }
            for n, g in np.ndindex(*self.lengths.shape)
        ]
