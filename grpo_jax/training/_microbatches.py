"""A batch cut into what an update computes at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from grpo_jax.training.state import Batch

_PER_TOKEN = ("completions", "mask", "sampler_logp", "fresh", "old_logp", "ref_logp")
# Fields of `Batch` with an axis of completions, or of their rows, behind the prompts'.
_PER_COMPLETION = (*_PER_TOKEN, "advantages", "packing")


def microbatches(batch: Batch, sequences: int | None) -> tuple[Batch, tuple[int, ...]]:
    """The batch with a leading axis of microbatches of `sequences` sequences each.

    Beside it, the numbers of tokens of which each microbatch takes its own.

    Prompt i goes to microbatch i mod count, so that under a mesh each microbatch is
    spread over all devices as the batch was. A microbatch smaller than a group holds a
    part of the completions of one prompt.
    """
    prompts, group, width = batch.completions.shape
    size = min(sequences or prompts * group, prompts * group)
    count = prompts * group // max(size, group)
    parts_of_group = max(group // size, 1)

    def by_prompt(leaf: Array) -> Array:
        parts = leaf.reshape(-1, count, *leaf.shape[1:])
        parts = jnp.moveaxis(parts, 1, 0)
        return jnp.repeat(parts, parts_of_group, axis=0)

    def by_completion(leaf: Array) -> Array:
        if parts_of_group == 1:
            return by_prompt(leaf)
        return leaf.reshape(count * parts_of_group, 1, -1, *leaf.shape[2:])

    of_prompts = batch.prompts, batch.prompt_lengths
    of_completions = {name: vars(batch)[name] for name in _PER_COMPLETION}
    widths = (width,)
    if batch.like_lengths is not None:
        widths = batch.like_lengths.widths
        of_prompts, of_completions = batch.like_lengths.sort(of_prompts, of_completions)
    parts = Batch(
        *jax.tree.map(by_prompt, of_prompts),
        **jax.tree.map(by_completion, of_completions),
    )
    if parts.packing is None:
        return parts, widths
    tokens = parts.completions[0, 0].size
    parts = parts.replace(packing=parts.packing.of_cuts(parts_of_group, tokens))
    return parts, widths


def narrow(part: Batch, width: int) -> Batch:
    """The microbatch without the tokens of its completions from `width` on."""
    fields = {name: vars(part)[name] for name in _PER_TOKEN}
    return part.replace(**jax.tree.map(lambda leaf: leaf[..., :width], fields))
