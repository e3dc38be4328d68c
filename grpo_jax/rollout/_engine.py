"""The engine: slots that decode together, each at its own place in its own sequence.

A compiled loop advances all slots by one token at a time and puts waiting completions
into slots that become free. It returns to the host for what it cannot do alone: further
prompts, a wider ring, fewer slots. Programs are compiled for the few sizes that occur.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key, PyTree

from grpo_jax.models.limits import cache_columns, prompt_rows
from grpo_jax.models.protocol import SlotDecoder
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout import _loop as loops
from grpo_jax.rollout import _programs as programs
from grpo_jax.rollout._drawn import Drawn
from grpo_jax.rollout._extend import extend, run_given
from grpo_jax.rollout._forced import width
from grpo_jax.rollout._loop import Held, Loop, Start
from grpo_jax.rollout._prompts import power, prompt_blocks
from grpo_jax.rollout._settings import GroupSettings
from grpo_jax.rollout._slots import NONE, Demand, SlotPlan
from grpo_jax.rollout._stored import Stored
from grpo_jax.rollout.sampler import Completions

# Most tokens of a slot between two visits of the host.
MOST_TURNS = 128
# Limits up to this are over before a program for fewer slots has been compiled.
_SHORT = 16


class Ended(NamedTuple):
    """Which completion has ended: a group's number, and its own within the group."""

    group: int
    sample: int


