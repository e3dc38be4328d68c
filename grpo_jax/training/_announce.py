"""The lines that a run shows before its first step."""

from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from grpo_jax.config import EMBEDDED
from grpo_jax.models.decoder import abstract_params
from grpo_jax.tasks.arithmetic import unknown_to_embedded
from grpo_jax.tasks.base import Task, describe_held_out
from grpo_jax.training._policy import Policy


def describe_run(policy: Policy, task: Task, mesh: Mesh, place: Path | str) -> str:
    """Model, devices, rows, the work of a step and the folder, in one line."""
    config, devices = policy.config, mesh.devices.flat
    trained, base = _count(policy.params), 0
    if policy.base is not None:
        # Stored in 4 bits it has two parameters in a number, and scales beside them.
        base = _count(abstract_params(policy.model))
    adapters = f", {_millions(trained)} of them in adapters" if base else ""
    return (
        f"{config.model}, {_millions(base + trained)} parameters{adapters}, on "
        f"{mesh.size} x {devices[0].device_kind}; {task.name}, {len(task.train):,} "
        f"rows, {describe_held_out(task)}; a step: {config.prompts_per_step} prompts x "
        f"{config.group_size} completions of up to {config.max_new_tokens} "
        f"tokens; in {place}"
    )


def describe_resumed(step: int, steps: int) -> str:
    """Where a run goes on, or that nothing is left of it."""
    done = "; nothing is left to train, another run_dir starts anew"
    return f"resumed from step {step} of {steps}{done if step >= steps else ''}"


def warnings(policy: Policy, task: Task, *, plays: bool = False) -> Iterator[str]:
    """Warnings about memory, settings without effect, and prompts of another kind.

    Args:
      plays: whether there are tools or environments, which may bring prompts.
    """
    if policy.warning is not None:
        yield policy.warning
    yield from policy.config.objective.without_effect()
    if policy.config.model != EMBEDDED or plays:
        return
    prompts = [row["prompt"] for rows in (task.train, task.test) for row in rows]
    if text := unknown_to_embedded(prompts):
        yield f"{text} A model can learn only what it samples at times."


def _count(arrays: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(arrays))


def _millions(count: int) -> str:
    millions = count / 1e6
    return f"{millions:,.0f}M" if millions >= 100 else f"{millions:.3g}M"
