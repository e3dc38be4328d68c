"""The order in which rows are visited: one integer says where a run stands.

Each pass over the rows is a permutation drawn from (seed, pass), so a position is found
without replaying what came before, and is the same on every process.
"""

import functools

import numpy as np


def rows_at(position: int, count: int, *, size: int, seed: int) -> list[int]:
    """The row numbers at `count` positions of the endless order, from `position` on.

    Position p lies in pass p // size; every pass visits each of the `size` rows once.
    """
    return [
        int(_permutation(seed, p // size, size)[p % size])
        for p in range(position, position + count)
    ]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(size)
