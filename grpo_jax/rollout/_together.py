"""Generation in one compiled loop, which ends with the longest completion.

It samples models whose sequences share one step, and calls within `jax.jit`. The engine
draws the same.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from grpo_jax.models.protocol import LanguageModel, in_compute_dtype
from grpo_jax.rollout._settings import GroupSettings
from grpo_jax.rollout.draw import draw
from grpo_jax.rollout.sampler import Completions


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def generate_together(
    model: LanguageModel,
    variables: PyTree,
    prompts: Int[Array, "N P"],
    lengths: Int[Array, " N"],
    key: Key[Array, ""],
    prompt_ids: Int[Array, " N"],
    *,
    settings: GroupSettings,
) -> Completions:
    """All completions in one loop, for models whose sequences share one step."""
    variables = in_compute_dtype(variables, model.config.dtype)
    head: Any = model.apply(variables, method=model.head).T
    last, prefix = model.apply(variables, prompts, lengths, method=model.prefill)
    group_size, max_new_tokens = settings.group_size, settings.max_new_tokens
    shape = (prompts.shape[0], group_size)
    cache = model.init_cache(*shape, max_new_tokens)
    # The order (prompt, then sample, then token) fixes all random numbers.
    fold = jax.random.fold_in
    keys = jax.vmap(fold, (None, 0))(key, prompt_ids)
    keys = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(keys, jnp.arange(group_size))
    state = _Loop(
        step=jnp.int32(0),
        tokens=jnp.full((*shape, max_new_tokens), model.config.pad_token_id or 0),
        logp=jnp.zeros((*shape, max_new_tokens)),
        lengths=jnp.zeros(shape, jnp.int32),
        finished=jnp.zeros(shape, bool),
    )

    def drawn(state: _Loop, hidden: Float[Array, "N G D"]) -> _Loop:
        step, alive = state.step, ~state.finished
        token, logp = draw(
            hidden,
            head,
            jax.vmap(jax.vmap(lambda key: fold(key, step)))(keys),
            sampling=settings.sampling,
            softcap=model.config.logit_softcap,
        )

        # Written in place: `where` over the whole array would copy it at every token.
        def put(values: Array, new: Array) -> Array:
            old = lax.dynamic_index_in_dim(values, step, axis=-1, keepdims=False)
            new = jnp.where(alive, new, old)
            return lax.dynamic_update_index_in_dim(values, new, step, axis=-1)

        ended = alive & jnp.isin(token, jnp.asarray(settings.stop_ids, jnp.int32))
        return state.replace(
            step=step + 1,
            tokens=put(state.tokens, token),
            logp=put(state.logp, logp),
            lengths=state.lengths + alive,
            finished=state.finished | ended,
        )

    def unfinished(carry: tuple[_Loop, Any]) -> Bool[Array, ""]:
        return (carry[0].step < max_new_tokens) & ~jnp.all(carry[0].finished)

    def advance(carry: tuple[_Loop, Any]) -> tuple[_Loop, Any]:
        state, cache = carry
        at = state.step - 1
        token = lax.dynamic_index_in_dim(state.tokens, at, axis=-1, keepdims=False)
        hidden, cache = model.apply(
            variables, token, at, prefix, cache, method=model.decode
        )
        return drawn(state, hidden), cache

    # The hidden state behind the prompt gives the first token of the whole group.
    state = drawn(state, jnp.broadcast_to(last[:, None], (*shape, last.shape[-1])))
    state, _ = lax.while_loop(unfinished, advance, (state, cache))
    return Completions(state.tokens, state.lengths, state.logp, state.finished)


class _Loop(struct.PyTreeNode):
    """State of the loop: the token at `step - 1` is the last one drawn."""

    step: Int[Array, ""]
    tokens: Int[Array, "N G T"]
    logp: Float[Array, "N G T"]
    lengths: Int[Array, "N G"]
    finished: Bool[Array, "N G"]
