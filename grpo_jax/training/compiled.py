"""The train step compiled for the devices of a mesh."""

import functools
from typing import Any, Literal

import jax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import PyTree

from grpo_jax.parallel import mesh as meshes
from grpo_jax.training.state import Batch, TrainState
from grpo_jax.training.step import Metrics, TrainStep

# Axis name of the devices under pmap.
_DEVICES = "devices"


def compile_train_step(
    step: TrainStep, mesh: Mesh, mode: Literal["jit", "pmap"] = "jit"
) -> TrainStep:
    """The step compiled for a mesh; the state given to it is donated.

    "jit" follows the shardings of the state, which the new state keeps. "pmap" runs the
    same step as plain data parallelism: the state is on every device, the batch is
    split over all of them. A frozen base is not donated: the reference policy shares
    its arrays.

    Raises:
      ValueError: for another mode; under pmap, when called, for a number of prompts
        that the devices do not divide.
    """
    if mode == "jit":
        return _JitStep(step)
    if mode == "pmap":
        return _pmap_step(step, mesh)
    raise ValueError(f"mode must be 'jit' or 'pmap', got {mode!r}.")


class _JitStep:
    """Compiles at the first call, when the shardings of the state are known."""

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self._compiled: Any = None

    def __call__(
        self, state: TrainState, batch: Batch, base: PyTree | None = None
    ) -> tuple[TrainState, Metrics]:
        if self._compiled is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
            # The first call then has the layout of every later one; otherwise jit
            # compiles the step twice.
            state = jax.device_put(state, shardings)
            self._compiled = jax.jit(
                functools.partial(self._step, places=shardings.params),
                donate_argnums=0,
                out_shardings=(shardings, None),
            )
        return self._compiled(state, batch, base)


def _pmap_step(step: TrainStep, mesh: Mesh) -> TrainStep:
    devices = list(mesh.devices.flat)
    own, everywhere = Mesh(devices, (_DEVICES,)), meshes.replicated(mesh)
    mapped = jax.pmap(
        functools.partial(step, axis_name=_DEVICES),
        axis_name=_DEVICES,
        in_axes=(None, 0, None),
        out_axes=(None, None),
        devices=devices,
        donate_argnums=0,
    )

    def call(
        state: TrainState, batch: Batch, base: PyTree | None = None
    ) -> tuple[TrainState, Metrics]:
        prompts = batch.prompts.shape[0]
        if prompts % len(devices):
            raise ValueError(
                f"{prompts} prompts cannot be split over {len(devices)} devices; use "
                f"{-(-prompts // len(devices)) * len(devices)}."
            )
        split = lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:])  # noqa: E731
        batch = jax.tree.map(split, batch)
        state, base = jax.device_put((state, base), everywhere)
        # A map has one axis, its own: the names of the mesh's axes mean nothing in it.
        with jax.set_mesh(own), nn.logical_axis_rules(()):
            results = mapped(state, batch, base)
        # The same buffers, as arrays of the mesh that everything else runs on.
        return jax.device_put(results, everywhere)

    return call
