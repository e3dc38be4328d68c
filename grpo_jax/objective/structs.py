"""The three structs of the objective: pytrees of float32 arrays.

They have a module of their own because JAX rebuilds pytrees around placeholders, which
the shape checks of the test run would refuse.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class TokenLogprobs:
    """Log-probabilities of given tokens and, if asked for, entropies, in nats.

    `routers` are the logits of a mixture's routers, in the layout of the model's rows.
    """

    logp: Float[Array, "*B T"]
    entropy: Float[Array, "*B T"] | None
    routers: Float[Array, "L A M E"] | None = None


@struct.dataclass
class Mean:
    """A weighted mean as its two sums: parts add with `+`, and `value` divides once."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: "Mean") -> "Mean":
        """Return the mean over both parts."""
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> Float[Array, ""]:
        """Return total / weight; an empty mean is 0, with zero gradient."""
        empty = self.weight == 0.0
        # The inner where keeps the gradient finite that the outer one discards.
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1.0, self.weight))


@struct.dataclass
class LossOutput:
    """A loss to minimize and named metrics: means, which add over microbatches."""

    loss: Mean
    metrics: dict[str, Mean]
