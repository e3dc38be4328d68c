"""Metrics of a step beside those of its update: completions, rewards and speed.

All are over all processes, and do not depend on how prompts were spread over them.
"""

from collections.abc import Mapping

import numpy as np
from jax.sharding import Mesh

from grpo_jax.config import TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.utilization import Lengths, Utilization
from grpo_jax.reporting import metrics as names
from grpo_jax.rewards.metrics import reduce_metrics
from grpo_jax.rollout.rollout import Rollout


class Measures:
    """Makes the metrics of a run's steps."""

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        mesh: Mesh,
        compiles: names.CompileCounter,
    ) -> None:
        self._refills = bool(config.objective.resample_limit)
        self._utilization = Utilization(model, config, mesh)
        self._compiles = compiles

    def of_step(
        self, sampled: Rollout, kept: Rollout, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """Numbers about all that a step sampled, and ``kept/...`` of what it kept.

        Dynamic sampling keeps a part of the groups for the update; without it all are
        kept, and there are no such names.

        Args:
          seconds: ``time/...`` of the step, over all processes.
        """
        metrics, lengths = _described(sampled)
        learned = lengths
        if self._refills:
            of_kept, learned = _described(kept)
            metrics |= {f"kept/{name}": value for name, value in of_kept.items()}
        if sampled.staleness is not None:
            metrics |= _staleness(sampled, sampled.staleness)
        if sampled.played:
            metrics |= names.episode_metrics(meshes.gather_rows(sampled.played))
        tokens = float(lengths[1].sum())
        rewards, failures = meshes.gather_rows(
            (sampled.rewards_by_name, sampled.failures_by_name)
        )
        logged = meshes.gather_lists([sampled.logged])
        return {
            **metrics,
            **reduce_metrics(rewards, failures, logged),
            **self._utilization.metrics(lengths, learned, seconds),
            "tokens_per_second/rollout": tokens / seconds["time/rollout"],
            names.TOKENS_PER_SECOND: tokens / seconds["time/step"],
            **self._compiles.metrics(),
        }


def _staleness(rollout: Rollout, steps: np.ndarray) -> dict[str, float]:
    """Steps between the policy that drew a token and the one that learns from it."""
    stale, largest, tokens, carried = meshes.gather_rows(
        (
            np.sum(steps, axis=(1, 2)),
            np.max(steps, axis=(1, 2)),
            rollout.lengths.sum(axis=1),
            np.asarray(rollout.began_before),
        )
    )
    return {
        "rollout/staleness": float(stale.sum() / tokens.sum()),
        "rollout/staleness/max": float(largest.max()),
        "rollout/carried": float(np.mean(carried)),
    }


def slowest(seconds: Mapping[str, float]) -> dict[str, float]:
    """The largest of each time over all processes."""
    every = meshes.gather_lists([dict(seconds)])
    return {name: max(one[name] for one in every) for name in seconds}


def _described(rollout: Rollout) -> tuple[dict[str, float], Lengths]:
    drawn = rollout.mask.sum(axis=-1)
    prompts, lengths, drawn, finished, rewards = meshes.gather_rows(
        (
            rollout.prompt_lengths,
            rollout.lengths,
            drawn,
            rollout.finished,
            rollout.rewards,
        )
    )
    metrics = names.completion_metrics(drawn, finished) | names.reward_metrics(rewards)
    return metrics, (prompts, lengths)
