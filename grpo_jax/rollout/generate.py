"""Generation: one prefill per prompt, then one compiled loop over tokens.

The completions of a group share the prompt's keys and values. The key of a token is
folded from (key, prompt, sample, token), so the draws for a prompt do not depend on the
prompts beside it. As completions end, the others are compacted into fewer slots
(`rollout.compaction`), so that a few long ones take less time than the full batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from grpo_jax.config import SamplingConfig
from grpo_jax.models.limits import check_stop_ids
from grpo_jax.models.protocol import LanguageModel, UnrolledDecoder, in_compute_dtype
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.collectives import split_over_fsdp
from grpo_jax.rollout import compaction
from grpo_jax.rollout.draw import sample_token


class Completions(struct.PyTreeNode):
    """What was sampled.

    Attributes:
      tokens: ``[N, G, T]`` token ids; entries from `lengths` on are padding.
      lengths: ``[N, G]`` tokens of each completion, its stop token included.
      logp: ``[N, G, T]`` log-probability in nats of each token under the sampler, 0 in
        the padding.
      finished: ``[N, G]`` whether a stop token ended it, rather than the limit.
    """

    tokens: Int[Array, "N G T"]
    lengths: Int[Array, "N G"]
    logp: Float[Array, "N G T"]
    finished: Bool[Array, "N G"]

    @property
    def mask(self) -> Bool[Array, "N G T"]:
        """True for the tokens of a completion, False for the padding."""
        positions = jnp.arange(self.tokens.shape[-1])[None, None]
        return positions < self.lengths[..., None]


class _Loop(struct.PyTreeNode):
    """State of the loop: the token at `step - 1` is the last one drawn.

    All arrays but `step` are those of the M x W slots in use.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "M W T"]
    logp: Float[Array, "M W T"]
    lengths: Int[Array, "M W"]
    finished: Bool[Array, "M W"]
    keys: Key[Array, "M W"]


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
      The completions. The loop stops as soon as all of them have ended.

    Raises:
      ValueError: for shapes that do not belong together, a count below 1, more tokens
        than the model's context holds, or a stop token that the model does not have.
    """
    if prompts.ndim != 2 or lengths.shape != prompts.shape[:1]:
        raise ValueError(
            f"prompts must be [N, P] with lengths [N], got {prompts.shape} and "
            f"{lengths.shape}."
        )
    counts = {"group_size": group_size, "max_new_tokens": max_new_tokens}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    context = model.config.max_position_embeddings
    if prompts.shape[1] + max_new_tokens > context:
        raise ValueError(
            f"{prompts.shape[1]} prompt tokens and {max_new_tokens} new tokens exceed "
            f"the model's context of {context}; lower max_new_tokens."
        )
    sampling = sampling or SamplingConfig()
    stop_ids = sampling.stop_ids
    if stop_ids is None:
        stop_ids = model.config.eos_token_ids
    check_stop_ids(stop_ids, vocab_size=model.config.vocab_size)
    if prompt_ids is None:
        prompt_ids = jnp.arange(prompts.shape[0])
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    return _generate(
        model,
        variables,
        prompts,
        lengths,
        key,
        prompt_ids,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=tuple(stop_ids),
        # Where fsdp splits the parameters, layers stay stacked: the loop then gathers
        # one layer at a time. XLA would move the gathers of separate layers in front of
        # the loop, and all gathered layers would stay in memory.
        apart=not split_over_fsdp(variables),
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "group_size",
        "max_new_tokens",
        "sampling",
        "stop_ids",
        "apart",
    ),
)
def _generate(
    model: LanguageModel,
    variables: PyTree,
    prompts: Int[Array, "N P"],
    lengths: Int[Array, " N"],
    key: Key[Array, ""],
    prompt_ids: Int[Array, " N"],
    *,
    group_size: int,
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    apart: bool,
) -> Completions:
    # Cast here, once per rollout: in the loop it would be repeated at every token.
    variables = in_compute_dtype(variables, model.config.dtype)
    # The loop carries the head as [V, D]: a tied embedding is stored like that, and a
    # product with few hidden rows reads it row by row.
    head: Any = model.apply(variables, method=model.head).T
    last, prefix = model.apply(variables, prompts, lengths, method=model.prefill)
    shape = (prompts.shape[0], group_size)
    cache = model.init_cache(*shape, max_new_tokens)
    regroup: Any = None
    if apart and isinstance(model, UnrolledDecoder):
        variables, prefix, cache = model.unroll(variables, prefix, cache)
        regroup = model.regroup
    pad_id = model.config.pad_token_id or 0
    state = _blank(key, prompt_ids, (*shape, max_new_tokens), pad_id)
    draw = functools.partial(
        _draw, model, head, sampling=sampling, stop_ids=jnp.asarray(stop_ids, jnp.int32)
    )

    def unfinished(state: _Loop) -> Bool[Array, ""]:
        return (state.step < max_new_tokens) & ~jnp.all(state.finished)

    def advance(prefix: Any, carry: tuple[_Loop, Any]) -> tuple[_Loop, Any]:
        state, cache = carry
        token = lax.dynamic_index_in_dim(
            state.tokens, state.step - 1, axis=-1, keepdims=False
        )
        hidden, cache = model.apply(
            variables, token, state.step - 1, prefix, cache, method=model.decode
        )
        return draw(state, hidden), cache

    # The hidden state behind the prompt gives the first token of the whole group.
    state = draw(state, jnp.broadcast_to(last[:, None, :], (*shape, last.shape[-1])))
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else meshes.batch_shards(mesh)
    layouts = compaction.layouts(*shape, max_new_tokens=max_new_tokens, parts=parts)
    slots = compaction.first_assignment(layouts[0])
    ended = state
    # Without stop tokens all completions reach the limit together: nothing to compact.
    for layout in layouts[1:] if regroup and stop_ids else ():
        # Defaults bind the present values: a closure would see those of a later turn.
        state, cache = lax.while_loop(
            lambda carry, slots=slots, layout=layout: (
                unfinished(carry[0]) & ~compaction.fit(slots, carry[0].finished, layout)
            ),
            functools.partial(advance, prefix),
            (state, cache),
        )
        ended = _put_back(ended, state, slots.index)
        slots, sources = compaction.compact(slots, state.finished, layout)
        state = _take(ended, slots.index).replace(step=state.step)
        prefix, cache = regroup(prefix, cache, *sources)
    state, _ = lax.while_loop(
        lambda carry: unfinished(carry[0]),
        functools.partial(advance, prefix),
        (state, cache),
    )
    ended = _put_back(ended, state, slots.index)
    return Completions(ended.tokens, ended.lengths, ended.logp, ended.finished)


def _blank(
    key: Key[Array, ""],
    prompt_ids: Int[Array, " N"],
    shape: tuple[int, int, int],
    pad_id: int,
) -> _Loop:
    """The state before the first token."""
    # The order (prompt, then sample, then token in `_draw`) fixes all random numbers.
    fold = jax.random.fold_in
    keys = jax.vmap(fold, (None, 0))(key, prompt_ids)
    over_group = jax.vmap(fold, (None, 0))
    return _Loop(
        step=jnp.int32(0),
        tokens=jnp.full(shape, pad_id),
        logp=jnp.zeros(shape),
        lengths=jnp.zeros(shape[:2], jnp.int32),
        finished=jnp.zeros(shape[:2], bool),
        keys=jax.vmap(over_group, (0, None))(keys, jnp.arange(shape[1])),
    )


def _draw(
    model: LanguageModel,
    head: Float[Array, "V D"],
    state: _Loop,
    hidden: Float[Array, "M W D"],
    *,
    sampling: SamplingConfig,
    stop_ids: Int[Array, " E"],
) -> _Loop:
    """The state with one more token for each completion that has not ended."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = jnp.dot(rows, head.T, preferred_element_type=jnp.float32)
    if (cap := model.config.logit_softcap) is not None:
        logits = cap * jnp.tanh(logits / cap)
    one_uniform = lambda key: jax.random.uniform(jax.random.fold_in(key, state.step))  # noqa: E731
    # `uniform` can be 0, at which the first token would be drawn, however unlikely it
    # is. Half a step of float32 is added, which is exact, and keeps numbers below 1.
    uniform = jax.vmap(jax.vmap(one_uniform))(state.keys) + 2.0**-24
    drawn = sample_token(
        logits,
        uniform.reshape(-1),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    token, logp = (values.reshape(hidden.shape[:-1]) for values in drawn)
    alive = ~state.finished

    # Written in place: `where` over the whole array would copy it at every token.
    def put(values: Array, new: Array) -> Array:
        old = lax.dynamic_index_in_dim(values, state.step, axis=-1, keepdims=False)
        return lax.dynamic_update_index_in_dim(
            values, jnp.where(alive, new, old), state.step, axis=-1
        )

    return state.replace(
        step=state.step + 1,
        tokens=put(state.tokens, token),
        logp=put(state.logp, logp),
        lengths=state.lengths + alive,
        finished=state.finished | (alive & jnp.isin(token, stop_ids)),
    )


def _put_back(ended: _Loop, state: _Loop, index: Int[Array, "M W"]) -> _Loop:
    """All N x G completions, updated by those that the slots hold."""

    def put(old: Array, new: Array) -> Array:
        flat = old.reshape(-1, *old.shape[2:])
        new = new.reshape(-1, *new.shape[2:])
        # An empty slot has an index beyond the last completion: its values are dropped.
        return flat.at[index.reshape(-1)].set(new, mode="drop").reshape(old.shape)

    # None takes a field out of the map: the step is one for all, keys do not change.
    both = (part.replace(step=None, keys=None) for part in (ended, state))
    return jax.tree.map(put, *both).replace(step=ended.step, keys=ended.keys)


def _take(ended: _Loop, index: Int[Array, "M W"]) -> _Loop:
    """The completions of the slots out of all N x G; an empty slot has finished."""
    held = index < ended.finished.size

    def take(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[jnp.where(held, index, 0)]

    state = jax.tree.map(take, ended.replace(step=None))
    return state.replace(finished=state.finished | ~held)