class Engine:
    """Slots, what they hold, and the weights they decode with.

    Attributes:
      drawn: the groups that were added and not yet forgotten, with their tokens.
    """

    def __init__(
        self,
        model: SlotDecoder,
        settings: GroupSettings,
        *,
        mesh: Mesh | None,
        slots: int,
        prompt_tokens: int,
        streams: bool = False,
    ) -> None:
        """An engine without groups, and without weights until `update`.

        Args:
          slots: completions that decode together on each device of the batch.
          prompt_tokens: to how many tokens prompts are padded.
          streams: whether groups are added again and again. It then keeps its slots,
            and a turn never lasts until all have ended.
        """
        self._model, self._mesh = model, mesh
        self._settings = settings
        self._group_size, self._limit = settings.group_size, settings.max_new_tokens
        self._width, self._streams = prompt_tokens, streams
        own = 1
        if mesh is not None:
            own = max(meshes.batch_shards(mesh) // jax.process_count(), 1)
        self._plan = SlotPlan(own, group_size=self._group_size, slots=slots)
        self.drawn = Drawn(self._group_size, self._limit)
        self._column = 0
        self._columns = cache_columns(self._limit, 0)
        # Prompts that have a row, and are not computed yet.
        self._new: list[list[tuple[int, int]]] = [[] for _ in range(own)]
        self._stored: Any = None  # a `Stored`, from the first turn on

    def update(self, variables: PyTree, *, version: int = 0) -> None:
        """Decode with these weights, cast once, from the next token on."""
        self._variables, self._version = variables, version
        # Where fsdp splits the parameters, layers stay stacked: the loop then gathers
        # one layer at a time. XLA would move the gathers of separate layers in front of
        # the loop, and all gathered layers would stay in memory.
        self._unrolled = programs.layers_apart(variables)
        self._ready = programs.prepare(self._model, variables, unrolled=self._unrolled)

    def release(self) -> None:
        """Forget the weights; what was drawn, and its keys and values, stay."""
        self._variables = self._ready = None

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        key: Key[Array, ""],
        begun: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> list[int]:
        """Groups to be drawn, after those that were added before; their numbers.

        Args:
          numbers: what identifies each prompt in its random numbers.
          begun: of each prompt's G completions the tokens that they begin with. They
            count as tokens of the completion, and stop tokens among them end nothing.

        Raises:
          ValueError: for beginnings of another number of completions, or one that
            leaves no room for a further token.
        """
        groups = self.drawn.add(prompts, key, numbers, begun)
        self._plan.add(groups)
        return groups

    def feed(self, completion: Ended, tokens: Sequence[int]) -> None:
        """Give tokens to a completion, behind those that it has: a tool's result.

        One that had ended goes on in the next free slot, where it is run again. No
        other completion waits for it.

        Raises:
          ValueError: if they leave no room for a further token.
        """
        number = completion.group * self._group_size + completion.sample
        if self.drawn.give(number, tokens):
            self._plan.again(number)

    def turn(self, wanted: int) -> list[Ended] | None:
        """The completions that end next; on several processes all call it together.

        Args:
          wanted: how many completions the caller waits for. None is returned when all
            processes have what they want, or nothing is left.
        """
        plan = self._plan
        # Behind the slots, so that the loop need not wait for the host. Without a queue
        # the slots take all there is.
        ahead = plan.slots // 2 if plan.waiting or any(plan.queues) else 0
        for part, new in enumerate(plan.admit(ahead)):
            self._new[part] += new
            self.drawn.begin([group for _, group in new], version=self._version)
        demand = self._demand(wanted)
        if not demand.wanted or not demand.total:
            return None
        self._make_room(demand)
        if demand.new:
            self._prefill(most=demand.new)
        while demand.long:
            self._extend(demand)
            demand = self._demand(wanted)
        loop: Any = self._advance(demand)  # on the host
        held = np.where(loop.alive, loop.held.ticket, NONE)
        plan.record(held, loop.index, loop.taken)
        self._column = int(loop.column[0])
        return [
            Ended(*divmod(number, self._group_size))
            for number in self.drawn.record(loop, version=self._version)
        ]

    def completions(
        self, groups: Sequence[int]
    ) -> tuple[Completions, Int[np.ndarray, "n G T"]]:
        """What was drawn of groups that have ended, and the version of each token."""
        pad_id = self._model.config.pad_token_id or 0
        stop_ids = self._settings.stop_ids
        return self.drawn.completions(groups, stop_ids=stop_ids, pad_id=pad_id)

    def host_state(self, kept: Bool[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """What `restore` needs from the host, of the groups that are `kept`.

        They are all that have begun.
        """
        pending = np.zeros(self._plan.prompts.shape, np.int32)
        for part, pairs in enumerate(self._new):
            pending[part, [row for row, _ in pairs]] = 1
        return {
            "column": np.array([self._column], np.int32),
            "pending": pending,
            **self._plan.state(),
            **self.drawn.state(kept, width=self._width),
        }

    def device_state(self) -> dict[str, Array]:
        """What `restore` needs from the devices."""
        return self._stored.named()

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a `host_state` of these shapes is of an engine with these parts."""
        return shapes.get("held") == self._plan.held.shape

    def placed(self, array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """An array of `device_state` with its sharding."""
        if self._mesh is None:
            return array
        axes = programs.axes_of(array.ndim)
        where = meshes.parameter_shardings(axes, array, self._mesh)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    def restore(
        self, host: Mapping[str, np.ndarray], devices: Mapping[str, Array]
    ) -> None:
        """Continue where `host_state` and `device_state` were taken."""
        self.drawn.restore(host)
        self._plan.restore(host, self.drawn.going())
        self._new = [
            [(int(row), int(groups[row])) for row in np.flatnonzero(pending)]
            for pending, groups in zip(
                host["pending"] > 0, self._plan.prompts, strict=True
            )
        ]
        self._stored = Stored.of_named(devices)
        self._columns = self._stored.columns
        self._column = int(host["column"][0])

    def _demand(self, wanted: int) -> Demand:
        """What all processes need, which must run the same programs."""
        own = self._plan.demand(self._new, wanted=wanted, known=self.drawn.known)
        every = meshes.gather_rows(np.array([own], np.int64))
        total = Demand(*every.sum(axis=0).tolist())
        most = Demand(*every.max(axis=0).tolist())
        return most._replace(
            total=total.total, waiting=total.waiting, wanted=total.wanted
        )

    def _make_room(self, demand: Demand) -> None:
        """Rows for new prompts, columns for long sequences, or fewer slots."""
        plan, stored = self._plan, self._stored
        rows = prompt_rows(demand.rows)
        if stored is None:
            plan.widen_prompts(rows)
            self._columns = cache_columns(self._limit, demand.columns)
            self._stored = self._empty(rows)
            return
        before = stored.last.shape[1]
        slots = plan.enough_slots(demand.alive) if self._shrinks(demand) else plan.slots
        if slots < plan.slots:
            rows = min(prompt_rows(demand.rows), before)
            order, old = plan.shrink(slots, rows)
            stored = stored.with_prompts(self._place(old))
            stored = stored.replace(
                cache=programs.take_rows(stored.cache, self._place(order))
            )
        elif rows > before:
            plan.widen_prompts(rows)
            old = np.minimum(np.arange(rows), before - 1)
            old = np.broadcast_to(old, plan.prompts.shape)
            stored = stored.with_prompts(self._place(old))
        columns = cache_columns(self._limit, demand.columns)
        if columns > self._columns:
            at = np.full(len(plan.held), self._column, np.int32)
            wider = programs.widen(stored.cache, self._place(at), columns=columns)
            stored = stored.replace(cache=wider)
            self._columns, self._column = columns, self._columns
        self._stored = stored

    def _shrinks(self, demand: Demand) -> bool:
        more = demand.waiting or demand.queue or self._streams
        return not more and self._limit > _SHORT

    def _empty(self, rows: int) -> Stored:
        (parts, slots), config = self._plan.held.shape, self._model.config
        width: Any = config
        last = np.zeros((parts, rows, width.hidden_size), jnp.dtype(config.dtype))
        if self._mesh is not None:
            parts = meshes.batch_shards(self._mesh)
        blank = functools.partial(programs.empty, self._model, parts=parts)
        platform = jax.default_backend()
        apart = self._unrolled, programs.ring_apart(self._unrolled, platform)
        return Stored(
            cache=blank(rows=slots, columns=self._columns, unrolled=apart[1]),
            prompts=blank(rows=rows, columns=self._width, unrolled=apart[0]),
            last=self._place(last),
        )

    def _prefill(self, *, most: int) -> None:
        """Compute the new prompts, of which no part has more than `most`."""
        stored, prompts = self._stored, self.drawn.prompts
        blocks = prompt_blocks(
            self._new,
            cast(list[Sequence[int]], prompts),  # those of new groups are there
            width=self._width,
            most=most,
            nowhere=stored.last.shape[1],
            # Each block would gather weights that fsdp splits, or dequantize its own.
            by_length=self._group_size == 1 and self._unrolled,
        )
        for block in blocks:
            shared, last = programs.prefill(
                self._model,
                self._variables,
                *map(self._place, block),
                stored.prompts,
                last=stored.last,
                unrolled=self._unrolled,
            )
            stored = stored.replace(prompts=shared, last=last)
        self._stored = stored
        self._new = [[] for _ in self._new]

    def _extend(self, demand: Demand) -> None:
        """Run many given tokens of some slots at once."""
        stored = self._stored
        cache = run_given(
            functools.partial(
                extend, self._model, self._ready, sampling=self._settings.sampling
            ),
            (stored.last, stored.prompts, stored.cache),
            self._plan,
            self.drawn,
            most=(power(demand.long), power(demand.longest)),
            column=self._column,
            version=self._version,
            place=self._place,
        )
        self._stored = stored.replace(cache=cache)

    def _advance(self, demand: Demand) -> Loop:
        plan, stored = self._plan, self._stored
        turns, queue = min(self._limit, MOST_TURNS), None
        forced = width(demand.given, turns=turns)
        if demand.queue or self._streams:
            # Always of one size: what the queue is filled to, and a group more.
            size = max(plan.slots // 2 + self._group_size, demand.queue)
            waiting = np.full((len(plan.held), size), NONE)
            for own, numbers in zip(waiting, plan.queues, strict=True):
                own[: len(numbers)] = numbers
            queue = self._held(waiting, np.zeros_like(waiting), forced)
        queued = np.array([len(numbers) for numbers in plan.queues], np.int32)
        # A part of which all have ended does not hold up the others.
        living, some = plan.alive.sum(axis=1), max(plan.slots // 16, 1)
        floors = np.full(len(living), -1, np.int32)
        if plan.waiting:
            floors[:] = plan.slots - some
        elif self._streams:
            floors[:] = np.where(living > 0, np.maximum(living - some, 0), -1)
        fewer = -(-plan.slots // 2) if self._shrinks(demand) and plan.slots > 1 else 0
        start: dict[str, Any] = {
            "held": self._held(plan.held, plan.index, forced),
            "fed": self.drawn.tokens_from(plan.held, plan.index - 1, 1)[..., 0],
            "index": plan.index,
            "column": np.int32(self._column),
            "queue": queue,
            "queued": queued,
            "floors": floors,
            "fewer": np.int32(fewer),
        }
        loop, cache = loops.advance(
            self._model,
            self._ready,
            stored.last,
            stored.prompts,
            stored.cache,
            Start(**jax.tree.map(self._place, start)),
            settings=self._settings,
            turns=turns,
            impl=self.drawn.impl,
            aligned=not (demand.scattered or self._streams)
            and plan.slots == stored.last.shape[1] * self._group_size,
        )
        self._stored = stored.replace(cache=cache)
        return meshes.to_host(loop)

    def _held(self, numbers: np.ndarray, index: np.ndarray, forced: int) -> Held:
        plan = self._plan
        rows = [plan.rows_of(part, of_part) for part, of_part in enumerate(numbers)]
        some = np.maximum(numbers, 0)
        held: dict[str, Any] = {
            "ticket": numbers.astype(np.int32),
            "row": np.array(rows, np.int32),
            "prompt_lengths": self.drawn.prompt_lengths[some // self._group_size],
            "keys": self.drawn.keys[some],
            "forced": self.drawn.forced(numbers, index, forced) if forced else None,
        }
        return Held(**held)

    def _place(self, x: Any) -> Any:
        """An array of the parts of all processes, from that of this one.

        A number is the same everywhere, and stays as it is.
        """
        if np.ndim(x) == 0:
            return x
        # A copy: on a CPU an array of JAX may be the memory of NumPy's, and the plan
        # changes while a program that was started still reads.
        x = x.copy()
        return jnp.asarray(x) if self._mesh is None else meshes.to_mesh(self._mesh, x)
