"""The group sampler: one prefill per prompt, then one compiled loop over tokens.

The completions of a group share the prompt's keys and values. The key of a token is
folded from (key, prompt, sample, token), so what is drawn for a prompt does not depend
on the prompts beside it. As completions end, those that go on are moved together into
fewer slots (`rollout.slots`), so that a few long ones do not cost what all of them did.
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
from grpo_jax.rollout import compaction as slots
from grpo_jax.rollout import draw as draws


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

    Arrays are those of the M x W slots in use, of which each holds a completion.
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
    sampling = sampling or SamplingConfig()
    _check(model, prompts, lengths, group_size, max_new_tokens)
    if prompt_ids is None:
        prompt_ids = jnp.arange(prompts.shape[0])
    stop_ids = sampling.stop_ids
    if stop_ids is None:
        stop_ids = model.config.eos_token_ids
    check_stop_ids(stop_ids, vocab_size=model.config.vocab_size)
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
        # Gathers of single layers would all move before the loop, and stay.
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
    # Cast once, not at every token.
    variables = in_compute_dtype(variables, model.config.dtype)
    # By rows, as a tied embedding lies in memory: a product of few rows reads it so.
    head: Any = model.apply(variables, method=model.head).T
    last, prefix = model.apply(variables, prompts, lengths, method=model.prefill)
    shape = (prompts.shape[0], group_size)
    cache = model.init_cache(*shape, max_new_tokens)
    regroup: Any = None
    if apart and isinstance(model, UnrolledDecoder):
        variables, prefix, cache = model.unroll(variables, prefix, cache)
        regroup = model.regroup
    pad_id = model.config.pad_token_id or 0
    blank = _blank(_sample_keys(key, prompt_ids, group_size), max_new_tokens, pad_id)

    def draw(state: _Loop, hidden: Float[Array, "M W D"]) -> _Loop:
        uniform = _uniforms(state.keys, state.step)
        token, logp = _next_token(model, head, hidden, uniform, sampling)
        return _append(state, token, logp, stop_ids)

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

    first = jnp.broadcast_to(last[:, None, :], (*shape, last.shape[-1]))
    state = ended = draw(blank, first)
    layouts = slots.layouts(*shape, max_new_tokens=max_new_tokens, parts=_batch_parts())
    places = slots.first_places(layouts[0])
    # Where nothing stops a completion, none ends before the others.
    for layout in layouts[1:] if regroup and stop_ids else ():
        state, cache = lax.while_loop(
            lambda carry, places=places, layout=layout: (
                unfinished(carry[0]) & ~slots.fit(places, carry[0].finished, layout)
            ),
            functools.partial(advance, prefix),
            (state, cache),
        )
        ended = _put_back(ended, state, places)
        places, moves = slots.move_together(places, state.finished, layout)
        state = _take(ended, places).replace(step=state.step)
        prefix, cache = regroup(prefix, cache, *moves)
    state, _ = lax.while_loop(
        lambda carry: unfinished(carry[0]),
        functools.partial(advance, prefix),
        (state, cache),
    )
    ended = _put_back(ended, state, places)
    return Completions(ended.tokens, ended.lengths, ended.logp, ended.finished)


def _blank(keys: Key[Array, "N G"], max_new_tokens: int, pad_id: int) -> _Loop:
    """The state before the first token."""
    return _Loop(
        step=jnp.int32(0),
        tokens=jnp.full((*keys.shape, max_new_tokens), pad_id),
        logp=jnp.zeros((*keys.shape, max_new_tokens)),
        lengths=jnp.zeros(keys.shape, jnp.int32),
        finished=jnp.zeros(keys.shape, bool),
        keys=keys,
    )


def _put_back(ended: _Loop, state: _Loop, places: slots.Places) -> _Loop:
    """All completions, with what the slots hold of them; `ended` has N x G of them."""
    index = places.index.reshape(-1)

    def put(old: Array, new: Array) -> Array:
        flat = old.reshape(-1, *old.shape[2:])
        new = new.reshape(-1, *new.shape[2:])
        return flat.at[index].set(new, mode="drop").reshape(old.shape)

    return ended.replace(
        tokens=put(ended.tokens, state.tokens),
        logp=put(ended.logp, state.logp),
        lengths=put(ended.lengths, state.lengths),
        finished=put(ended.finished, state.finished),
    )


def _take(ended: _Loop, places: slots.Places) -> _Loop:
    """What the slots hold of all completions; an empty slot has finished."""
    index = places.index
    held = index < ended.finished.size

    def take(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[jnp.where(held, index, 0)]

    arrays = {name: x for name, x in vars(ended).items() if name != "step"}
    state = ended.replace(**{name: take(x) for name, x in arrays.items()})
    return state.replace(finished=state.finished | ~held)


def _batch_parts() -> int:
    """Into how many parts the mesh in use, if any, splits a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else meshes.batch_shards(mesh)


