"""Many given tokens of some slots at once, between two loops."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

from grpo_jax import objective
from grpo_jax.config import SamplingConfig
from grpo_jax.models.cache import Cache, PromptBlock, Slots
from grpo_jax.models.protocol import SlotDecoder
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout._drawn import Drawn
from grpo_jax.rollout._forced import SHORT
from grpo_jax.rollout._programs import by_batch, by_part, take_rows
from grpo_jax.rollout._slots import SlotPlan

# Most tokens of a slot, and of the slots of a part together, in one call: it holds
# scores of attention for all of them.
_MOST, _MOST_OF_PART = 512, 2048


class Fed(struct.PyTreeNode):
    """The tokens of s slots in each part.

    Attributes:
      tokens: each predicts the next one; the last of a slot is fed by the loop.
      counts: how many tokens of each slot are fed.
      at: where the slots stand when the first one is.
      slots: which slots they are; S for none.
      rows: those of their prompts.
    """

    tokens: Int[Array, "A s t+1"]
    counts: Int[Array, "A s"]
    at: Slots
    slots: Int[Array, "A s"]
    rows: Int[Array, "A s"]


def run_given(
    extended: Callable,
    arrays: tuple[Array, PyTree, PyTree],
    plan: SlotPlan,
    drawn: Drawn,
    *,
    most: tuple[int, int],
    column: int,
    version: int,
    place: Callable[[Any], Any],
) -> PyTree:
    """Run the given tokens of the slots that have most of them; the new cache.

    Args:
      extended: `extend` with all but the arrays, which are those of the engine.
      most: in how many slots of a part, and how many tokens of one, that may be.
      column: the column of the ring that is written next.
      place: puts the rows of this process's parts on the devices.
    """
    longest = min(most[1], _MOST)
    slots = min(most[0], plan.slots, max(_MOST_OF_PART // longest, 1))
    order = np.argsort(-plan.pending(drawn.known), axis=1, kind="stable")[:, :slots]
    of_slots = lambda x: np.take_along_axis(x, order, axis=1)  # noqa: E731
    held, index, pending = map(
        of_slots, (plan.held, plan.index, plan.pending(drawn.known))
    )
    counts = np.where(pending > SHORT, np.minimum(pending, longest), 0)
    # The last token of a slot is in its completion, and was not fed yet.
    first = np.maximum(index - 1, 0)
    indices = first[..., None] + np.arange(longest + 1)
    rows = np.stack([plan.rows_of(part, own) for part, own in enumerate(held)])
    some = np.maximum(held, 0)
    lengths = drawn.prompt_lengths[some // plan.group_size]
    tokens = drawn.tokens_from(held, first, longest + 1)
    fed = Fed(
        tokens=place(tokens),
        counts=place(np.maximum(index + counts - first - 1, 0).astype(np.int32)),
        at=Slots(place(lengths), place(first), column),
        slots=place(np.where(counts, order, plan.slots).astype(np.int32)),
        rows=place(rows.astype(np.int32)),
    )
    logp, cache = extended(*arrays, fed)
    added = (indices >= index[..., None]) & (indices < (index + counts)[..., None])
    which = np.broadcast_to(some[..., None], added.shape)[added], indices[added]
    values = tokens[added], meshes.to_host(logp)[added]
    drawn.note(*which, *values, version=version)
    parts = np.arange(len(held))[:, None]
    plan.index[parts, order] += counts.astype(np.int32)
    return cache


@functools.partial(
    jax.jit, static_argnames=("model", "sampling"), donate_argnames=("cache",)
)
def extend(
    model: SlotDecoder,
    variables: PyTree,
    last: Float[Array, "A M D"],
    prompts: tuple[PyTree, PyTree, PyTree],
    cache: tuple[PyTree, PyTree, PyTree],
    fed: Fed,
    *,
    sampling: SamplingConfig,
) -> tuple[Float[Array, "A s t+1"], tuple[PyTree, PyTree, PyTree]]:
    """Log-probs of tokens in nats, and the cache with those that are fed.

    Entry 0 is that of a first token; it means nothing where another one is fed.

    Args:
      last: hidden states behind the prompts.
    """
    slots = jax.tree.leaves(cache)[0].shape[-4] // len(last)
    own = take_rows(cache, jnp.minimum(fed.slots, slots - 1))
    hidden, own = model.apply(
        variables,
        fed.tokens[..., :-1],
        fed.counts,
        fed.at,
        PromptBlock(*take_rows(prompts, fed.rows)),
        Cache(*own),
        method=model.extend,
    )
    behind_prompts = take_rows(last, fed.rows)[:, :, None]
    hidden = jnp.concatenate([behind_prompts, hidden], axis=2)
    logp = objective.chunked_logprobs(
        hidden,
        model.apply(variables, method=model.head),  # type: ignore[attr-defined]
        fed.tokens,
        temperature=sampling.temperature or 1.0,
        logit_softcap=model.config.logit_softcap,
    ).logp

    def put(old: Array, new: Array, at: Array) -> Array:
        return old.at[at].set(new, mode="drop")

    put_all = lambda old, new: by_part(put, old, new, fed.slots)  # noqa: E731
    return by_batch(logp), jax.tree.map(put_all, cache, own.arrays)
