"""Tells who waits for them of groups that have ended, while others are still drawn."""

from collections.abc import Callable, Sequence

import numpy as np

from grpo_jax.rollout._engine import Engine
from grpo_jax.rollout.encoding import unpad
from grpo_jax.rollout.sampler import Completions

# Receives the number of a prompt and the token ids of its completions.
Told = Callable[[int, list[list[int]]], None]


def draw_all(
    engine: Engine, groups: Sequence[int], *, group_size: int, ended: Told | None
) -> None:
    """Turn the engine until all groups have ended, and tell of each that has.

    Args:
      groups: the engine's numbers of all prompts; `ended` is told their places in it.
    """
    numbers = {group: number for number, group in enumerate(groups)}
    missing = dict.fromkeys(groups, group_size)
    while (some := engine.turn(sum(missing.values()))) is not None:
        for group, _ in some:
            missing[group] -= 1
            if ended is not None and not missing[group]:
                own = engine.drawn.of(group)
                tokens, lengths = engine.drawn.tokens[own], engine.drawn.lengths[own]
                ended(numbers[group], *unpad(tokens[None], lengths[None]))


def tell(
    batch: Completions, ended: Told | None, *, first: int, rows: int, count: int
) -> None:
    """Tell of the groups of a batch, all of which have ended.

    Args:
      batch: ``[A, n, G, ...]`` of A parts with `rows` prompts each, from `first` on.
      count: of the prompts; the rows behind them are filling.
    """
    if ended is None:
        return
    tokens, lengths = np.asarray(batch.tokens), np.asarray(batch.lengths)
    for part in range(len(lengths)):
        ids = unpad(tokens[part], lengths[part])
        for number, group in enumerate(ids, part * rows + first):
            if number < count:
                ended(number, group)
