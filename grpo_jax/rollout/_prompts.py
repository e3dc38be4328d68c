"""The blocks in which the engine computes new prompts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from grpo_jax.parallel import mesh as meshes

# Tokens of a block of like lengths: enough for products at full speed.
_TOKENS = 2048
# Such blocks have at most so many widths, which are multiples of that.
_WIDTHS, _NARROWEST = 4, 64


class Block(NamedTuple):
    """Prompts that are computed at once, the same number for each part."""

    tokens: Int[np.ndarray, "A m w"]  # padded on the right with 0
    lengths: Int[np.ndarray, "A m"]
    rows: Int[np.ndarray, "A m"]  # where they are stored


def prompt_blocks(
    new: Sequence[Sequence[tuple[int, int]]],
    prompts: Sequence[Sequence[int]],
    *,
    width: int,
    most: int,
    nowhere: int,
    by_length: bool,
) -> Iterator[Block]:
    """All new prompts in one block, or in some of like lengths, the longest first.

    A prompt of one completion costs as much as the completion, and half of it may be
    padding. That of a group costs little: its programs shall be few. All processes
    make the same number of blocks, of the same shapes.

    Args:
      new: the rows of each part, with the group that each is for.
      prompts: token ids by group.
      width: to how many tokens prompts are padded where they are stored.
      most: prompts of the part with most, of all processes.
      nowhere: the row of what is only filling.
      by_length: in blocks of like lengths.
    """
    each, widths = most, [width]
    if by_length:
        each = power(max(_TOKENS // width, 1) + 1) // 2  # a power of two, not above
        new = [sorted(own, key=lambda pair: -len(prompts[pair[1]])) for own in new]
        firsts = [[len(prompts[g]) for _, g in own[::each]] for own in new]
        longest = np.zeros((len(firsts), -(-most // each)), np.int64)
        for own, lengths in zip(longest, firsts, strict=True):
            own[: len(lengths)] = lengths
        longest = meshes.gather_rows(longest).max(axis=0)
        step = -(-width // (_WIDTHS * _NARROWEST)) * _NARROWEST
        steps = np.maximum(-(-longest // step), 1)
        widths = np.minimum(steps * step, width).tolist()
    for start, wide in zip(range(0, most, each), widths, strict=True):
        parts = [own[start : start + each] for own in new]
        shape = len(parts), power(min(each, most - start))
        tokens = np.zeros((*shape, wide), np.int32)
        lengths, rows = np.ones(shape, np.int32), np.full(shape, nowhere, np.int32)
        for part, own in enumerate(parts):
            for at, (row, group) in enumerate(own):
                prompt = prompts[group]
                tokens[part, at, : len(prompt)] = prompt
                lengths[part, at], rows[part, at] = len(prompt), row
        yield Block(tokens, lengths, rows)


def power(count: int) -> int:
    """The next power of two: programs are compiled for few sizes."""
    return 1 << max(count - 1, 0).bit_length()
