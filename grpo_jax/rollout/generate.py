"""Generation: groups of completions for prompts, in one call.

The completions of a group share the prompt's keys and values. The key of a token is
folded from (key, prompt, sample, token), so the draws for a prompt do not depend on the
prompts beside it. The engine (`rollout._engine`) samples models whose sequences can
stand at different places. Other models, and calls within `jax.jit`, are sampled by one
compiled loop, which ends with the longest completion.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from grpo_jax.config import RolloutConfig, SamplingConfig
from grpo_jax.models.limits import check_stop_ids, longest_prompt
from grpo_jax.models.protocol import LanguageModel, SlotDecoder, in_compute_dtype
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout._carry_over import CarryOver, carry_over
from grpo_jax.rollout._ended import Told, draw_all, tell
from grpo_jax.rollout._engine import Engine
from grpo_jax.rollout.draw import draw
from grpo_jax.rollout.encoding import bucket, pad
from grpo_jax.rollout.sampler import Completions, Turns, cut


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
    given = (variables, prompts, lengths, key, prompt_ids)
    if not isinstance(model, SlotDecoder) or not _is_here(given):
        return _generate(
            model,
            *given,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=stop_ids,
        )
    mesh = jax.sharding.get_mesh()
    completions = _complete(
        model,
        variables,
        [row[:n] for row, n in zip(np.asarray(prompts), lengths, strict=True)],
        numbers=np.asarray(prompt_ids),
        key=key,
        mesh=None if mesh.empty else mesh,
        width=prompts.shape[1],
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
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
            prompt_tokens=bucket(longest, limit=self._longest_prompt(max_new_tokens)),
            prompts_per_step=prompts_per_step,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=_stop_ids(self._model, sampling),
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
        """The completions of this process's share of the prompts; see `Sampler`.

        Raises:
          ValueError: for `turns` with a model whose sequences share one step.
        """
        variables, _ = self._weights()
        limit = self._longest_prompt(max_new_tokens)
        own = meshes.own_share(len(prompts))
        completions = _complete(
            self._model,
            variables,
            prompts[own],
            numbers=np.array(numbers[own], np.uint32),
            key=key,
            mesh=self._mesh,
            # All processes pad alike.
            width=bucket(max(map(len, prompts)), limit=limit),
            most=math.ceil(len(prompts) / jax.process_count()),
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=_stop_ids(self._model, sampling),
            batch_size=batch_size,
            ended=ended,
            turns=turns,
        )
        # The longest of all processes, each of which must go on with the same shapes.
        longest = meshes.gather_rows(np.array([completions.lengths.max(initial=0)]))
        kept = bucket(int(longest.max()), limit=max_new_tokens)
        return cut(completions, kept)


def _complete(
    model: LanguageModel,
    variables: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    numbers: np.ndarray,
    key: Key[Array, ""],
    mesh: Mesh | None,
    width: int,
    group_size: int,
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    most: int | None = None,
    batch_size: int | None = None,
    ended: Told | None = None,
    turns: Turns | None = None,
) -> Completions:
    """Completions of this process's prompts; no process has more than `most`."""
    processes = jax.process_count()
    parts = max(1 if mesh is None else meshes.batch_shards(mesh) // processes, 1)
    rows = math.ceil((len(prompts) if most is None else most) / parts)
    at_once = rows * group_size
    if batch_size is not None:
        at_once = min(at_once, max(batch_size // (parts * processes), 1))
    how = {
        "group_size": group_size,
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "stop_ids": stop_ids,
    }
    if isinstance(model, SlotDecoder):
        engine = Engine(
            model,
            mesh=mesh,
            slots=at_once,
            prompt_tokens=width,
            # Completions that wait for an answer come back.
            streams=turns is not None,
            **how,
        )
        engine.update(variables)
        groups = engine.add(prompts, numbers.astype(np.uint32).tolist(), key)
        draw_all(engine, groups, group_size=group_size, ended=ended, turns=turns)
        return engine.completions(groups)[0]
    if turns is not None:
        raise ValueError(
            "tools and environments need a model whose sequences can stand at "
            f"different places, got {type(model).__name__}, which has no "
            "`decode_slots`; give one that has (see models/protocol.py)."
        )
    tokens, lengths = pad(
        [*prompts, *[[0]] * (parts * rows - len(prompts))], length=width, pad_id=0
    )
    places = np.zeros(parts * rows, np.uint32)
    places[: len(prompts)] = numbers
    own = [x.reshape(parts, rows, *x.shape[1:]) for x in (tokens, lengths, places)]
    each = max(at_once // group_size, 1)
    drawn = []
    for first in range(0, rows, each):
        of_all = [x[:, first : first + each] for x in own]
        batch: Any = [x.reshape(-1, *x.shape[2:]) for x in of_all]
        if mesh is not None:
            batch = meshes.to_mesh(mesh, batch)
        part = _generate(model, variables, *batch[:2], key, batch[2], **how)
        if mesh is not None:
            # Each process fetches the rows of its own prompts.
            part = jax.device_put(part, batch[1].sharding)
        by_part = lambda x: x.reshape(parts, -1, *x.shape[1:])  # noqa: E731
        drawn.append(jax.tree.map(by_part, meshes.to_host(part)))
        tell(drawn[-1], ended, first=first, rows=rows, count=len(prompts))
    joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *drawn)
    # Behind the prompts of this process are rows of filling.
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(prompts)], joined)


def _stop_ids(model: LanguageModel, sampling: SamplingConfig) -> tuple[int, ...]:
    stop_ids = sampling.stop_ids
    if stop_ids is None:
        stop_ids = model.config.eos_token_ids
    check_stop_ids(stop_ids, vocab_size=model.config.vocab_size)
    return tuple(stop_ids)


def _is_here(arrays: PyTree) -> bool:
    """Whether the values of arrays are known to this process: not within `jax.jit`."""
    return all(
        not isinstance(x, Tracer)
        and (not isinstance(x, jax.Array) or x.is_fully_addressable)
        for x in jax.tree.leaves(arrays)
    )


@functools.partial(
    jax.jit,
    static_argnames=("model", "group_size", "max_new_tokens", "sampling", "stop_ids"),
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
) -> Completions:
    """All completions in one loop, for models whose sequences share one step."""
    variables = in_compute_dtype(variables, model.config.dtype)
    head: Any = model.apply(variables, method=model.head).T
    last, prefix = model.apply(variables, prompts, lengths, method=model.prefill)
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
            sampling=sampling,
            softcap=model.config.logit_softcap,
        )

        # Written in place: `where` over the whole array would copy it at every token.
        def put(values: Array, new: Array) -> Array:
            old = lax.dynamic_index_in_dim(values, step, axis=-1, keepdims=False)
            new = jnp.where(alive, new, old)
            return lax.dynamic_update_index_in_dim(values, new, step, axis=-1)

        ended = alive & jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))
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
