"""The programs of the sampler for arrays that are only described.

For a mesh of devices that need not be here. The sizes are those of a rollout whose
completions all reach the limit, when the sampler holds the most.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import PyTree

from grpo_jax.config import SamplingConfig
from grpo_jax.models.limits import cache_columns, prompt_rows
from grpo_jax.models.protocol import SlotDecoder
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.collectives import split_over_fsdp
from grpo_jax.rollout import _loop as loops
from grpo_jax.rollout import _programs as programs
from grpo_jax.rollout._engine import MOST_TURNS, power
from grpo_jax.rollout._settings import group_settings


class SamplerProgram(NamedTuple):
    """A program of the sampler.

    Attributes:
      name: "prepare" (weights cast, laid out), "prefill", "widen" or "decode".
      lowered: what compiles.
      held: all that the sampler holds meanwhile, arguments included, without weights.
      given: the arguments, without the weights that the caller gave.
      turns: how often a rollout runs the body of its loop over tokens, or the program.
    """

    name: str
    lowered: Callable[[], Lowered]
    held: PyTree
    given: PyTree
    turns: int


def sampler_programs(
    model: SlotDecoder,
    variables: PyTree,
    mesh: Mesh,
    *,
    prompts: int,
    prompt_tokens: int,
    group_size: int,
    max_new_tokens: int,
    sampling: SamplingConfig,
    slots: int | None = None,
    streams: bool = False,
) -> Iterator[SamplerProgram]:
    """The programs that complete prompts, in the order in which they run.

    Each is lowered when it is asked for.

    Args:
      variables: `jax.ShapeDtypeStruct` of the weights, with their shardings.
      prompts: how many, over all devices.
      slots: completions that decode together over all devices; all by default.
      streams: whether further prompts follow, as with `rollout.carry_over`.
    """
    settings = group_settings(
        model.config, sampling, group_size=group_size, max_new_tokens=max_new_tokens
    )
    parts = meshes.batch_shards(mesh)
    own = -(-prompts // parts)
    at_once = own * group_size
    if slots is not None:
        at_once = min(at_once, max(slots // parts, 1))
    groups = own if not streams else 10**9
    groups = min(groups, -(-(at_once + at_once // 2) // group_size))
    queued = max(groups * group_size - at_once, 0)
    rows, unrolled = prompt_rows(groups), not split_over_fsdp(variables)
    apart = programs.ring_apart(unrolled, mesh.devices.flat[0].platform)
    of_parts = functools.partial(_of_parts, mesh, parts)
    prepare = on_mesh(
        mesh,
        lambda: programs.prepare.lower(model, variables, unrolled=unrolled),
    )
    ready = _made(prepare())
    blank = functools.partial(_blank, mesh, model, parts)
    columns = cache_columns(max_new_tokens, max_new_tokens)
    cache = blank(rows=at_once, columns=columns, apart=apart)
    block = blank(rows=rows, columns=prompt_tokens, apart=unrolled)
    width: Any = model.config
    last = of_parts(rows, width.hidden_size, dtype=jnp.dtype(width.dtype))
    kept = block, last
    yield SamplerProgram(
        "prepare",
        prepare,
        (),
        (),
        1,
    )
    count = min(power(groups), power(own))
    new = of_parts(count, prompt_tokens), of_parts(count), of_parts(count)
    half = cache_columns(max_new_tokens, -(-columns // 2))
    first = blank(rows=at_once, columns=cache_columns(max_new_tokens, 0), apart=apart)
    yield SamplerProgram(
        "prefill",
        lambda: programs.prefill.lower(
            model, variables, *new, block, last=last, unrolled=unrolled
        ),
        (ready, *kept, first),
        (new, *kept),
        -(-own // count),
    )
    if half < columns:
        narrow = blank(rows=at_once, columns=half, apart=apart)
        yield SamplerProgram(
            "widen",
            lambda: programs.widen.lower(narrow, of_parts(), columns=columns),
            (ready, *kept, narrow),
            narrow,
            1,
        )
    held = functools.partial(_held, of_parts, jax.random.key_data(jax.random.key(0)))
    waiting = max(at_once // 2 + group_size, queued) if queued or streams else 0
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    start = loops.Start(
        held=held(at_once),
        fed=of_parts(at_once),
        index=of_parts(at_once),
        column=scalar,
        queue=held(waiting) if waiting else None,
        queued=of_parts(),
        floors=of_parts(),
        fewer=scalar,
    )
    given = ready, last, block, cache, start
    yield SamplerProgram(
        "decode",
        lambda: loops.advance.lower(
            model,
            *given,
            settings=settings,
            turns=min(max_new_tokens, MOST_TURNS),
            impl=str(jax.random.key_impl(jax.random.key(0))),
            aligned=not waiting and at_once == rows * group_size,
        ),
        given,
        given,
        # One after the other in a slot, each to its limit.
        -(-own * group_size // at_once) * max_new_tokens,
    )


def on_mesh(mesh: Mesh, lower: Callable[[], Lowered]) -> Callable[[], Lowered]:
    """A function that lowers on a mesh, with the rules of its logical axes."""

    def lowered() -> Lowered:
        with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
            return lower()

    return lowered


def _held(of_parts: Callable[..., Any], key: Any, count: int) -> loops.Held:
    numbers = of_parts(count)
    keys = of_parts(count, *key.shape, dtype=key.dtype)
    return loops.Held(*[numbers] * 3, keys)


def _of_parts(mesh: Mesh, parts: int, *shape: int, dtype: Any = jnp.int32) -> Any:
    """The shape of an array with a leading axis of parts, split over the devices."""
    where = meshes.batch_sharding(mesh)
    return jax.ShapeDtypeStruct((parts, *shape), dtype, sharding=where)


def _blank(
    mesh: Mesh, model: SlotDecoder, parts: int, *, rows: int, columns: int, apart: bool
) -> PyTree:
    """The shapes of what `empty` makes, with its shardings."""
    make = functools.partial(
        programs.empty, model, parts=parts, rows=rows, columns=columns, unrolled=apart
    )

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        axes = programs.axes_of(leaf.ndim)
        return _placed(leaf, meshes.parameter_shardings(axes, leaf, mesh))

    return jax.tree.map(place, jax.eval_shape(make))


def _made(lowered: Lowered) -> PyTree:
    """The shapes of what a program makes, with the shardings that XLA gives them."""
    compiled = lowered.compile()
    return jax.tree.map(_placed, compiled.out_info, compiled.output_shardings)


def _placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