def _append(
    state: _Loop,
    token: Int[Array, "N G"],
    logp: Float[Array, "N G"],
    stop_ids: tuple[int, ...],
) -> _Loop:
    """The state with one more token for each completion that has not ended."""
    alive = ~state.finished

    def put(values: Array, new: Array) -> Array:
        old = lax.dynamic_index_in_dim(values, state.step, axis=-1, keepdims=False)
        return lax.dynamic_update_index_in_dim(
            values, jnp.where(alive, new, old), state.step, axis=-1
        )

    stops = jnp.isin(token, jnp.asarray(stop_ids, token.dtype))
    return state.replace(
        step=state.step + 1,
        tokens=put(state.tokens, token),
        logp=put(state.logp, logp),
        lengths=state.lengths + alive,
        finished=state.finished | (alive & stops),
    )


def _next_token(
    model: LanguageModel,
    head: Float[Array, "V D"],
    hidden: Float[Array, "M W D"],
    uniform: Float[Array, "M W"],
    sampling: SamplingConfig,
) -> tuple[Int[Array, "M W"], Float[Array, "M W"]]:
    shape = hidden.shape[:-1]
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = jnp.dot(rows, head.T, preferred_element_type=jnp.float32)
    if (cap := model.config.logit_softcap) is not None:
        logits = cap * jnp.tanh(logits / cap)
    token, logp = draws.sample_token(
        logits,
        uniform.reshape(-1),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    return token.reshape(shape), logp.reshape(shape)


def _sample_keys(
    key: Key[Array, ""], prompt_ids: Int[Array, " N"], group_size: int
) -> Key[Array, "N G"]:
    fold = jax.random.fold_in
    prompt_keys = jax.vmap(fold, (None, 0))(key, prompt_ids)
    over_group = jax.vmap(fold, (None, 0))
    return jax.vmap(over_group, (0, None))(prompt_keys, jnp.arange(group_size))


def _uniforms(keys: Key[Array, "N G"], step: Int[Array, ""]) -> Float[Array, "N G"]:
    """Numbers strictly between 0 and 1.

    At 0 itself the first token would be drawn, however unlikely it is; half a step of
    float32 is added, which is exact.
    """
    draw = lambda key: jax.random.uniform(jax.random.fold_in(key, step))  # noqa: E731
    return jax.vmap(jax.vmap(draw))(keys) + 2.0**-24


def _check(
    model: LanguageModel,
    prompts: Array,
    lengths: Array,
    group_size: int,
    new_tokens: int,
) -> None:
    if prompts.ndim != 2 or lengths.shape != prompts.shape[:1]:
        raise ValueError(
            f"prompts must be [N, P] with lengths [N], got {prompts.shape} and "
            f"{lengths.shape}."
        )
    for name, count in (("group_size", group_size), ("max_new_tokens", new_tokens)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    context = model.config.max_position_embeddings
    if prompts.shape[1] + new_tokens > context:
        raise ValueError(
            f"{prompts.shape[1]} prompt tokens and {new_tokens} new tokens exceed the "
            f"model's context of {context}; lower max_new_tokens."
        )
