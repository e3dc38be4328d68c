"""The only place where tokens become one number.

A mean is kept as its two sums, so that microbatches, devices and hosts add up exactly;
the published aggregations differ in these two numbers alone.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.objective import _checks
from grpo_jax.objective.structs import Mean

Aggregation = Literal["sequence_mean", "sequence_sum", "token_mean", "fixed_length"]
AGGREGATIONS = ("sequence_mean", "sequence_sum", "token_mean", "fixed_length")


def aggregate(
    values: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    mode: Aggregation,
    max_length: int | None = None,
) -> Mean:
    """Mean of per-token values over the unmasked tokens of all sequences.

    With L_i the number of unmasked tokens of sequence i, and S of sequences with any::

        "sequence_mean"  total = sum_i sum_t v_it / L_i   weight = S
            GRPO: Shao et al. 2024, eq. 3, https://arxiv.org/abs/2402.03300
        "sequence_sum"   total = sum_i sum_t v_it         weight = S
            the log-likelihood of a whole sequence
        "token_mean"     total = sum_i sum_t v_it         weight = sum_i L_i
            DAPO: Yu et al. 2025, eq. 12, https://arxiv.org/abs/2503.14476
        "fixed_length"   total = sum_i sum_t v_it         weight = S * max_length
            Dr. GRPO: Liu et al. 2025, section 3.2, https://arxiv.org/abs/2503.20783

    A sequence with no unmasked token adds nothing to total or weight. Masked entries
    may hold anything. `max_length`, in tokens, is read by "fixed_length" alone; None
    means T.
    """
    _checks.require_rank("values", values, axes="T")
    _checks.require_mask("mask", mask, values.shape, like="values'")
    _checks.require_choice("mode", mode, AGGREGATIONS)
    if max_length is not None:
        _checks.require_whole("max_length", max_length, meaning="tokens")
    values = jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)
    lengths = jnp.sum(mask, axis=-1)
    sequences = jnp.sum(lengths > 0)
    weight = sequences
    if mode == "sequence_mean":
        values /= jnp.maximum(lengths, 1)[..., None]
    elif mode == "token_mean":
        weight = jnp.sum(lengths)
    elif mode == "fixed_length":
        weight = sequences * (values.shape[-1] if max_length is None else max_length)
    return Mean(jnp.sum(values), weight.astype(jnp.float32))
