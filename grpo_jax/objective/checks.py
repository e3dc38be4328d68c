"""Checks of static shapes, dtypes and choices, made before anything compiles.

Each raises ValueError naming the argument, what was given and what was expected.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def require_shape(
    name: str, array: Shaped[Array, "..."], expected: tuple[int, ...], *, like: str
) -> None:
    """Raise ValueError unless `array` has the expected shape, which `like` explains."""
    if array.shape != expected:
        raise ValueError(
            f"{name} has shape {array.shape}, expected {expected}: {like}."
        )


def require_rank(name: str, array: Shaped[Array, "..."], *, axes: str) -> None:
    """Raise ValueError unless `array` has at least the trailing axes named."""
    if array.ndim < len(axes.split()):
        raise ValueError(
            f"{name} has shape {array.shape}, expected at least the axes [{axes}]."
        )


def require_mask(
    name: str,
    mask: Shaped[Array, "..."],
    expected: tuple[int, ...],
    *,
    like: str,
) -> None:
    """Raise ValueError unless `mask` is boolean and has the expected shape."""
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"{name} has dtype {mask.dtype}, expected bool: write `{name} > 0`."
        )
    require_shape(name, mask, expected, like=like)


def require_choice(name: str, given: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `given` is one of the choices."""
    if given not in choices:
        raise ValueError(f"{name} is {given!r}, expected one of {', '.join(choices)}.")


def require_positive(name: str, given: float, *, meaning: str) -> None:
    """Raise ValueError unless the number is above 0; `meaning` says what it is."""
    if not given > 0:
        raise ValueError(f"{name} is {given}, expected a number above 0: {meaning}.")
