"""Carry-over: a step ends when enough groups are complete; the next continues others.

No step then waits for its longest completion. A token keeps the log-probability and the
version of the policy it was drawn with, and the cache keeps its keys and values, as in
PipelineRL (Piché et al. 2025, https://arxiv.org/abs/2509.19128).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key, PyTree

from grpo_jax.config import RolloutConfig, SamplingConfig, TrainConfig
from grpo_jax.models.protocol import LanguageModel, SlotDecoder
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout._engine import Engine
from grpo_jax.rollout._settings import GroupSettings
from grpo_jax.rollout.encoding import bucket
from grpo_jax.rollout.sampler import Completions, Sampler, cut

# Items of a checkpoint.
_HOST, _DEVICES = "carried", "carried_cache"


class Carried(NamedTuple):
    """The groups of a step.

    Attributes:
      positions: of their prompts in the run.
      completions: of N groups.
      staleness: ``[N, G, T]`` steps between the policy that drew a token and that of
        the step; 0 in the padding.
      began_before: ``[N]`` whether the prompt was computed by an earlier policy.
    """

    positions: list[int]
    completions: Completions
    staleness: Int[np.ndarray, "N G T"]
    began_before: Bool[np.ndarray, " N"]


class CarryOver:
    """A stream of groups, of which each step takes those that are complete.

    At most ``wanted x (max_staleness + 1)`` groups have begun and are not taken. With
    this bound every group can be taken at most `max_staleness` steps after it began:
    each step waits for the groups that could not be in time otherwise, and takes the
    oldest of those that are complete.
    """

    def __init__(
        self,
        engine: Engine,
        weights: Callable[[], tuple[PyTree, int]],
        prompt_of: Callable[[int], Sequence[int]],
        key: Key[Array, ""],
        *,
        prompts_per_step: int,
        max_staleness: int,
    ) -> None:
        """A stream that has not begun.

        Args:
          weights: the policy's Linen variables and its version, as they are now.
          prompt_of: token ids of the prompt at a position of the run.
          key: from which those of all completions follow.
          prompts_per_step: of all processes; each takes its share.
          max_staleness: steps after which a group that began must be taken.
        """
        self._engine, self._weights = engine, weights
        self._prompt_of, self._key = prompt_of, key
        share = meshes.own_share(prompts_per_step)
        self._wanted, self._bound = share.stop - share.start, max_staleness
        self._first, self._all = share.start, prompts_per_step
        self._next = 0  # the first own prompt that was never added
        self._again: list[int] = []  # own prompts that must be drawn anew
        self._numbers: dict[int, int] = {}  # the own prompt of each group
        self._complete: list[int] = []  # groups, in the order in which they ended
        # What the last call gave, and the version to which it belongs.
        self._given: list[int] = []
        self._given_at = -1

    def sample(self) -> Carried:
        """The groups of a step of the policy as it is now.

        A repeated call with the same version gives the same groups.
        """
        variables, version = self._weights()
        self._forget(version)
        engine = self._engine
        engine.update(variables, version=version)
        try:
            while True:
                self._top_up()
                missing = 0 if self._enough(version) else 1
                ended = engine.turn(missing)
                if ended is None:
                    break
                drawn = engine.drawn
                groups = {one.group for one in ended}
                done = [group for group in groups if drawn.ended[drawn.of(group)].all()]
                # The number of a group says nothing; that of its prompt does.
                self._complete += sorted(done, key=self._numbers.__getitem__)
        finally:
            engine.release()
        began = engine.drawn.begun
        oldest = sorted(self._complete, key=lambda group: began[group])
        self._given, self._given_at = oldest[: self._wanted], version
        completions, versions = engine.completions(self._given)
        # All processes go on with the same shapes.
        longest = meshes.gather_rows(np.array([completions.lengths.max(initial=1)]))
        kept = bucket(int(longest.max()), limit=versions.shape[-1])
        completions = cut(completions, kept)
        versions = versions[..., :kept]
        positions = [self._position(self._numbers[group]) for group in self._given]
        staleness = np.where(completions.mask, version - versions, 0)
        return Carried(positions, completions, staleness, began[self._given] < version)

    def state(self, *, version: int) -> dict[str, PyTree]:
        """What continues, as arrays; the policy is `version` when it does."""
        self._forget(version)
        drawn = self._engine.drawn
        began = [group for group in self._numbers if drawn.begun[group] >= 0]
        # Groups that have not begun are added again: nothing of them is drawn.
        waiting = [n for g, n in self._numbers.items() if g not in began]
        own = {"next": np.array([min([*waiting, self._next])], np.int32)}
        if not began:
            return {_HOST: _of_all(own)}
        order, numbers = np.full((2, len(drawn.prompts)), -1, np.int32)
        order[self._complete] = np.arange(len(self._complete))
        numbers[began] = [self._numbers[group] for group in began]
        own |= {"order": order, "numbers": numbers}
        own |= self._engine.host_state(numbers >= 0)
        return {_HOST: _of_all(own), _DEVICES: self._engine.device_state()}

    def like(
        self, shapes: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """What of a checkpoint with these arrays, by path, `restore` takes."""
        if f"{_HOST}/next" not in shapes:
            return {}
        taken = {_HOST: _below(_HOST, shapes)}
        own = {name: x.shape[1:] for name, x in taken[_HOST].items()}
        if self._engine.fits(own):
            arrays = _below(_DEVICES, shapes)
            taken[_DEVICES] = {k: self._engine.placed(x) for k, x in arrays.items()}
        return taken

    def restore(self, saved: Mapping[str, Mapping[str, Any]]) -> int:
        """Continue from a checkpoint; how many groups must be drawn anew.

        They must where the batch is split over other devices than before.

        Raises:
          ValueError: if another number of processes saved it.
        """
        if _HOST not in saved:
            return 0
        stacked = {name: np.asarray(x) for name, x in saved[_HOST].items()}
        processes = len(stacked["next"])
        if processes != jax.process_count():
            raise ValueError(
                f"a run with rollout.carry_over continues on {processes} processes as "
                f"before, got {jax.process_count()}; each has groups of its own."
            )
        host = {name: x[jax.process_index()] for name, x in stacked.items()}
        self._next = int(host["next"][0])
        if "numbers" not in host:
            return 0
        numbers, order = host["numbers"], host["order"]
        if _DEVICES not in saved:
            self._again = sorted(numbers[numbers >= 0].tolist())
            return len(self._again)
        self._engine.restore(host, saved[_DEVICES])
        self._numbers = {int(g): int(numbers[g]) for g in np.flatnonzero(numbers >= 0)}
        ended = np.flatnonzero(order >= 0)
        self._complete = ended[np.argsort(order[ended])].tolist()
        return 0

    def _position(self, number: int) -> int:
        """The position in the run of one of this process's prompts."""
        step, within = divmod(number, self._wanted)
        return step * self._all + self._first + within

    def _forget(self, version: int) -> None:
        """Give up the groups of an earlier step, which has learned from them."""
        if version == self._given_at:
            return
        for group in self._given:
            self._complete.remove(group)
            del self._numbers[group]
            self._engine.drawn.forget(group)
        self._given = []

    def _top_up(self) -> None:
        """Add as many prompts as may begin."""
        most = self._wanted * (self._bound + 1)
        missing = most - len(self._numbers)
        numbers, self._again = self._again[:missing], self._again[missing:]
        more = missing - len(numbers)
        numbers += range(self._next, self._next + more)
        self._next += more
        if numbers:
            positions = [self._position(number) for number in numbers]
            prompts = [self._prompt_of(position) for position in positions]
            groups = self._engine.add(prompts, positions, self._key)
            self._numbers |= dict(zip(groups, numbers, strict=True))

    def _enough(self, version: int) -> bool:
        """Whether a step can be made, and all later ones in time."""
        began = self._engine.drawn.begun
        # A group that begins at a version must be taken by the step `_bound` later.
        due = {g: began[g] + self._bound for g in self._numbers if began[g] >= 0}
        complete = [due[group] for group in self._complete]
        return len(complete) >= self._wanted and all(
            sum(end <= last for end in due.values())
            - sum(end <= last for end in complete)
            <= self._wanted * (last - version)
            for last in range(version, version + self._bound + 1)
        )


