"""Generation: groups of completions for prompts, in one call.

The completions of a group share the prompt's keys and values. The key of a token is
folded from (key, prompt, sample, token), so the draws for a prompt do not depend on the
prompts beside it. The engine (`rollout._engine`) samples models whose sequences can
stand at different places. Other models, and calls within `jax.jit`, are sampled by one
compiled loop, which ends with the longest completion.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PyTree

from grpo_jax.config import RolloutConfig, SamplingConfig
from grpo_jax.models.limits import longest_prompt
from grpo_jax.models.protocol import LanguageModel, SlotDecoder
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout._carry_over import CarryOver, carry_over
from grpo_jax.rollout._complete import complete
from grpo_jax.rollout._ended import Told
from grpo_jax.rollout._settings import group_settings
from grpo_jax.rollout._together import generate_together
from grpo_jax.rollout.encoding import bucket
from grpo_jax.rollout.sampler import Completions, cut
from grpo_jax.rollout.turns import Turns


def generate(
    model: LanguageModel,
    params: PyTree,
    prompts: Int[Array, "N P"],
    lengths: Int[Array, " N"],
    key: Key[Array, ""],
    *,
    group_size: int,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    prompt_ids: Int[Array, " N"] | None = None,
    lora: PyTree | None = None,
) -> Completions:
    """A group of completions for each right-padded prompt.

    Args:
      key: the key of this rollout; a token's own is folded from it.
      sampling: how tokens are drawn; plain sampling at temperature 1 by default. Where
        it names no stop tokens, they are the model's.
      prompt_ids: what identifies each prompt in its key; its row number by default.
      lora: adapters of the model, if it has any.

    Returns:
      The completions.

    Raises:
      ValueError: for shapes that do not belong together, a count below 1, more tokens
        than the model's context holds, or a stop token that the model does not have.
    """
    if prompts.ndim != 2 or lengths.shape != prompts.shape[:1]:
        raise ValueError(
            f"prompts must be [N, P] with lengths [N], got {prompts.shape} and "
            f"{lengths.shape}."
        )
    settings = group_settings(
        model.config,
        sampling or SamplingConfig(),
        group_size=group_size,
        max_new_tokens=max_new_tokens,
    )
    context = model.config.max_position_embeddings
    if prompts.shape[1] + max_new_tokens > context:
        raise ValueError(
            f"{prompts.shape[1]} prompt tokens and {max_new_tokens} new tokens exceed "
            f"the model's context of {context}; lower max_new_tokens."
        )
    if prompt_ids is None:
        prompt_ids = jnp.arange(prompts.shape[0])
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    given = (variables, prompts, lengths, key, prompt_ids)
    if not isinstance(model, SlotDecoder) or not _is_here(given):
        return generate_together(model, *given, settings=settings)
    mesh = jax.sharding.get_mesh()
    completions = complete(
        model,
        variables,
        [row[:n] for row, n in zip(np.asarray(prompts), lengths, strict=True)],
        settings,
        numbers=np.asarray(prompt_ids),
        key=key,
        mesh=None if mesh.empty else mesh,
        width=prompts.shape[1],
    )
    return jax.tree.map(jnp.asarray, completions)


class GroupSampler:
    """Samples on the learner's mesh.

    Prompts are padded to a bucket of the longest one, so that few shapes are compiled.
    """

    def __init__(
        self, model: LanguageModel, mesh: Mesh, *, max_prompt_tokens: int
    ) -> None:
        self._model = model
        self._mesh = mesh
        self._max_prompt_tokens = max_prompt_tokens
        self._variables: PyTree | None = None
        self._version = 0

    def update(self, variables: PyTree, *, version: int) -> None:
        """Sample with these variables; all tokens of a call are of one version."""
        self._variables, self._version = variables, version

    def release(self) -> None:
        """Forget the weights."""
        self._variables = None

    def _weights(self) -> tuple[PyTree, int]:
        if self._variables is None:
            raise RuntimeError("the sampler has no weights; call update() first.")
        return self._variables, self._version

    def stream(
        self,
        prompt_of: Callable[[int], Sequence[int]],
        key: Key[Array, ""],
        *,
        longest: int,
        prompts_per_step: int,
        group_size: int,
        max_new_tokens: int,
        sampling: SamplingConfig,
        rollout: RolloutConfig,
    ) -> CarryOver:
        """Completions that continue from step to step; see `CarryingSampler`."""
        return carry_over(
            self._model,
            self._mesh,
            self._weights,
            prompt_of,
            key,
            group_settings(
                self._model.config,
                sampling,
                group_size=group_size,
                max_new_tokens=max_new_tokens,
            ),
            prompt_tokens=bucket(longest, limit=self._longest_prompt(max_new_tokens)),
            prompts_per_step=prompts_per_step,
            rollout=rollout,
        )

    def _longest_prompt(self, max_new_tokens: int) -> int:
        return longest_prompt(
            self._max_prompt_tokens,
            new_tokens=max_new_tokens,
            context=self._model.config.max_position_embeddings,
        )

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
        ended: Told | None = None,
        turns: Turns | None = None,
    ) -> Completions:
        """The completions of this process's share; see `Sampler`.

        `turns` need a model whose sequences can stand at different places.
        """
        variables, _ = self._weights()
        limit = self._longest_prompt(max_new_tokens)
        own = meshes.own_share(len(prompts))
        completions = complete(
            self._model,
            variables,
            prompts[own],
            group_settings(
                self._model.config,
                sampling,
                group_size=group_size,
                max_new_tokens=max_new_tokens,
            ),
            numbers=np.array(numbers[own], np.uint32),
            key=key,
            mesh=self._mesh,
            # All processes pad alike.
            width=bucket(max(map(len, prompts)), limit=limit),
            most=math.ceil(len(prompts) / jax.process_count()),
            batch_size=batch_size,
            ended=ended,
            turns=turns,
        )
        # The longest of all processes, each of which must go on with the same shapes.
        longest = meshes.gather_rows(np.array([completions.lengths.max(initial=0)]))
        kept = bucket(int(longest.max()), limit=max_new_tokens)
        return cut(completions, kept)


def _is_here(arrays: PyTree) -> bool:
    """Whether the values of arrays are known to this process: not within `jax.jit`."""
    return all(
        not isinstance(x, Tracer)
        and (not isinstance(x, jax.Array) or x.is_fully_addressable)
        for x in jax.tree.leaves(arrays)
    )
