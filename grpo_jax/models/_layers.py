"""The parts of a decoder layer: norm, projection with an optional adapter, gated MLP.

Parameters are float32. Each part casts its own to the compute dtype where it uses them.
Kernels are two-dimensional, [in, out]. Each parameter has logical axis names.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.linen.spmd import with_logical_constraint
from jaxtyping import Array, Float, Int, PyTree

from grpo_jax.models._frozen import frozen_product
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.products import product_by_rows

KERNEL_INIT = nn.initializers.normal(0.02)
# The name of a kernel that is stored as [out, in].
_BY_ROWS = "kernel_by_rows"


class RMSNorm(nn.Module):
    """Root mean square norm: x / sqrt(mean(x^2) + eps) * (offset + scale) / divisor.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. It is computed in float32
    and returned in the dtype of x. Gemma stores scale - 1, so its offset is 1.
    """

    eps: float
    offset: float
    divisor: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns x normalized over its last axis."""
        # A new norm multiplies by 1, whatever the offset.
        init = nn.initializers.constant(1.0 - self.offset)
        scale = parameter(self, "scale", init, x.shape[-1:], ("norm",))
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normalized = wide * jax.lax.rsqrt(mean_square + self.eps)
        weight = (self.offset + scale) / self.divisor
        weight = jnp.expand_dims(weight, range(x.ndim - 1))
        return (normalized * weight).astype(x.dtype)


class Embedding(nn.Module):
    """The table of token embeddings, multiplied by `scale` on lookup."""

    vocab_size: int
    features: int
    scale: float
    dtype: str

    def setup(self):
        """Declares the table."""
        shape, axes = (self.vocab_size, self.features), ("vocab", "embed")
        self.embedding = parameter(self, "embedding", KERNEL_INIT, shape, axes)

    def __call__(
        self, tokens: Int[Array, "N S"], *, whole_table: bool = False
    ) -> Float[Array, "N S D"]:
        """Returns the scaled embeddings in the compute dtype.

        The table may be split along its width over the devices that also split the
        tokens. Then each device looks up all tokens in its columns, and each row moves
        to the device of its token. With `whole_table` the table is gathered instead. In
        a loop over few tokens XLA does that once, before the loop.
        """
        # The constraint holds for the gradient of the table as well. Without it XLA
        # splits the vocabulary in that of a tied embedding, as the head does, and
        # gathers the gradients of all rows for it, float32.
        width = None if whole_table else "embed"
        table = constrain(self.embedding, "vocab", width)
        # Padding may hold any id, even a negative one: clipped, it stays finite.
        rows = jnp.take(table, tokens, axis=0, mode="clip").astype(self.dtype)
        if not whole_table:
            rows = constrain(rows, "rows", "seq", "embed")
        rows = constrain(rows, "batch", "seq", "embed")
        # The scale is rounded to the compute dtype, as in the models' own training.
        return rows * jnp.asarray(self.scale, self.dtype)


