"""Rotary position embeddings: their settings, frequencies, tables and application.

Su et al. 2021, "RoFormer", https://arxiv.org/abs/2104.09864, in the half-split
convention of Hugging Face, where dimension i is paired with i + h/2. Tables are
float32, computed from positions, and never stored with the parameters.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.models import _frequencies

# The fields that each kind uses, which are also their keys in config.json.
SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
    ),
    "longrope": (
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One rotary setting: a base and the way its frequencies are stretched.

    Raises:
        ValueError: an unknown kind, or a number that the kind needs is missing.
    """

    theta: float  # base of the geometric series of frequencies
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float | None = None  # how much longer than trained (not longrope)
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    original_max_position_embeddings: int | None = None  # trained length, in tokens
    attention_factor: float | None = None  # multiplies what is rotated (yarn, longrope)
    beta_fast: float | None = None  # turns above which a pair is kept (yarn)
    beta_slow: float | None = None  # turns below which it is stretched (yarn)
    short_factor: tuple[float, ...] | None = None  # divisor of each pair (longrope)
    long_factor: tuple[float, ...] | None = None  # beyond the trained length (longrope)
    extended: int | None = None  # tokens that the long factors serve (longrope)
    # Queries at position p are multiplied by 1 + query_beta log(1 + p // trained).
    query_beta: float | None = None

    def __post_init__(self):
        if self.kind not in SCALING_KEYS:
            raise ValueError(
                f"rope_type {self.kind!r} is not supported; expected one of "
                f"{sorted(SCALING_KEYS)}"
            )
        if not self.theta > 0 or (self.kind == "yarn" and self.theta == 1):
            raise ValueError(f"rope_theta must be positive, got {self.theta}")
        needed = self.scaling()
        if self.query_beta is not None:
            trained = self.original_max_position_embeddings
            needed |= {"original_max_position_embeddings": trained}
        for name, value in needed.items():
            numbers = value if isinstance(value, tuple) else (value,)
            if any(number is None or not number > 0 for number in numbers):
                raise ValueError(
                    f"rope_type {self.kind!r} needs a positive {name}, got {value}"
                )

    @property
    def context(self) -> int | None:
        """Tokens up to which a sequence has one function, None for any length.

        Longrope has other frequencies for all positions of a longer sequence, so those
        of a completion would change while it is sampled.
        """
        if self.short_factor == self.long_factor:
            return None
        return self.original_max_position_embeddings

    def scaling(self) -> dict[str, Any]:
        """Returns the numbers that this kind of scaling uses, by Hugging Face name."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in SCALING_KEYS[self.kind]}


class Rotary(NamedTuple):
    """What turns queries and keys by their positions, of one setting or of R.

    `queries` is what multiplies queries beside; None multiplies by 1.
    """

    cosines: Float[Array, "*R N S r"]
    sines: Float[Array, "*R N S r"]
    queries: Float[Array, "*R N S"] | None = None


def inverse_frequencies(rope: RopeConfig, *, head_dim: int) -> np.ndarray:
    """Returns the h/2 angular frequencies, in radians per token, as float32.

    w_i = theta^(-2i/h), stretched as the kind says. Of a head that rotates in part, h
    is the number of dimensions that rotate.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = rope.theta**-exponents
    numbers = rope.scaling()
    numbers.pop("attention_factor", None)  # of the tables
    match rope.kind:
        case "linear":
            frequencies = frequencies / numbers["factor"]
        case "llama3":
            frequencies = _frequencies.llama3(frequencies, **numbers)
        case "yarn":
            frequencies = _frequencies.yarn(frequencies, rope.theta, **numbers)
        case "longrope":
            # No sequence is longer than `context`.
            frequencies = frequencies / np.asarray(numbers["short_factor"])
    return frequencies.astype(np.float32)


def rotary_tables(
    positions: Int[Array, "N S"],
    settings: Sequence[RopeConfig | None],
    *,
    head_dim: int,
) -> Rotary:
    """Returns cosines and sines of every setting at every position, float32.

    A setting of None is the identity rotation: all its frequencies are 0. An attention
    factor multiplies both.
    """
    zero = np.zeros(head_dim // 2, np.float32)
    frequencies = np.stack(
        [
            zero if rope is None else inverse_frequencies(rope, head_dim=head_dim)
            for rope in settings
        ]
    )
    # No matrix product: an accelerator would round its factors.
    places = positions.astype(jnp.float32)[None, :, :, None]
    angles = places * frequencies[:, None, None, :]
    factors = [rope.attention_factor if rope else None for rope in settings]
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    if any(factors):
        factor = jnp.asarray([x or 1.0 for x in factors])[:, None, None, None]
        cosines, sines = factor * cosines, factor * sines
    return Rotary(cosines, sines, _query_scales(positions, settings))


def apply_rotary(
    x: Float[Array, "N S H h"], rotary: Rotary, *, neighbors: bool
) -> Float[Array, "N S H h"]:
    """Returns x with dimensions i and i + r rotated by the angle of frequency i.

    r is the number of frequencies. With `neighbors` the pairs are 2 i and 2 i + 1.
    Dimensions from 2 r on stay as they are. Computed in float32 and returned in the
    dtype of x.
    """
    cosines, sines = rotary.cosines[:, :, None, :], rotary.sines[:, :, None, :]
    pairs = cosines.shape[-1]
    wide, rest = jnp.split(x.astype(jnp.float32), [2 * pairs], axis=-1)
    if neighbors:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    rotated = [first * cosines - second * sines, second * cosines + first * sines]
    join = jnp.stack if neighbors else jnp.concatenate
    turned = join(rotated, axis=-1).reshape(wide.shape)
    return jnp.concatenate([turned, rest], axis=-1).astype(x.dtype)


def _query_scales(
    positions: Int[Array, "N S"], settings: Sequence[RopeConfig | None]
) -> Float[Array, "R N S"] | None:
    """Returns 1 + query_beta log(1 + p // trained), Llama 4's scaling by position."""
    betas = [0.0 if rope is None else rope.query_beta or 0.0 for rope in settings]
    if not any(betas):
        return None
    trained = [
        rope.original_max_position_embeddings or 1 if rope and beta else 1
        for rope, beta in zip(settings, betas, strict=True)
    ]
    # An empty slot has a negative position, whose logarithm would not be finite.
    turns = jnp.maximum(positions, 0)[None] // jnp.asarray(trained)[:, None, None]
    return 1.0 + jnp.asarray(betas)[:, None, None] * jnp.log1p(turns)
