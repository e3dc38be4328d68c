"""Models of which some layers have a memory in the place of attention.

Parameters are stacked by part: `attn` over the layers with attention, `delta` or `conv`
over the others, and what all have over all. Keys and values, and states, are stacked
alike.
Layers are scanned period by period, so compile time does not grow with depth.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from grpo_jax.models._block import Layer, PerLayer, per_layer_data, rotary_tables
from grpo_jax.models._mixers import (
    PARTS,
    MixerInputs,
    mixer_of,
    of_tokens,
    rules_of,
)
from grpo_jax.models._rows import join, of_owners, part
from grpo_jax.models.cache import Cache, MixerState, PromptBlock, Slots, per_layer
from grpo_jax.models.config import ModelConfig

# Parts that only some layers have, and whether they are those without attention.
_OF_SOME = {"attn": False, **dict.fromkeys(PARTS, True)}

Answers = Float[Array, "N S V v"]


def run(
    config: ModelConfig,
    variables: Mapping[str, Any],
    body: Callable,
    carry: PyTree,
    entries: tuple[PyTree, ...],
    states: tuple[MixerState, ...],
) -> tuple[PyTree, tuple[PyTree, ...]]:
    """Returns the last carry of `body(layer, carry, (data, entry))`, and the results.

    The results are those of the layers with attention, and then that of the others.

    Args:
      variables: of the model, stacked or from `unroll`.
      entries: arrays of the layers with attention, stacks or tuples.
      states: of the others. The entry of each has its own of all.
    """
    kinds, data = mixer_of(config).layers, per_layer_data(config)
    layers = {name: trees["layers"] for name, trees in variables.items()}
    if 0 in layers["params"]:
        # Only decoding has such layers. A checkpoint would make arrays of the indices
        # that choose from tuples.
        one = _one_layer(dataclasses.replace(config, remat="none"), body)
        given = _entries(kinds, entries, states)
        carry, results = _through(one, carry, kinds, layers, data, given)
        return carry, tuple(jax.tree.map(lambda *x: x, *trees) for trees in results)
    period = _period(kinds)
    count, kinds = len(kinds) // period, kinds[:period]
    # Inside a scan nothing can be merged across the boundary anyway.
    one = _one_layer(config, body, prevent_cse=count == 1)

    def step(carry: PyTree, inputs: tuple[PyTree, ...]) -> tuple[PyTree, PyTree]:
        stacks, data, entries, states, turn = inputs
        layers = {name: split_layers(tree, kinds) for name, tree in stacks.items()}
        given = _entries(kinds, entries, states)
        carry, results = _through(one, carry, kinds, layers, data, given, turn=turn)
        stack = lambda *x: jnp.stack(x)  # noqa: E731
        return carry, tuple(jax.tree.map(stack, *trees) for trees in results)

    cut = lambda x: x.reshape(count, -1, *x.shape[1:])  # noqa: E731
    stacks = jax.tree.map(cut, (layers, data, entries, states))
    carry, results = lax.scan(step, carry, (*stacks, jnp.arange(count)))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def split_layers(stacks: PyTree, kinds: Sequence[bool]) -> tuple[PyTree, ...]:
    """Returns a tree for each layer, with the parts that layers of its kind have."""
    trees = tuple({} for _ in kinds)
    for name, stack in stacks.items():
        own = [i for i, kind in enumerate(kinds) if _OF_SOME.get(name, kind) == kind]
        for i, tree in zip(own, per_layer(stack, len(own)), strict=True):
            trees[i][name] = tree
    return trees


def init_layers(config: ModelConfig, key: Key[Array, ""]) -> PyTree:
    """Returns freshly drawn parameters of all layers, with their logical axes."""
    kinds = mixer_of(config).layers
    x = jnp.zeros((1, 1, config.hidden_size), config.dtype)
    tables = rotary_tables(config, jnp.zeros((1, 1), jnp.int32))
    data = jax.tree.map(lambda x: x[0], per_layer_data(config))
    remember = functools.partial(of_prompts, config=config, lengths=None, keep=False)
    stacks: dict[str, PyTree] = {}
    for kind in (True, False):

        def drawn(key: Key[Array, ""], kind: bool = kind) -> PyTree:
            layer: Any = Layer(config, memory=kind, parent=None)
            attend = lambda q, k, v: (q, None)  # noqa: E731
            return layer.init(key, x, tables, data, attend, remember)["params"]

        every = jax.vmap(drawn)(jax.random.split(key, len(kinds)))
        own = jnp.array([i for i, other in enumerate(kinds) if other == kind])
        take = lambda x, own=own: x[own]  # noqa: E731
        for name, tree in every.items():
            stacks[name] = jax.tree.map(take, tree) if name in _OF_SOME else tree
    return nn.meta.add_axis(stacks, 0, {nn.PARTITION_NAME: "layers"})


def empty_states(config: ModelConfig, rows: int) -> MixerState | None:
    """Returns the states of all layers before the first token; None without any."""
    if config.mixer is None:
        return None
    one = rules_of(config.mixer).empty_state(config.mixer, rows, config.dtype)
    count = sum(config.mixer.layers)
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), one)


def of_prompts(
    inputs: MixerInputs,
    *,
    config: ModelConfig,
    lengths: Int[Array, " N"] | None,
    keep: bool,
) -> tuple[Answers, MixerState | None]:
    """Returns answers to prompts from their first token on, and the state if kept."""
    mixer = mixer_of(config)
    rules = rules_of(mixer)
    state = rules.empty_state(mixer, len(inputs.channels), config.dtype)
    out, state = rules.advance(inputs, state, lengths, config=mixer)
    return out, state if keep else None


def of_row(
    inputs: MixerInputs,
    *,
    config: ModelConfig,
    lengths: Int[Array, " N"],
    index: Int[Array, "A|1 R|1 S"],
    owner: Int[Array, "A R"] | None,
    own_shape: tuple[int, ...],
) -> tuple[Answers, None]:
    """Returns answers to a row of `score`: prompts, and behind them own tokens.

    Each completion starts from the state after its prompt. With `owner` several share
    a row, and a token's `index` says where the next one starts.
    """
    mixer, (parts, count, length) = mixer_of(config), own_shape
    rules = rules_of(mixer)
    of_prompt = lambda x: x.reshape(len(lengths), -1, *x.shape[2:])  # noqa: E731
    given = of_tokens(lambda x: of_prompt(part(x, own_shape)[0]), inputs)
    state = rules.empty_state(mixer, len(lengths), config.dtype)
    out, state = rules.advance(given, state, lengths, config=mixer)
    out = out.reshape(parts, -1, *out.shape[2:])
    if not length:  # completions of one token: it is predicted, never read
        return out, None
    of_own = lambda x: x.reshape(parts * count, length, *x.shape[3:])  # noqa: E731
    given = of_tokens(lambda x: of_own(part(x, own_shape)[1]), inputs)
    if owner is None:
        state = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), state)
        answers, _ = rules.advance(given, state, None, config=mixer)
    else:
        state = jax.tree.map(lambda x: of_owners(x, owner), state)
        within = index.reshape(-1, length)
        answers = rules.answers_in_rows(given, state, within, config=mixer)
    return join(out, answers.reshape(*own_shape, *answers.shape[2:])), None


def of_slots(
    inputs: MixerInputs,
    *,
    config: ModelConfig,
    slots: Slots,
    prompts: PromptBlock,
    cache: Cache,
    index: Int[Array, ""] | int,
) -> tuple[Answers, Cache]:
    """Returns answers to a token of each slot, and the cache with the new states.

    A slot whose first own token is fed starts from the state after its prompt, whatever
    its earlier sequence left.

    Args:
      prompts: with the states of this layer.
      index: of this layer among those with states.
    """
    behind, states = prompts.state, cache.state
    assert behind is not None and states is not None, "a model with states has both"
    parts, count = slots.index.shape
    rows = len(behind.memory) // parts
    if prompts.members is None or prompts.place is None:
        at = jnp.broadcast_to(jnp.arange(count) // (count // rows), slots.index.shape)
    else:
        at = prompts.place // prompts.members.shape[2]
    fresh = slots.index == 0
    # All others read one row, which stays in fast memory.
    at = jnp.where(fresh, at, 0)

    def begin(of_rows: Array, old: Array) -> Array:
        of_rows = of_rows.reshape(parts, rows, *of_rows.shape[1:])
        first = jax.vmap(lambda x, at: x.at[at].get(mode="clip"))(of_rows, at)
        return _where(fresh, first.reshape(old.shape), old)

    given = of_tokens(lambda x: x.reshape(-1, 1, *x.shape[2:]), inputs)
    state = jax.tree.map(begin, behind, _read(states, index))
    mixer = mixer_of(config)
    out, state = rules_of(mixer).advance(given, state, None, config=mixer)
    cache = dataclasses.replace(cache, state=_write(states, state, index))
    return out.reshape(parts, count, *out.shape[2:]), cache


def of_extended(
    inputs: MixerInputs,
    *,
    config: ModelConfig,
    slots: Slots,
    counts: Int[Array, "A S"],
    states: tuple[MixerState, MixerState],
) -> tuple[Answers, MixerState]:
    """Returns answers to t tokens of each slot, and the states after the real ones.

    Args:
      states: after the prompt of each slot, and those of the slots.
    """
    fresh = functools.partial(_where, slots.index == 0)
    state = jax.tree.map(fresh, *states)
    given = of_tokens(lambda x: x.reshape(counts.size, -1, *x.shape[2:]), inputs)
    mixer, real = mixer_of(config), counts.reshape(-1)
    out, state = rules_of(mixer).advance(given, state, real, config=mixer)
    return out.reshape(len(counts), -1, *out.shape[2:]), state


def _where(chosen: Bool[Array, "A S"], new: Array, old: Array) -> Array:
    return jnp.where(chosen.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


def _read(state: MixerState, index: Int[Array, ""] | int) -> MixerState:
    """Returns the state of one layer, of a stack or of a tuple."""

    def take(x: PyTree) -> Array:
        if isinstance(x, tuple):
            return x[index]
        return lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False)

    return MixerState(take(state.memory), take(state.recent))


def _write(
    state: MixerState, new: MixerState, index: Int[Array, ""] | int
) -> MixerState:
    """Returns the states with that of one layer replaced."""

    def put(x: PyTree, new: Array) -> PyTree:
        if isinstance(x, tuple):
            return (*x[:index], new, *x[index + 1 :])
        return lax.dynamic_update_index_in_dim(x, new, index, axis=0)

    return MixerState(put(state.memory, new.memory), put(state.recent, new.recent))


def _period(kinds: Sequence[bool]) -> int:
    """Returns after how many layers their kinds repeat."""
    whole = len(kinds)
    fits = (n for n in range(1, whole) if whole % n == 0)
    repeats = (n for n in fits if tuple(kinds) == tuple(kinds[:n]) * (whole // n))
    return next(repeats, whole)


def _entries(
    kinds: Sequence[bool], entries: tuple[PyTree, ...], states: tuple[MixerState, ...]
) -> list[tuple]:
    """Returns what each layer gets of the arrays of its kind."""
    given, counts = [], [0, 0]
    for kind in kinds:
        at = counts[kind]
        if kind:
            given.append(tuple(MixerState(x.memory[at], x.recent[at]) for x in states))
        else:
            given.append(tuple(x[at] for x in entries))
        counts[kind] += 1
    return given


def _one_layer(
    config: ModelConfig, body: Callable, *, prevent_cse: bool = True
) -> Callable:
    """Returns `body` of one layer as a function of its variables and its kind."""

    def one(kind: bool, own: PyTree, carry: PyTree, inputs: PyTree) -> Any:
        plain: Any = Layer(config, memory=kind, parent=None)
        return body(functools.partial(plain.apply, own), carry, inputs)

    if config.remat == "none":
        return one
    policy = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    return jax.checkpoint(
        one,
        policy=policy.get(config.remat),
        prevent_cse=prevent_cse,
        static_argnums=(0,),
    )


def _through(
    one: Callable,
    carry: PyTree,
    kinds: Sequence[bool],
    layers: Mapping[str, Any],
    data: PerLayer,
    given: Sequence[tuple],
    *,
    turn: Int[Array, ""] | int = 0,
) -> tuple[PyTree, list[list[PyTree]]]:
    """Returns the last carry, and of each result one tree per layer that has it."""
    of_kinds: tuple[list, list] = [], []
    for i, (kind, settings) in enumerate(
        zip(kinds, per_layer(data, len(kinds)), strict=True)
    ):
        place = turn * kinds.count(kind) + len(of_kinds[kind])
        own = {name: trees[i] for name, trees in layers.items()}
        inputs = settings.replace(index=place), given[i]
        carry, result = one(kind, own, carry, inputs)
        of_kinds[kind].append(result)
    attention, memory = of_kinds
    kept = (
        [] if attention[0] is None else [list(x) for x in zip(*attention, strict=True)]
    )
    return carry, [*kept, memory]
