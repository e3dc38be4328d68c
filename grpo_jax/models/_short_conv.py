"""Short gated convolutions: layers that see a few tokens back, and no others.

Those of LFM2 (transformers 5.24, `Lfm2ShortConv`): y = o(c * conv(b * x)), where b, c
and x are projections of the layer's input. The state is the last inputs of the
convolution. It has the form of a delta net's, with a memory that stays 0.
"""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from grpo_jax.models._conv import convolved, convolved_in_rows, with_state
from grpo_jax.models.cache import MixerState


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """Layers that have a short convolution in the place of attention.

    Raises:
        ValueError: a size that is not positive, groups that do not divide, no such
            layer, or no layer with attention.
    """

    layers: tuple[bool, ...]  # which layers they are
    channels: int  # features that are convolved, each on its own
    groups: int  # K, parts of them that devices can share
    kernel: int  # c, tokens that the convolution sees, itself among them

    part = "conv"  # the name of its parameters
    memory_size = 0  # numbers that tokens are multiplied with

    def __post_init__(self):
        sizes = {"channels": self.channels, "groups": self.groups}
        sizes |= {"kernel": self.kernel - 1}
        wrong = [name for name, size in sizes.items() if size < 1]
        if wrong:
            raise ValueError(
                f"convolutions need positive channels and groups, and a kernel of at "
                f"least 2; wrong: {', '.join(wrong)}"
            )
        if self.channels % self.groups:
            raise ValueError(
                f"channels {self.channels} must be a multiple of groups {self.groups}"
            )
        if all(self.layers) or not any(self.layers):
            raise ValueError(
                "convolutions need a layer of each kind, one with attention and one "
                f"without; got {self.layers}"
            )

    @property
    def projected(self) -> int:
        """Features of all projections of a token, in and out."""
        return 4 * self.channels

    def state_bytes(self, item: int) -> int:
        """Returns the bytes of all layers' states of one sequence.

        Args:
            item: those of a number in the compute dtype.
        """
        recent = item * (self.kernel - 1) * self.channels
        return sum(self.layers) * (4 * self.groups + recent)

    def of_device(self, parts: int) -> "ConvConfig":
        """Returns the channels of one of `parts` devices that share them."""
        groups, each = -(-self.groups // parts), self.channels // self.groups
        return dataclasses.replace(self, groups=groups, channels=groups * each)


@struct.dataclass
class ConvInputs:
    """What a layer makes of each token on its own."""

    channels: Float[Array, "R S K w"]  # inputs of the convolution
    kernel: Float[Array, "c K w"]  # the newest token last


def empty_state(config: ConvConfig, rows: int, dtype: str) -> MixerState:
    """Returns the state of one layer before the first token."""
    tail = (config.groups, config.kernel - 1, config.channels // config.groups)
    return MixerState(
        # One number, as no reshape can infer an axis of an array of size 0.
        memory=jnp.zeros((rows, config.groups, 1, 1), jnp.float32),
        recent=jnp.zeros((rows, *tail), dtype),
    )


def advance(
    inputs: ConvInputs,
    state: MixerState,
    counts: Int[Array, " R"] | None,
    *,
    config: ConvConfig,
) -> tuple[Float[Array, "R S K w"], MixerState]:
    """Returns the convolution at each token, float32, and the state after them.

    Only the first `counts` tokens of a row are real. None: all are.
    """
    tokens, recent = with_state(inputs.channels, state.recent, counts)
    out = convolved(tokens, inputs.kernel)
    return out, MixerState(memory=state.memory, recent=recent)


def answers_in_rows(
    inputs: ConvInputs,
    state: MixerState,
    index: Int[Array, "R S"],
    *,
    config: ConvConfig,
) -> Float[Array, "R S K w"]:
    """Returns the convolution in rows with sequences behind each other.

    Each sequence of a row starts from the row's `state`. `index` is a token's number in
    its sequence.
    """
    return convolved_in_rows(inputs.channels, state.recent, inputs.kernel, index)
