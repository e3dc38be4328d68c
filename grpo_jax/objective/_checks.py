"""Checks of shapes, dtypes, numbers and choices, made before anything compiles.

Each raises ValueError naming the argument, what was given and what was expected. No
value in an array that may be traced is read.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Shaped


def require_array(name: str, array: Any) -> None:
    """Raise ValueError unless `array` is an array of real numbers or booleans."""
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise ValueError(f"{name} is {_described(array)}, expected an array.")
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise ValueError(f"{name} has dtype {array.dtype}, expected real numbers.")


def require_shape(
    name: str, array: Shaped[Array, "..."], expected: tuple[int, ...], *, like: str
) -> None:
    """Raise ValueError unless `array` has the expected shape, which `like` explains."""
    require_array(name, array)
    if array.shape != expected:
        raise ValueError(
            f"{name} has shape {array.shape}, expected {expected}: {like}."
        )


def require_rank(name: str, array: Shaped[Array, "..."], *, axes: str) -> None:
    """Raise ValueError unless `array` has at least the trailing axes named."""
    require_array(name, array)
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
    require_array(name, mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"{name} has dtype {mask.dtype}, expected bool: write `{name} > 0`."
        )
    require_shape(name, mask, expected, like=like)


def require_choice(name: str, given: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless `given` is one of the choices."""
    if not isinstance(given, str) or given not in choices:
        raise ValueError(
            f"{name} is {_described(given)}, expected one of {', '.join(choices)}."
        )


def require_flag(name: str, given: Any) -> None:
    """Raise ValueError unless `given` is True or False."""
    if not isinstance(given, bool):
        raise ValueError(f"{name} is {_described(given)}, expected True or False.")


def require_whole(name: str, given: Any, *, meaning: str) -> None:
    """Raise ValueError unless `given` is an integer above 0; `meaning` says of what."""
    value = _plain(name, given)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1:
        _refuse_number(name, given, "an integer above 0", meaning)


def require_number(
    name: str,
    given: Any,
    *,
    meaning: str,
    above: float | None = None,
    at_least: float | None = None,
) -> None:
    """Raise ValueError unless `given` is a finite number within its bound.

    `meaning` says what it is. Numbers are those of Python and NumPy, and arrays without
    axes; one that is traced is refused, as programs are compiled for its value.
    """
    value = _plain(name, given)
    real = isinstance(value, int | float) and not isinstance(value, bool)
    expected, fits = "a finite number", real and math.isfinite(value)
    if above is not None:
        expected, fits = f"a finite number above {above}", fits and value > above
    if at_least is not None:
        expected, fits = (
            f"a finite number of at least {at_least}",
            fits and value >= at_least,
        )
    if not fits:
        _refuse_number(name, given, expected, meaning)


def check_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    """Raise ValueError, by name, for bounds that `clipped_surrogate` cannot use."""
    distance = "a distance from a ratio of 1"
    require_number("clip_low", clip_low, at_least=0, meaning=distance)
    require_number("clip_high", clip_high, at_least=0, meaning=distance)
    if dual_clip is not None:
        require_number(
            "dual_clip", dual_clip, above=1, meaning="the largest ratio where A < 0"
        )


def check_cap(name: str, cap: float) -> None:
    """Raise ValueError unless the largest weight is above 0; `name` is the caller's."""
    require_number(name, cap, above=0, meaning="the largest ratio, as 2.0 or 5.0")


def _plain(name: str, given: Any) -> Any:
    """The number in an array without axes; anything else as it is."""
    if isinstance(given, Tracer):
        raise ValueError(
            f"{name} is traced, expected a number that is known when the program is "
            "compiled: make it a static argument, or close over it."
        )
    return given.item() if getattr(given, "shape", None) == () else given


def _refuse_number(name: str, given: Any, expected: str, meaning: str) -> None:
    raise ValueError(f"{name} is {_described(given)}, expected {expected}: {meaning}.")


def _described(given: Any) -> str:
    """A value, or only its type where its text might be long."""
    short = given is None or isinstance(given, str | numbers.Number)
    return repr(given) if short else f"of type {type(given).__name__}"