class Projection(nn.Module):
    """A linear map x W + b, with the low-rank term of an adapter if there is one.

    With variables `a` [in, r] and `b` [r, out] in the collection `lora` it is x W + b +
    lora_scale (x a) b (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1).
    A frozen W may be quantized: see `quantized`.
    """

    in_features: int
    out_features: int
    axes: tuple[str | None, str | None]  # logical names of the kernel's axes
    use_bias: bool
    lora_scale: float | None

    def setup(self):
        """Declares the kernel and the bias."""
        shape, axes = (self.in_features, self.out_features), self.axes
        self.by_rows = self.has_variable("params", _BY_ROWS)
        self.quantized = self.has_variable("params", "codes")
        if not (self.by_rows or self.quantized):
            self.kernel = parameter(self, "kernel", KERNEL_INIT, shape, axes)
        if self.use_bias:
            zeros = nn.initializers.zeros
            self.bias = parameter(self, "bias", zeros, shape[1:], axes[1:])

    def __call__(self, x: Float[Array, "N S I"]) -> Float[Array, "N S O"]:
        """Returns the projected x, in the dtype of x."""
        # One leading axis instead of two: otherwise XLA does not recognize the gradient
        # as a matrix product, and on a CPU it takes ten times as long.
        rows = x.reshape(-1, x.shape[-1])
        if self.quantized:
            stored = (self.get_variable("params", name) for name in ("codes", "scale"))
            y = frozen_product(rows, *stored)
        elif self.by_rows:
            stored = self.get_variable("params", _BY_ROWS)
            y = product_by_rows(rows, stored.astype(x.dtype))
        else:
            y = rows @ self.kernel.astype(x.dtype)
        if self.use_bias:
            y = y + self.bias.astype(x.dtype)[None, :]
        if self.has_variable("lora", "a"):
            y = y + self._adapter(rows)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def matrix(self) -> Float[Array, "I O"]:
        """Returns the kernel, however it is stored."""
        if self.by_rows:
            return self.get_variable("params", _BY_ROWS).T
        return self.kernel

    def _adapter(self, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
        scale = checked_scale(self.lora_scale)
        a = self.get_variable("lora", "a").astype(x.dtype)
        b = self.get_variable("lora", "b").astype(x.dtype)
        return scale * ((x @ a) @ b)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)); Shazeer 2020, https://arxiv.org/abs/2002.05202."""

    config: ModelConfig

    def setup(self):
        """Declares the three projections."""
        width, inner = self.config.hidden_size, self.config.intermediate_size
        made = functools.partial(
            Projection,
            use_bias=self.config.mlp_bias,
            lora_scale=self.config.lora_scale,
        )
        self.gate = made(width, inner, ("embed", "mlp"))
        self.up = made(width, inner, ("embed", "mlp"))
        self.down = made(inner, width, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        """Returns the output of the block, without the residual."""
        inner = activation(self.gate(x), kind=self.config.activation) * self.up(x)
        inner = constrain(inner, "batch", "seq", "mlp")
        return self.down(inner)


def unrolled(variables: PyTree, split: Callable[[PyTree], Sequence]) -> PyTree:
    """Returns variables with turned kernels, and the layers as `split` takes them."""

    def arrange(name: str, tree: PyTree) -> PyTree:
        if name == "layers":
            return dict(enumerate(split(_transpose_kernels(tree))))
        return _transpose_kernels(tree) if name == "lm_head" else tree

    return {
        collection: {name: arrange(name, tree) for name, tree in trees.items()}
        for collection, trees in variables.items()
    }


def _transpose_kernels(params: PyTree) -> PyTree:
    """Returns the parameters with each kernel [..., in, out] as [..., out, in].

    `Projection` takes both; see `product_by_rows`.
    """
    flat: dict[Any, Any] = traverse_util.flatten_dict(params)
    turned = {
        (*path[:-1], _BY_ROWS): jnp.swapaxes(leaf, -1, -2)
        for path, leaf in flat.items()
        if path[-1] == "kernel"
    }
    kept = {path: leaf for path, leaf in flat.items() if path[-1] != "kernel"}
    return traverse_util.unflatten_dict(kept | turned)


def checked_scale(lora_scale: float | None) -> float:
    """Returns the scale of adapters; a ValueError if there is none."""
    if lora_scale is None:
        raise ValueError(
            "adapters were given, but ModelConfig.lora_scale is None; set it to "
            "alpha / rank with dataclasses.replace(config, lora_scale=...)"
        )
    return lora_scale


def activation(x: Float[Array, "..."], *, kind: str) -> Float[Array, "..."]:
    """Returns the nonlinearity named by `kind` (ModelConfig.activation) of x."""
    match kind:
        case "silu":
            return nn.silu(x)
        case "gelu_tanh":
            return nn.gelu(x, approximate=True)
        case "gelu":
            return nn.gelu(x, approximate=False)
    raise ValueError(f"unknown activation {kind!r}")


def constrain(x: Float[Array, "..."], *axes: str | None) -> Float[Array, "..."]:
    """Returns x with the sharding of its logical axes; unchanged without rules."""
    return with_logical_constraint(x, axes)


def parameter(
    module: nn.Module,
    name: str,
    init: Any,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> Array:
    """Returns a float32 parameter of a module, declared with its logical axes."""
    boxed: Any = nn.with_logical_partitioning(init, axes)
    return module.param(name, boxed, shape, jnp.float32)
