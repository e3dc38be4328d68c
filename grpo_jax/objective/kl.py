"""Per-token estimators of KL(policy || reference), in nats and float32."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.objective import _checks

KlEstimator = Literal["k1", "k2", "k3"]

# exp(20) = 4.9e8. Beyond it k3 is constant, so that no value or gradient overflows.
MAX_LOG_RATIO = 20.0


def kl_estimate(
    logp: Float[Array, "*B T"],
    ref_logp: Float[Array, "*B T"],
    *,
    kind: KlEstimator = "k3",
) -> Float[Array, "*B T"]:
    """Estimate in nats, from tokens drawn from the policy, of KL(policy || reference).

    With q = ref_logp - logp::

        k1 = -q                   unbiased, any sign
        k2 = q^2 / 2              biased, never negative
        k3 = exp(q) - q - 1       unbiased, never negative

    Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html;
    k3 is eq. 4 of DeepSeekMath, Shao et al. 2024, https://arxiv.org/abs/2402.03300.

    As a loss on tokens drawn from the policy, k1 has a gradient of zero mean and k2 the
    gradient of KL(policy || reference); k3 has that of KL(reference || policy).
    k3 is exact for q <= 20 and constant, with zero gradient, above.
    """
    _checks.require_rank("logp", logp, axes="T")
    _checks.require_shape("ref_logp", ref_logp, logp.shape, like="logp's")
    _checks.require_choice("kind", kind, ("k1", "k2", "k3"))
    q = jnp.asarray(ref_logp, jnp.float32) - jnp.asarray(logp, jnp.float32)
    match kind:
        case "k1":
            return -q
        case "k2":
            return jnp.square(q) / 2.0
        case "k3":
            return _exp_minus_tangent(jnp.minimum(q, MAX_LOG_RATIO))


def _exp_minus_tangent(q: Float[Array, "*B T"]) -> Float[Array, "*B T"]:
    """The difference exp(q) - q - 1, to float32's precision near 0 as well."""
    # Near 0 the three terms cancel, in the value and in its gradient; the Taylor series
    # to q^6 does not. Each branch is finite on the side where it is discarded.
    near = jnp.abs(q) < 0.1
    small = jnp.where(near, q, 0.0)
    inner = 1.0 + small / 3.0 * (
        1.0 + small / 4.0 * (1.0 + small / 5.0 * (1.0 + small / 6.0))
    )
    return jnp.where(near, jnp.square(small) / 2.0 * inner, jnp.expm1(q) - q)
