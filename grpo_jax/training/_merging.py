"""Adapters merged into their base, one parameter at a time.

The merged model is in float32 and can be several times as large as a base in 4 bits. So
what is only read once, for a checksum or a file, is never there as a whole.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding
from jaxtyping import Array, PyTree

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.lora import merge_part, merge_parts
from grpo_jax.parallel import mesh as meshes


class Merged:
    """A parameter of the merged model, computed each time that it is read.

    Attributes:
      shape: as of the plain parameter.
      dtype: float32.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, part: Mapping[str, Array], config: ModelConfig) -> None:
        """Takes what `merge_parts` gives for the parameter."""
        stored = part["codes" if "codes" in part else "kernel"]
        self._part, self._config, self._place = part, config, stored.sharding
        self.shape: tuple[int, ...] = jax.eval_shape(
            functools.partial(merge_part, config=config), part
        ).shape

    def computed(self) -> Array:
        """The parameter on its devices, split as in the base."""
        return _merge(self._config, self._place)(self._part)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole of it on the host; all processes must ask for it.

        Raises:
          ValueError: where no copy is allowed, for it is computed.
        """
        if copy is False:
            raise ValueError("a merged parameter is computed: ask without copy=False.")
        whole = meshes.gather(self.computed())
        return np.array(whole, dtype) if copy else np.asarray(whole, dtype)


@functools.cache
def _merge(
    config: ModelConfig, place: Sharding
) -> Callable[[Mapping[str, Array]], Array]:
    return jax.jit(functools.partial(merge_part, config=config), out_shardings=place)


def merged_parameters(base: PyTree, adapters: PyTree, config: ModelConfig) -> PyTree:
    """The plain model's parameters, each a `Merged`."""
    parts = merge_parts(base, adapters)
    merged = {path: Merged(part, config) for path, part in parts.items()}
    return traverse_util.unflatten_dict(merged, sep="/")


def computed(params: PyTree) -> PyTree:
    """Parameters as arrays on their devices."""
    return jax.tree.map(
        lambda leaf: leaf.computed() if isinstance(leaf, Merged) else leaf, params
    )
