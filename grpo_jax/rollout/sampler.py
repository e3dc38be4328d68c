"""Prompts in, completions out: the interface of every sampler, and the group sampler.

Tokens go from the device to the host and back: a sampler returns NumPy arrays, and the
learner sends them to its mesh again. Rewards, tools and environments are Python on the
host, so lists of token ids are their natural form. A sampler in another process has
nothing else to give either. A rollout is a few megabytes, and the trip takes
milliseconds.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from grpo_jax.config import SamplingConfig
from grpo_jax.models.limits import longest_prompt
from grpo_jax.models.protocol import LanguageModel
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout.encoding import bucket, pad
from grpo_jax.rollout.generate import Completions, generate


class Sampler(Protocol):
    """What training, evaluation and the command line ask of an engine that samples.

    `GroupSampler` is the one of this package. An engine that refills its slots, vLLM or
    SGLang-JAX would implement the same three methods; a test needs a few lines and no
    model.
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
        """
        ...


class GroupSampler:
    """Samples in batches on the learner's mesh; each returns when all have ended.

    Prompts are padded to a bucket of the longest one, and the last batch is filled up
    with copies of the first prompt, so that few shapes are compiled.
    """

    def __init__(
        self, model: LanguageModel, mesh: Mesh, *, max_prompt_tokens: int
    ) -> None:
        self._model = model
        self._mesh = mesh
        self._max_prompt_tokens = max_prompt_tokens
        self._variables: PyTree | None = None

    def update(self, variables: PyTree, *, version: int) -> None:
        """Sample with these variables; all tokens of a call are of one version."""
        del version
        self._variables = variables

    def release(self) -> None:
        """Forget the weights."""
        self._variables = None

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
    ) -> Completions:
        """The completions of this process's share of the prompts; see `Sampler`."""
        if self._variables is None:
            raise RuntimeError("the sampler has no weights; call update() first.")
        limit = longest_prompt(
            self._max_prompt_tokens,
            new_tokens=max_new_tokens,
            context=self._model.config.max_position_embeddings,
        )
        # All processes pad alike, for their rows make one array.
        length = bucket(max(map(len, prompts)), limit=limit)
        own = meshes.own_share(len(prompts))
        processes = jax.process_count()
        most = math.ceil(len(prompts) / processes)
        at_once = max((batch_size or len(prompts) * group_size) // group_size, 1)
        # Rows of a batch on this process, as many on each of its devices.
        devices = max(meshes.batch_shards(self._mesh) // processes, 1)
        rows = math.ceil(min(at_once / processes, most) / devices) * devices
        parts: list[Completions] = []
        # As many batches on every process, also where its share is smaller by one.
        for start in range(0, most, rows):
            part = slice(own.start + start, min(own.start + start + rows, own.stop))
            missing = rows - len(prompts[part])
            batch = pad(
                [*prompts[part], *[prompts[0]] * missing],
                length=length,
                pad_id=self._model.config.pad_token_id or 0,
            )
            ids = np.array([*numbers[part], *[numbers[0]] * missing], np.uint32)
            placed, lengths, ids = meshes.to_mesh(self._mesh, (*batch, ids))
            completions = generate(
                self._model,
                self._variables["params"],
                placed,
                lengths,
                key,
                group_size=group_size,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                prompt_ids=ids,
                lora=self._variables.get("lora"),
            )
            # Each process fetches the rows of its own prompts.
            completions = jax.device_put(completions, lengths.sharding)
            parts.append(meshes.to_host(completions))
        # The longest of all processes, each of which must go on with the same shapes.
        longest = np.array([max(part.lengths.max() for part in parts)])
        kept = bucket(int(meshes.gather_rows(longest).max()), limit=max_new_tokens)
        parts = [
            part.replace(tokens=part.tokens[..., :kept], logp=part.logp[..., :kept])
            for part in parts
        ]
        count = own.stop - own.start  # behind them are copies of the first prompt
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
