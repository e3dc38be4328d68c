"""The mixture of experts in the place of a layer's gated MLP."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import spmd
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from grpo_jax.models._layers import KERNEL_INIT, activation, checked_scale, parameter
from grpo_jax.models._routing import (
    BlockProduct,
    ExpertKernels,
    route,
    through_experts,
)
from grpo_jax.models._tpu_experts import block_product, serves_blocks
from grpo_jax.models.config import ModelConfig


class ExpertsMLP(nn.Module):
    """A router and its experts in the place of a gated MLP.

    The router is used in float32, whatever the compute dtype: a rounded logit could
    send a token elsewhere in sampling than in training.
    """

    config: ModelConfig

    def setup(self):
        """Declares the router and the experts' stacked kernels."""
        experts, width = self.config.experts, self.config.hidden_size
        assert experts is not None, "the layer has experts only if its config has"
        count, inner = experts.count, experts.width
        axes = ("expert", "embed", "mlp")
        self.router = parameter(
            self, "router", KERNEL_INIT, (width, count), ("embed", "expert")
        )
        into, out_of = (count, width, inner), (count, inner, width)
        self.gate = parameter(self, "gate", KERNEL_INIT, into, axes)
        self.up = parameter(self, "up", KERNEL_INIT, into, axes)
        self.down = parameter(
            self, "down", KERNEL_INIT, out_of, ("expert", "mlp", "embed")
        )

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        """Returns the output of the block, without the residual.

        Where the collection `routers` is asked for, it gets the logits of the router.
        """
        experts = self.config.experts
        assert experts is not None, "checked in setup"
        act = functools.partial(activation, kind=self.config.activation)
        kernels = ExpertKernels(
            gate=self.gate.astype(x.dtype),
            up=self.up.astype(x.dtype),
            down=self.down.astype(x.dtype),
            adapters=self._adapters(x.dtype),
        )

        def mix(
            product: BlockProduct, x: Array, router: Array, kernels: ExpertKernels
        ) -> tuple[Array, Array]:
            rows = x.reshape(-1, x.shape[-1])
            logits = rows.astype(jnp.float32) @ router.astype(jnp.float32)
            routing = route(
                logits, per_token=experts.per_token, normalized=experts.normalized
            )
            out = through_experts(rows, routing, kernels, act=act, product=product)
            return out.reshape(x.shape), logits.reshape(*x.shape[:-1], -1)

        with_kernels = self.config.attention == "auto"
        out, logits = _by_shard(mix, with_kernels, x, self.router, kernels)
        self.sow("routers", "logits", logits)
        return out

    def _adapters(self, dtype: jnp.dtype) -> dict[str, tuple[Array, Array]]:
        """Returns the factors of adapters by the name of the kernel."""
        found = {}
        for name in ("gate", "up", "down"):
            if self.has_variable("lora", name):
                factors = self.get_variable("lora", name)
                b = checked_scale(self.config.lora_scale) * factors["b"]
                found[name] = factors["a"].astype(dtype), b.astype(dtype)
        return found


def _by_shard(
    mix: Callable, with_kernels: bool, x: Array, *weights: Any
) -> tuple[Array, Array]:
    """Returns mix(product, x, *weights); each device mixes its own rows of the batch.

    Left to the compiler, a sort over all rows would bring all to every device. The
    product of blocks is that for TPUs if asked for and where it can be used.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch = (spmd.logical_to_mesh_axes(("batch",)) or P(None))[0]
    names = (batch,) if isinstance(batch, str) else batch or ()
    parts = math.prod(mesh.shape[name] for name in names if name in mesh.shape)
    if x.shape[0] % parts:
        parts = 1
    for_tpu = with_kernels and serves_blocks(parts, x.dtype)
    mix = functools.partial(mix, block_product if for_tpu else jax.lax.ragged_dot)
    if parts == 1:
        return mix(x, *weights)
    whole = jax.tree.map(lambda _: P(), weights)
    split = P(names)
    return jax.shard_map(
        mix,
        in_specs=(split, *whole),
        out_specs=split,
        # The axes that are left have one device each where a kernel is used, which must
        # not be the compiler's to split. A kernel does not say over what it varies.
        axis_names=set(mesh.axis_names) if for_tpu else set(names),
        check_vma=not for_tpu,
    )(x, *weights)
