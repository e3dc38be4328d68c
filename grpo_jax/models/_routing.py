"""Mixture of experts as pure functions: which experts a token takes, and their sum.

Shazeer et al. 2017, https://arxiv.org/abs/1701.06538. No token is ever dropped, so what
becomes of it does not depend on its neighbors. `through_experts` computes what is
chosen; `through_all_experts` says the same in one line of mathematics.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

Activation = Callable[[Array], Array]
# Of rows [R, I] in blocks of so many [E] with a kernel [E, I, O] each.
BlockProduct = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in the place of every layer's MLP.

    Raises:
        ValueError: a number that is not positive, or more experts per token than exist.
    """

    count: int  # E
    per_token: int  # k, the experts that each token passes through
    width: int  # F of each expert; intermediate_size is then not used
    normalized: bool  # the weights of the k experts sum to 1

    def __post_init__(self):
        if not 0 < self.per_token <= self.count or self.width < 1:
            raise ValueError(
                "experts need a positive width and 1 to count of them per token; got "
                f"count={self.count}, per_token={self.per_token}, width={self.width}"
            )


@struct.dataclass
class Routing:
    """Which experts each token passes through, and what their outputs weigh."""

    experts: Int[Array, "R k"]  # distinct within a row
    weights: Float[Array, "R k"]  # float32


@struct.dataclass
class ExpertKernels:
    """The matrices of E gated MLPs, each plus a b where it has such factors.

    Attributes:
        adapters: a [E, I, r] and b [E, r, O] by the name of the matrix.
    """

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]
    adapters: Mapping[str, tuple[Array, Array]] = struct.field(default_factory=dict)

    def whole(self, name: str) -> Float[Array, "E I O"]:
        """Returns a matrix of all experts, with what its factors add."""
        kernel = vars(self)[name]
        if name not in self.adapters:
            return kernel
        return kernel + jnp.einsum("eir,ero->eio", *self.adapters[name])

    def of_blocks(
        self,
        name: str,
        rows: Float[Array, "R I"],
        sizes: Int[Array, " E"],
        product: BlockProduct,
    ) -> Float[Array, "R O"]:
        """Returns a matrix times rows, the first `sizes[0]` of them expert 0's."""
        out = product(rows, vars(self)[name], sizes)
        if name not in self.adapters:
            return out
        a, b = self.adapters[name]
        return out + product(product(rows, a, sizes), b, sizes)


def route(logits: Float[Array, "R E"], *, per_token: int, normalized: bool) -> Routing:
    """Returns the `per_token` likeliest experts of each token.

    The weights are their probabilities, softmax over all E logits; `normalized` divides
    them by their sum (Jiang et al. 2024, https://arxiv.org/abs/2401.04088, section
    2.1, states it as a softmax over the chosen logits, which is the same).
    """
    chosen, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), per_token)
    if normalized:
        chosen = chosen / chosen.sum(axis=-1, keepdims=True)
    return Routing(experts=experts, weights=chosen)


def through_all_experts(
    x: Float[Array, "R D"], routing: Routing, kernels: ExpertKernels, *, act: Activation
) -> Float[Array, "R D"]:
    """Returns sum_e weight_e down_e(act(gate_e(x)) * up_e(x)), every expert computed.

    The reference of `through_experts`, at E / k times its cost.
    """
    count = kernels.gate.shape[0]
    chosen = jax.nn.one_hot(routing.experts, count, dtype=jnp.float32)
    weights = jnp.einsum("rke,rk->re", chosen, routing.weights)
    gate = jnp.einsum("rd,edf->erf", x, kernels.whole("gate"))
    inner = act(gate) * jnp.einsum("rd,edf->erf", x, kernels.whole("up"))
    outer = jnp.einsum("erf,efd->erd", inner, kernels.whole("down"))
    outer = outer.astype(jnp.float32)
    return jnp.einsum("re,erd->rd", weights, outer).astype(x.dtype)


def through_experts(
    x: Float[Array, "R D"],
    routing: Routing,
    kernels: ExpertKernels,
    *,
    act: Activation,
    product: BlockProduct = jax.lax.ragged_dot,
) -> Float[Array, "R D"]:
    """Returns what `through_all_experts` does, computing the chosen experts only.

    Each row is repeated for its k experts and the copies are sorted by expert, so that
    each expert's are one block of the `product`. On a CPU XLA makes of `ragged_dot` all
    rows for each expert, masked. On a TPU that depends on libtpu; see `_tpu_experts`.
    """
    count, per_token = kernels.gate.shape[0], routing.experts.shape[-1]
    experts = routing.experts.reshape(-1)
    order = jnp.argsort(experts)
    sizes = jnp.bincount(experts, length=count).astype(jnp.int32)
    rows = _permuted(jnp.repeat(x, per_token, axis=0), order)
    gate = kernels.of_blocks("gate", rows, sizes, product)
    inner = act(gate) * kernels.of_blocks("up", rows, sizes, product)
    outer = _permuted(kernels.of_blocks("down", inner, sizes, product), _inverse(order))
    outer = outer.reshape(*routing.experts.shape, -1).astype(jnp.float32)
    return jnp.einsum("rk,rkd->rd", routing.weights, outer).astype(x.dtype)


def _permuted(rows: Float[Array, "R D"], order: Int[Array, " R"]) -> Array:
    # Saying that no row is read twice makes the gradient a permutation too, instead of
    # sums in the order in which GPU threads arrive.
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _inverse(order: Int[Array, " R"]) -> Int[Array, " R"]:
    return (
        jnp.zeros_like(order)
        .at[order]
        .set(jnp.arange(order.shape[0], dtype=order.dtype), unique_indices=True)
    )
