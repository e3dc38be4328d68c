"""Reads parameters from files onto devices, each part only once."""

from collections.abc import Mapping

import jax
import numpy as np

from grpo_jax.models.quantized import Kind, quantize, quantized_shapes
from grpo_jax.weights._names import Parameter, Tensor, aligned, read_parameter


def load_parameter(
    parameter: Parameter,
    tensors: Mapping[str, Tensor],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """A parameter in a dtype; without a sharding on the default device."""
    if sharding is None:
        values = read_parameter(parameter, tensors, dtype=dtype)
        # Nothing else refers to this memory. A copy would need twice as much of it.
        return jax.device_put(values, may_alias=True)
    parts: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "jax passes an index to every call"
        # Devices with copies of the same part share one read.
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:
            parts[key] = read_parameter(parameter, tensors, index, dtype=dtype)
        return parts[key]

    return jax.make_array_from_callback(parameter.shape, sharding, part)


def load_quantized(
    parameter: Parameter,
    tensors: Mapping[str, Tensor],
    kind: Kind,
    shardings: Mapping[str, jax.sharding.Sharding],
) -> dict[str, jax.Array]:
    """The leaves in the place of a kernel that is quantized, by path.

    One layer at a time is on the host in float32. A process reads all inputs of the
    outputs of its devices, because a scale is that of many.
    """
    module = parameter.path.removesuffix("/kernel")
    shapes = quantized_shapes(parameter.shape, kind)
    made: dict[tuple, dict[str, np.ndarray]] = {}

    def of_outputs(layers: slice, outputs: slice) -> dict[str, np.ndarray]:
        key = (layers.start, layers.stop, outputs.start, outputs.stop)
        if key not in made:
            made[key] = _quantized(parameter, tensors, kind, layers, outputs)
        return made[key]

    arrays = {}
    for name, leaf in shapes.items():

        def part(index: tuple[slice, ...] | None, name: str = name) -> np.ndarray:
            assert index is not None, "jax passes an index to every call"
            layers, inputs, outputs = index
            return of_outputs(layers, outputs)[name][:, inputs]

        path = f"{module}/{name}"
        if path in shardings:
            place = shardings[path]
            arrays[path] = jax.make_array_from_callback(leaf.shape, place, part)
        else:
            whole = part((slice(None),) * 3)
            arrays[path] = jax.device_put(whole, may_alias=True)
    return arrays


def _quantized(
    parameter: Parameter,
    tensors: Mapping[str, Tensor],
    kind: Kind,
    layers: slice,
    outputs: slice,
) -> dict[str, np.ndarray]:
    chosen = range(*layers.indices(parameter.shape[0]))
    inputs = slice(0, parameter.shape[1])
    own = slice(*outputs.indices(parameter.shape[2])[:2])
    shape = (len(chosen), inputs.stop, own.stop - own.start)
    made = {
        name: aligned(leaf.shape, np.dtype(leaf.dtype))
        for name, leaf in quantized_shapes(shape, kind).items()
    }
    for row, layer in enumerate(chosen):
        part = tensors[parameter.names[layer]].read(parameter.block((inputs, own)))
        wide = part.T if parameter.transposed else part
        for name, values in quantize(wide, kind).items():
            made[name][row] = values
    return made
