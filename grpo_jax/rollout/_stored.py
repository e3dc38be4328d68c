"""What the engine keeps on the devices between its turns."""

from collections.abc import Mapping
from typing import Self

import jax
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

from grpo_jax.models.cache import MixerState
from grpo_jax.rollout import _programs as programs

# Of the arrays by name, with a number for each layer, or 0 for all in one array.
_CACHES = ("keys", "values", "prompt_keys", "prompt_values")
# Of layers without attention. Where all have it, there are none.
_STATES = ("memory", "recent", "prompt_memory", "prompt_recent")


class Stored(struct.PyTreeNode):
    """Keys, values and states of slots and of prompts; hidden states behind prompts.

    Each is an array of all layers that have it, or a tuple with one for each.
    """

    cache: tuple[PyTree, PyTree, PyTree]
    prompts: tuple[PyTree, PyTree, PyTree]
    last: Float[Array, "A M D"]

    @property
    def columns(self) -> int:
        """Own tokens of a slot that the cache holds."""
        return jax.tree.leaves(self.cache)[0].shape[-1]

    def with_prompts(self, rows: Int[Array, "A R"]) -> Self:
        """With some of the prompts, in order."""
        prompts, last = programs.take_rows((self.prompts, self.last), rows)
        return self.replace(prompts=prompts, last=last)

    def named(self) -> dict[str, Array]:
        """The arrays by name, as a checkpoint stores them."""
        (*own, state), (*shared, of_prompts) = self.cache, self.prompts
        arrays = dict(zip(_CACHES, (*own, *shared), strict=True))
        if state is not None:
            states = state.memory, state.recent, of_prompts.memory, of_prompts.recent
            arrays |= dict(zip(_STATES, states, strict=True))
        layers = {
            f"{name}_{i}": x
            for name, array in arrays.items()
            for i, x in enumerate(array if isinstance(array, tuple) else [array])
        }
        return layers | {"last": self.last}

    @classmethod
    def of_named(cls, arrays: Mapping[str, Array]) -> Self:
        """From what `named` returns."""

        def of(name: str) -> PyTree:
            if arrays[f"{name}_0"].ndim == 5:
                return arrays[f"{name}_0"]
            count = sum(other.rpartition("_")[0] == name for other in arrays)
            return tuple(arrays[f"{name}_{i}"] for i in range(count))

        keys, values, prompt_keys, prompt_values = map(of, _CACHES)
        state = of_prompts = None
        if f"{_STATES[0]}_0" in arrays:
            of_all = [*map(of, _STATES)]
            state, of_prompts = MixerState(*of_all[:2]), MixerState(*of_all[2:])
        return cls(
            cache=(keys, values, state),
            prompts=(prompt_keys, prompt_values, of_prompts),
            last=arrays["last"],
        )
