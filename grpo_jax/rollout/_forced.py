"""Tokens that a completion is given: they are fed like drawn ones, and not drawn.

Few of them go through the loop, a token at each turn, while other slots draw. Many are
run at once between two loops (`rollout._extend`).
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

# A slot that is given more than this is extended between two loops.
SHORT = 16


class Forced(struct.PyTreeNode):
    """The tokens that a loop gives to completions, of each the first `count`.

    Attributes:
      first: which own token the first of them is.
    """

    tokens: Int[Array, "A S F"]
    first: Int[Array, "A S"]
    count: Int[Array, "A S"]

    def at(self, index: Int[Array, "A S"]) -> Int[Array, "A S"]:
        """The own token `index` of each completion; -1 where it is drawn."""
        at = index - self.first
        clipped = jnp.clip(at, 0, self.tokens.shape[-1] - 1)[..., None]
        tokens = jnp.take_along_axis(self.tokens, clipped, axis=-1)[..., 0]
        return jnp.where(at < self.count, tokens, -1)


def width(most: int, *, turns: int) -> int:
    """How many given tokens a loop of `turns` tokens takes along, F; 0 for none."""
    if not most:
        return 0
    return min(SHORT, turns) if most <= SHORT else turns
