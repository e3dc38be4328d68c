"""The programs of the sampler for arrays that are only described.

For a mesh of devices that need not be here. The sizes are those of a rollout whose
completions all reach the limit, when the sampler holds the most.
"""

import contextlib
import dataclasses
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
from grpo_jax.rollout import _loop as loops
from grpo_jax.rollout import _programs as programs
from grpo_jax.rollout._engine import MOST_TURNS
from grpo_jax.rollout._prompts import power
from grpo_jax.rollout._settings import GroupSettings, group_settings


class _SamplerProgram(NamedTuple):
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
) -> Iterator[_SamplerProgram]:
    """The programs that complete prompts, in the order in which they run.

    Each is lowered when it is asked for. If the weights cannot be prepared, for example
    because they do not fit, there are no further ones: the others read the results.

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
    # As the engine admits them: behind the slots wait half as many.
    groups = -(-(at_once + at_once // 2) // group_size)
    shapes = _Shapes(
        model=model,
        variables=variables,
        mesh=mesh,
        settings=settings,
        prompt_tokens=prompt_tokens,
        slots=at_once,
        prompts=own,
        groups=groups if streams else min(groups, own),
        streams=streams,
    )
    yield shapes.prepare()
    if not shapes.is_prepared:
        return
    yield shapes.prefill()
    if shapes.half < shapes.columns:
        yield shapes.widen()
    yield shapes.decode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shapes:
    """What the sampler holds, of each part of the mesh.

    Attributes:
      slots: completions that decode together.
      prompts: prompts of a rollout.
      groups: prompts that have a row.
    """

    model: SlotDecoder
    variables: PyTree
    mesh: Mesh
    settings: GroupSettings
    prompt_tokens: int
    slots: int
    prompts: int
    groups: int
    streams: bool

    def prepare(self) -> _SamplerProgram:
        return _SamplerProgram("prepare", lambda: self._prepare, (), (), 1)

    def prefill(self) -> _SamplerProgram:
        count = min(power(self.groups), power(self.prompts))
        new = (
            self._of_parts(count, self.prompt_tokens),
            self._of_parts(count),
            self._of_parts(count),
        )
        block, last = self.kept
        first = self._ring(cache_columns(self.settings.max_new_tokens, 0))

        def lower() -> Lowered:
            given: Any = self.model, self.variables, *new, block
            return programs.prefill.lower(*given, last=last, unrolled=self.unrolled)

        held = self.ready, block, last, first
        times = -(-self.prompts // count)
        return _SamplerProgram("prefill", lower, held, (new, block, last), times)

    def widen(self) -> _SamplerProgram:
        narrow, at = self._ring(self.half), self._of_parts()
        lower = functools.partial(
            programs.widen.lower, narrow, at, columns=self.columns
        )
        return _SamplerProgram(
            "widen", lower, (self.ready, self.kept, narrow), narrow, 1
        )

    def decode(self) -> _SamplerProgram:
        block, last = self.kept
        most, size = self.settings.max_new_tokens, self.settings.group_size
        own = self.ready, last, block, self._ring(self.columns), self._start()
        lower = functools.partial(
            loops.advance.lower,
            self.model,
            *own,
            settings=self.settings,
            turns=min(most, MOST_TURNS),
            impl=str(jax.random.key_impl(jax.random.key(0))),
            aligned=not self.waiting and self.slots == last.shape[1] * size,
        )
        # One after the other in a slot, each to its limit.
        turns = -(-self.prompts * size // self.slots) * most
        return _SamplerProgram("decode", lower, own, own, turns)

    @property
    def unrolled(self) -> bool:
        return programs.layers_apart(self.variables)

    @property
    def columns(self) -> int:
        """Columns of the ring when the completions are long."""
        most = self.settings.max_new_tokens
        return cache_columns(most, most)

    @property
    def half(self) -> int:
        """Columns before the ring grew to all."""
        return cache_columns(self.settings.max_new_tokens, -(-self.columns // 2))

    @property
    def waiting(self) -> int:
        """Places of the queue; 0 without one."""
        size = self.settings.group_size
        queued = max(self.groups * size - self.slots, 0)
        return max(self.slots // 2 + size, queued) if queued or self.streams else 0

    @functools.cached_property
    def _prepare(self) -> Lowered:
        with _mesh_of_run(self.mesh):
            return programs.changed.lower(
                self.model, self.variables, unrolled=self.unrolled
            )

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` compiles; who compiles that program learns why not."""
        try:
            return self.ready is not None
        except Exception:  # what a compiler refuses has no type of its own
            return False

    @functools.cached_property
    def ready(self) -> PyTree:
        """The weights as a loop reads them, where XLA lays them."""
        compiled = self._prepare.compile()
        made = jax.tree.map(_placed, compiled.out_info, compiled.output_shardings)
        return programs.with_given(made, self.variables)

    @functools.cached_property
    def kept(self) -> tuple[PyTree, Any]:
        """Keys and values of prompts, and hidden states behind them."""
        rows = prompt_rows(self.groups)
        block = self._blank(rows, self.prompt_tokens, apart=self.unrolled)
        config: Any = self.model.config
        dtype = jnp.dtype(config.dtype)
        return block, self._of_parts(rows, config.hidden_size, dtype=dtype)

    def _ring(self, columns: int) -> PyTree:
        """Keys and values of own tokens."""
        platform = self.mesh.devices.flat[0].platform
        apart = programs.ring_apart(self.unrolled, platform)
        return self._blank(self.slots, columns, apart=apart)

    def _blank(self, rows: int, columns: int, *, apart: bool) -> PyTree:
        parts = meshes.batch_shards(self.mesh)
        sizes: dict[str, Any] = {"parts": parts, "rows": rows, "columns": columns}
        shapes = jax.eval_shape(
            functools.partial(programs.empty, self.model, unrolled=apart, **sizes)
        )

        def place(leaf: Any) -> jax.ShapeDtypeStruct:
            axes = programs.axes_of(leaf.ndim)
            return _placed(leaf, meshes.parameter_shardings(axes, leaf, self.mesh))

        return jax.tree.map(place, shapes)

    def _start(self) -> loops.Start:
        scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
        return loops.Start(
            held=self._held(self.slots),
            fed=self._of_parts(self.slots),
            index=self._of_parts(self.slots),
            column=scalar,
            queue=self._held(self.waiting) if self.waiting else None,
            queued=self._of_parts(),
            floors=self._of_parts(),
            fewer=scalar,
        )

    def _held(self, count: int) -> loops.Held:
        key = jax.random.key_data(jax.random.key(0))
        numbers = self._of_parts(count)
        keys = self._of_parts(count, *key.shape, dtype=key.dtype)
        return loops.Held(numbers, numbers, numbers, keys)

    def _of_parts(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """The shape of an array with a leading axis of parts."""
        parts = meshes.batch_shards(self.mesh)
        where = meshes.batch_sharding(self.mesh)
        return jax.ShapeDtypeStruct((parts, *shape), dtype, sharding=where)


def on_mesh(mesh: Mesh, lower: Callable[[], Lowered]) -> Callable[[], Lowered]:
    """A function that lowers on a mesh, with the rules of its logical axes."""

    def lowered() -> Lowered:
        with _mesh_of_run(mesh):
            return lower()

    return lowered


@contextlib.contextmanager
def _mesh_of_run(mesh: Mesh) -> Iterator[None]:
    with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
        yield


def _placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
