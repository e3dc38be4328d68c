"""Rotary position embeddings: their settings, frequencies, tables and application.

Su et al. 2021, "RoFormer", https://arxiv.org/abs/2104.09864, in the half-split
convention of Hugging Face: dimension i is paired with dimension i + h/2. Tables are
float32, computed from positions, and never stored with the parameters.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One rotary setting: a base and the way its frequencies are stretched.

    Raises:
        ValueError: an unknown kind, or a number that the kind needs is missing.
    """

    theta: float  # base of the geometric series of frequencies
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float | None = None  # how much longer than trained (linear, llama3)
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    original_max_position_embeddings: int | None = None  # tokens, llama3

    def __post_init__(self):
        if self.kind not in _SCALING_KEYS:
            raise ValueError(
                f"rope_type {self.kind!r} is not supported; expected one of "
                f"{sorted(_SCALING_KEYS)}"
            )
        if not self.theta > 0:
            raise ValueError(f"rope_theta must be positive, got {self.theta}")
        for name in _SCALING_KEYS[self.kind]:
            value = self.scaling()[name]
            if value is None or not value > 0:
                raise ValueError(
                    f"rope_type {self.kind!r} needs a positive {name}, got {value}"
                )

    def scaling(self) -> dict[str, Any]:
        """Returns the numbers that this kind of scaling uses, by Hugging Face name."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in _SCALING_KEYS[self.kind]}

    @classmethod
    def from_hf(
        cls, parameters: Mapping[str, Any], *, theta: float, max_positions: int
    ) -> "RopeConfig":
        """Returns the setting of a `rope_scaling` or flat `rope_parameters` entry.

        `theta` is what holds where the entry names none; `max_positions` stands in for
        an absent `original_max_position_embeddings`, as in transformers.

        Raises:
            ValueError: an unsupported `rope_type`, or a key that it does not use.
        """
        given = {key: value for key, value in parameters.items() if value is not None}
        kind = given.pop("rope_type", given.pop("type", "default"))
        given.pop("type", None)
        theta = float(given.pop("rope_theta", theta))
        partial = given.pop("partial_rotary_factor", 1.0)
        if partial != 1.0:
            raise ValueError(
                f"partial_rotary_factor {partial} is not supported; only 1.0 is"
            )
        if kind not in _SCALING_KEYS:
            raise ValueError(
                f"rope_type {kind!r} is not supported; expected one of "
                f"{sorted(_SCALING_KEYS)}"
            )
        unused = sorted(set(given) - set(_SCALING_KEYS[kind]))
        if kind == "default":
            # Old exports carry a factor of 1 and the trained length beside "default".
            unused = [key for key in unused if key not in _SCALING_KEYS["llama3"]]
            given = {}
        if unused:
            raise ValueError(f"rope_type {kind!r} does not use {unused}")
        if kind == "llama3":
            given.setdefault("original_max_position_embeddings", max_positions)
        return cls(theta=theta, kind=kind, **given)

    def to_hf(self) -> dict[str, Any] | None:
        """Returns the `rope_scaling` entry, None for unscaled frequencies."""
        if self.kind == "default":
            return None
        return {"rope_type": self.kind, **self.scaling()}


def inverse_frequencies(rope: RopeConfig, *, head_dim: int) -> np.ndarray:
    """Returns the h/2 angular frequencies, in radians per token, as float32.

    w_i = theta^(-2i/h). "linear" divides all by the factor (Chen et al. 2023,
    https://arxiv.org/abs/2306.15595). "llama3" divides those whose wavelength exceeds
    original/low_freq_factor, keeps those below original/high_freq_factor, and
    interpolates between (Llama 3.1, https://arxiv.org/abs/2407.21783, section 3.4.3).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = rope.theta**-exponents
    match rope.kind:
        case "linear":
            frequencies = frequencies / rope.scaling()["factor"]
        case "llama3":
            frequencies = _llama3_frequencies(frequencies, **rope.scaling())
    return frequencies.astype(np.float32)


def cosines_and_sines(
    positions: Int[Array, "N S"],
    settings: Sequence[RopeConfig | None],
    *,
    head_dim: int,
) -> tuple[Float[Array, "R N S h2"], Float[Array, "R N S h2"]]:
    """Returns cosines and sines of every setting at every position, float32.

    A setting of None is the identity rotation: all its frequencies are 0.
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
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(
    x: Float[Array, "N S H h"],
    cosines: Float[Array, "N S h2"],
    sines: Float[Array, "N S h2"],
) -> Float[Array, "N S H h"]:
    """Returns x with dimensions i and i + h/2 rotated by the angle of frequency i.

    Computed in float32 and returned in the dtype of x.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosines, sines = cosines[:, :, None, :], sines[:, :, None, :]
    rotated = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _llama3_frequencies(
    frequencies: np.ndarray,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    # turns: how often the pair rotates within the context it was trained on.
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return frequencies * (smooth + (1.0 - smooth) / factor)
