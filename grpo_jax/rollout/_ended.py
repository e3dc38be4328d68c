"""Tells who waits for them of groups that have ended, while others are still drawn."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout._engine import Ended, Engine
from grpo_jax.rollout.encoding import unpad
from grpo_jax.rollout.sampler import Completions
from grpo_jax.rollout.turns import Answer, Turns

# Receives the number of a prompt and the token ids of its completions.
Told = Callable[[int, list[list[int]]], None]


def draw_all(
    engine: Engine,
    groups: Sequence[int],
    *,
    group_size: int,
    ended: Told | None,
    turns: Turns | None,
) -> None:
    """Turn the engine until all groups have ended, and tell of each that has.

    Args:
      groups: the engine's numbers of all prompts; `ended` is told their places in it.
      turns: asked of each completion whether it goes on.
    """
    numbers = {group: number for number, group in enumerate(groups)}
    missing = dict.fromkeys(groups, group_size)

    def over(group: int) -> None:
        missing[group] -= 1
        if ended is not None and not missing[group]:
            own = engine.drawn.of(group)
            tokens, lengths = engine.drawn.tokens[own], engine.drawn.lengths[own]
            ended(numbers[group], *unpad(tokens[None], lengths[None]))

    while True:
        some = engine.turn(sum(missing.values()))
        if turns is None:
            done = [group for group, _ in some or ()]
            goes_on = some is not None
        else:
            answers = _ask(engine, turns, some, numbers)
            done = [groups[one.number] for one in answers if one.tokens is None]
            # The engine may have had nothing to draw on any process. It goes on, on
            # all of them, with what any of them has fed.
            fed = np.array([len(answers) - len(done)])
            goes_on = some is not None or bool(meshes.gather_rows(fed).any())
        for group in done:
            over(group)
        if not goes_on:
            return


def _ask(
    engine: Engine,
    turns: Turns,
    some: list[Ended] | None,
    numbers: Mapping[int, int],
) -> list[Answer]:
    """Tell of completions that have ended a turn, and feed what answers there are."""
    groups = {number: group for group, number in numbers.items()}
    for group, sample in some or ():
        own = engine.drawn.of(group).start + sample
        ids = engine.drawn.tokens[own, : engine.drawn.lengths[own]].tolist()
        turns.ended(numbers[group], sample, ids)
    answers = turns.answers(wait=some is None)
    for number, sample, tokens in answers:
        if tokens is not None:
            engine.feed(Ended(groups[number], sample), tokens)
    return answers


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
