"""Low-rank adapters: a collection of their own beside the base parameters.

The collection `lora` mirrors the paths of the projections it adapts, e.g.
`layers/attn/q/{a, b}`. The base model is the model without the collection, so no second
copy of the weights is needed. The scale alpha / rank is `ModelConfig.lora_scale`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Key, PyTree

from grpo_jax.config import CONV_TARGETS, DELTA_TARGETS, LORA_TARGETS
from grpo_jax.models._frozen import dequantized
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.parallel.mesh import named_leaves

# Target name -> path of the projection in the parameters.
PATHS = (
    {name: f"layers/attn/{name}" for name in LORA_TARGETS[:4]}
    | {name: f"layers/mlp/{name}" for name in LORA_TARGETS[4:]}
    | {n: "layers/" + n.replace("_", "/") for n in DELTA_TARGETS + CONV_TARGETS}
)

_TARGETS = {path: name for name, path in PATHS.items()}
T = TypeVar("T")


def adaptable(config: ModelConfig) -> tuple[str, ...]:
    """Returns the targets that this model has: all projections, those of experts too.

    A projection of experts has an adapter for each of them.
    """
    mixer = () if config.mixer is None else (config.mixer.part,)
    parts = ("attn", "mlp", *mixer)
    return tuple(name for name, path in PATHS.items() if path.split("/")[1] in parts)


def kernel_of(kernels: Mapping[str, T], target: str) -> T:
    """Returns what belongs to the kernel of a target, by the path of its parameter.

    Experts have their kernels in one array, without a module for each.
    """
    path = PATHS[target]
    return kernels[path] if path in kernels else kernels[f"{path}/kernel"]


def init_lora(
    model: Decoder, key: Key[Array, ""], *, rank: int, targets: tuple[str, ...]
) -> PyTree:
    """Returns fresh float32 adapters, with which the model computes what it did before.

    a [L, in, rank] is uniform in +-1/sqrt(in), b [L, rank, out] is 0, as in the
    reference implementation of Hu et al. 2021, https://arxiv.org/abs/2106.09685. Those
    of experts are [L, E, in, rank] and [L, E, rank, out].

    Raises:
        ValueError: a target that is no projection, a rank below 1, or one larger than
            a side of a target's kernel, beyond which it adds nothing.
    """
    known = adaptable(model.config)
    if not targets or not set(targets) <= set(known):
        raise ValueError(
            f"lora targets must be some of {sorted(known)}, got {list(targets)}"
        )
    if rank < 1:
        raise ValueError(f"lora rank must be at least 1, got {rank}")
    shapes = named_leaves(abstract_params(model))
    for name in targets:
        sides = kernel_of(shapes, name).shape[-2:]
        if rank > min(sides):
            raise ValueError(
                f"lora rank must be at most {min(sides)}, got {rank}: the kernel of "
                f"{name!r} is {sides[0]} x {sides[1]}"
            )
    adapters = {}
    for name, one_key in zip(PATHS, jax.random.split(key, len(PATHS)), strict=True):
        if name in targets:
            *stack, fan_in, fan_out = kernel_of(shapes, name).shape
            shape, bound = (*stack, fan_in, rank), fan_in**-0.5
            a = jax.random.uniform(one_key, shape, minval=-bound, maxval=bound)
            adapters[f"{PATHS[name]}/a"] = a
            adapters[f"{PATHS[name]}/b"] = jnp.zeros((*stack, rank, fan_out))
    return traverse_util.unflatten_dict(adapters, sep="/")


def lora_axes(model: Decoder, adapters: PyTree) -> PyTree:
    """Returns the tree of adapters with a tuple of logical axis names per leaf.

    The rank is too small to split and has no name.
    """
    kernels: dict[Any, Any] = traverse_util.flatten_dict(param_axes(model), sep="/")
    axes = {}
    for path in named_leaves(adapters):
        module, _, factor = path.rpartition("/")
        *stack, inward, outward = kernel_of(kernels, _TARGETS[module])
        ends = {"a": (*stack, inward, None), "b": (*stack, None, outward)}
        axes[path] = ends[factor]
    return traverse_util.unflatten_dict(axes, sep="/")


def merge_lora(params: PyTree, adapters: PyTree, config: ModelConfig) -> PyTree:
    """Returns parameters of a model without adapters that computes the same.

    Each adapted kernel becomes W + lora_scale a b. All are float32: in a narrower type
    most of what small adapters add would be rounded away. Of a quantized base W is what
    its codes stand for, with which the adapters were trained.

    Raises:
        ValueError: `config.lora_scale` is not set.
    """
    parts = merge_parts(params, adapters)
    merged = {path: merge_part(part, config) for path, part in parts.items()}
    return traverse_util.unflatten_dict(merged, sep="/")


def merge_parts(params: PyTree, adapters: PyTree) -> dict[str, dict[str, Any]]:
    """Returns what each plain parameter is made of, by its path.

    That is the parameter as "kernel", or its "codes" and "scale", and the factors "a"
    and "b" of its adapter, if it has one.
    """
    parts: dict[str, dict[str, Any]] = {}
    leaves = named_leaves(params)
    for path, leaf in leaves.items():
        module, _, name = path.rpartition("/")
        if name in ("codes", "scale") and f"{module}/codes" in leaves:
            parts.setdefault(f"{module}/kernel", {})[name] = leaf
        else:
            parts[path] = {"kernel": leaf}
    for path, leaf in named_leaves(adapters).items():
        module, _, factor = path.rpartition("/")
        parts[module if module in parts else f"{module}/kernel"][factor] = leaf
    return parts


def merge_part(part: Mapping[str, Array], config: ModelConfig) -> Array:
    """Returns a plain parameter in float32, from what `merge_parts` gave for it.

    Raises:
        ValueError: `config.lora_scale` is not set.
    """
    if config.lora_scale is None:
        raise ValueError("ModelConfig.lora_scale is None; set it to alpha / rank")
    if "codes" in part:
        whole = dequantized(part["codes"], part["scale"], jnp.float32)
    else:
        whole = part["kernel"].astype(jnp.float32)
    if "a" not in part:
        return whole
    highest = jax.lax.Precision.HIGHEST
    added = jnp.matmul(part["a"], part["b"], precision=highest)
    return whole + config.lora_scale * added
