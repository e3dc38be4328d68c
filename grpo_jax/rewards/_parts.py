"""The outcomes of a function for the parts of a batch, as its outcome for the batch."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.rewards._convention import Outcome


def joined(parts: Sequence[Outcome]) -> Outcome:
    """What the function would have said of the whole batch, in the order of the parts.

    Where it logged a column for some parts only, the others have None.
    """
    if len(parts) == 1:
        return parts[0]
    sizes = [len(part.rewards) for part in parts]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    columns = dict.fromkeys(name for part in parts for name in part.extra)
    return Outcome(
        rewards=np.concatenate([part.rewards for part in parts]),
        extra={
            name: [
                value
                for part, size in zip(parts, sizes, strict=True)
                for value in part.extra.get(name, [None] * size)
            ]
            for name in columns
        },
        metrics={
            name: _numbers([part.metrics.get(name, []) for part in parts], parts)
            for name in dict.fromkeys(name for part in parts for name in part.metrics)
        },
        failed={
            start + number: failure
            for start, part in zip(starts, parts, strict=True)
            for number, failure in part.failed.items()
        },
    )


def _numbers(given: Sequence[list[float]], parts: Sequence[Outcome]) -> list[float]:
    """A metric's values for the batch, from those of its parts, which are means.

    One call with the whole batch logs a single mean over it. If a completion fails,
    each completion is called alone, and has a value of its own.
    """
    sizes = [len(part.rewards) for part in parts]
    counts = {len(values) for values in given}
    if len(counts) == 1 and not any(part.failed for part in parts):
        return np.average(np.array(given), axis=0, weights=sizes).tolist()
    values: list[float] = []
    for own, part, size in zip(given, parts, sizes, strict=True):
        values += own if part.failed else own * size
    return values