@runtime_checkable
class CarryingSampler(Protocol):
    """A sampler that can continue completions in the next step."""

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
        """A `CarryOver` of the prompts of a run, in their order.

        Args:
          prompt_of: token ids of the prompt at a position.
          key: from which those of all completions follow.
          longest: tokens of the longest prompt.
        """
        ...


def carry_over(
    model: LanguageModel,
    mesh: Mesh,
    weights: Callable[[], tuple[PyTree, int]],
    prompt_of: Callable[[int], Sequence[int]],
    key: Key[Array, ""],
    settings: GroupSettings,
    *,
    prompt_tokens: int,
    prompts_per_step: int,
    rollout: RolloutConfig,
) -> CarryOver:
    """A stream with an engine of its own; the arguments are those of both.

    Raises:
      ValueError: for a model without slots.
    """
    if not isinstance(model, SlotDecoder):
        raise ValueError(
            f"rollout.carry_over needs a model with slots, got {type(model).__name__}, "
            "which has no `decode_slots`; set it to false."
        )
    slots = rollout.slots or prompts_per_step * settings.group_size
    engine = Engine(
        model,
        settings,
        mesh=mesh,
        slots=max(slots // meshes.batch_shards(mesh), 1),
        prompt_tokens=prompt_tokens,
        streams=True,
    )
    return CarryOver(
        engine,
        weights,
        prompt_of,
        key,
        prompts_per_step=prompts_per_step,
        max_staleness=rollout.max_staleness,
    )


def open_stream(
    sampler: Sampler,
    prompt_of: Callable[[int], Sequence[int]],
    config: TrainConfig,
    *,
    longest: int,
    sampling: SamplingConfig,
) -> CarryOver:
    """The stream of a run; the arguments are those of `CarryingSampler.stream`.

    Raises:
      ValueError: for a sampler or a model that cannot continue completions.
    """
    if not isinstance(sampler, CarryingSampler):
        raise ValueError(
            "rollout.carry_over needs a sampler that continues completions, got "
            f"{type(sampler).__name__}, which has no `stream`; set it to false."
        )
    return sampler.stream(
        prompt_of,
        # Positions are unique in a run: no step is folded in.
        jax.random.fold_in(jax.random.key(config.seed), 0),
        longest=longest,
        prompts_per_step=config.prompts_per_step,
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        sampling=sampling,
        rollout=config.rollout,
    )


def _of_all(own: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """Arrays of all processes, stacked; shorter ones are padded with -1."""
    stacked = {}
    for name, x in own.items():
        shapes = meshes.gather_rows(np.array([x.shape], np.int64))
        wider = [(0, int(n)) for n in shapes.max(axis=0) - x.shape]
        fill = 0 if x.dtype == np.uint32 else -1
        padded = np.pad(x, wider, constant_values=fill) if np.any(wider) else x
        stacked[name] = jnp.asarray(meshes.gather_rows(padded[None]))
    return stacked


def _below(
    name: str, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of one item of a checkpoint."""
    start = f"{name}/"
    return {k.removeprefix(start): x for k, x in shapes.items() if k.startswith(start)}
