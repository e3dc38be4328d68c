"""Prompts in, completions out: the interface of every sampler.

Tokens go from the device to the host and back: a sampler returns NumPy arrays, and the
learner sends them to its mesh again. Rewards, tools and environments are Python on the
host, so lists of token ids are their natural form. A sampler in another process has
nothing else to give either. A rollout is a few megabytes, and the trip takes
milliseconds.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from grpo_jax.config import SamplingConfig
from grpo_jax.rollout.turns import Turns


class Completions(struct.PyTreeNode):
    """What was sampled.

    Attributes:
      tokens: ``[N, G, T]`` token ids; entries from `lengths` on are padding.
      lengths: ``[N, G]`` tokens of each completion, its stop token included.
      logp: ``[N, G, T]`` log-probability in nats of each token under the sampler, 0 in
        the padding.
      finished: ``[N, G]`` whether a stop token ended it, rather than the limit.
      sampled: ``[N, G, T]`` which tokens the policy drew; the others of a completion
        were given, and have a `logp` of 0. None where it drew all.
    """

    tokens: Int[Array, "N G T"]
    lengths: Int[Array, "N G"]
    logp: Float[Array, "N G T"]
    finished: Bool[Array, "N G"]
    sampled: Bool[Array, "N G T"] | None = None

    @property
    def mask(self) -> Bool[Array, "N G T"]:
        """True for the tokens that the policy drew, False for others and padding."""
        positions = jnp.arange(self.tokens.shape[-1])[None, None]
        mask = positions < self.lengths[..., None]
        return mask if self.sampled is None else mask & self.sampled


def cut(completions: Completions, length: int) -> Completions:
    """The completions in arrays of `length` tokens."""
    return jax.tree.map(lambda x: x[..., :length] if x.ndim > 2 else x, completions)


class Sampler(Protocol):
    """What training, evaluation and the command line ask of an engine that samples.

    `GroupSampler` in `rollout/generate.py` is the one of this package. An engine that
    refills its slots, vLLM or SGLang-JAX would implement the same three methods; a test
    needs a few lines and no model.
    """

    def update(self, variables: PyTree, *, version: int) -> None:
        """Sample with these Linen variables from now on.

        Args:
          variables: ``{"params": ...}``, with adapters also ``"lora"``.
          version: the number of updates that the policy has had.
        """
        ...

    def release(self) -> None:
        """Free the weights until the next `update`.

        Where fsdp splits the parameters, `variables` is a gathered copy, the largest
        array of a run. It must be gone before the learner's update, which needs the
        memory. (vLLM and SGLang also have such a call.)
        """
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        numbers: Sequence[int],
        key: Key[Array, ""],
        group_size: int,
        max_new_tokens: int,
        sampling: SamplingConfig,
        batch_size: int | None = None,
        ended: Callable[[int, list[list[int]]], None] | None = None,
        turns: Turns | None = None,
    ) -> Completions:
        """A group of completions for each prompt, as NumPy arrays.

        On several processes all call it together with the same prompts. Each gets the
        completions of its own share of them (`parallel.mesh.own_share`), all with the
        same T.

        Args:
          prompts: token ids, without padding.
          numbers: what identifies each prompt in its random numbers, which follow from
            (key, number, sample, token) and not from the prompts beside it.
          sampling: how tokens are drawn, and the tokens that end a completion.
          batch_size: most completions at once, but at least those of one prompt; all by
            default. An engine with slots of its own may ignore it.
          ended: called once for each group when all its completions have ended, or
            later: with the prompt's number within this process's share, and the token
            ids of the completions, stop tokens included.
          turns: asked at the end of each completion whether it goes on, if given.
        """
        ...
