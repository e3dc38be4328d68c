"""Generation: one prefill per prompt, then one compiled loop over tokens.

The completions of a group share the prompt's keys and values. The key of a token is
folded from (key, prompt, sample, token), so the draws for a prompt do not depend on the
prompts beside it. As completions end, the others are compacted into fewer slots
(`rollout._compaction`), so that a few long ones take less time than the full batch.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from grpo_jax.config import SamplingConfig
from grpo_jax.models.limits import check_stop_ids, longest_prompt
from grpo_jax.models.protocol import LanguageModel, UnrolledDecoder, in_compute_dtype
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.collectives import split_over_fsdp
from grpo_jax.rollout import _compaction
from grpo_jax.rollout.draw import sample_token
from grpo_jax.rollout.encoding import bucket, pad
from grpo_jax.rollout.sampler import Completions


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
    stop_ids = _stop_ids(model, sampling)
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
        stop_ids=stop_ids,
        unrolled=_can_unroll(variables),
    )


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
        self._unrolled = False

    def update(self, variables: PyTree, *, version: int) -> None:
        """Sample with these variables; all tokens of a call are of one version."""
        del version
        self._variables = variables
        self._unrolled = _can_unroll(variables)

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
        stop_ids = _stop_ids(self._model, sampling)
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
            completions = _generate(
                self._model,
                self._variables,
                placed,
                lengths,
                key,
                ids,
                group_size=group_size,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop_ids=stop_ids,
                unrolled=self._unrolled,
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


def _stop_ids(model: LanguageModel, sampling: SamplingConfig) -> tuple[int, ...]:
    stop_ids = sampling.stop_ids
    if stop_ids is None:
        stop_ids = model.config.eos_token_ids
    check_stop_ids(stop_ids, vocab_size=model.config.vocab_size)
    return tuple(stop_ids)


def _can_unroll(variables: PyTree) -> bool:
    """Whether the loop over tokens may read layer by layer from separate arrays.

    Where fsdp splits the parameters, layers stay stacked: the loop then gathers one
    layer at a time. XLA would move the gathers of separate layers in front of the loop,
    and all gathered layers would stay in memory.
    """
    return not split_over_fsdp(variables)


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "group_size",
        "max_new_tokens",
        "sampling",
        "stop_ids",
        "unrolled",
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
    unrolled: bool,
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
    if unrolled and isinstance(model, UnrolledDecoder):
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
    layouts = _compaction.layouts(*shape, max_new_tokens=max_new_tokens, parts=parts)
    slots = _compaction.first_assignment(layouts[0])
    ended = state
    # Without stop tokens all completions reach the limit together: nothing to compact.
    for layout in layouts[1:] if regroup and stop_ids else ():
        # Defaults bind the present values: a closure would see those of a later turn.
        state, cache = lax.while_loop(
            lambda carry, slots=slots, layout=layout: (
                unfinished(carry[0])
                & ~_compaction.fit(slots, carry[0].finished, layout)
            ),
            functools.partial(advance, prefix),
            (state, cache),
        )
        ended = _put_back(ended, state, slots.index)
        slots, sources = _compaction.compact(slots, state.finished, layout)
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
    put = functools.partial(_compaction.put_back, index=index)
    # None takes a field out of the map: the step is one for all, keys do not change.
    both = (part.replace(step=None, keys=None) for part in (ended, state))
    return jax.tree.map(put, *both).replace(step=ended.step, keys=ended.keys)


def _take(ended: _Loop, index: Int[Array, "M W"]) -> _Loop:
    """The completions of the slots out of all N x G; an empty slot has finished."""
    take = functools.partial(_compaction.take, index=index)
    state = jax.tree.map(take, ended.replace(step=None))
    return state.replace(finished=state.finished | (index >= ended.finished.size))
