"""What has been drawn of each completion, on the host."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, UInt32

from grpo_jax.rollout._forced import Forced
from grpo_jax.rollout._loop import Loop
from grpo_jax.rollout.sampler import Completions

# Arrays with an entry for each group, and for each completion.
_OF_GROUPS = ("prompt_lengths", "begun")
_OF_COMPLETIONS = ("tokens", "logp", "versions", "sampled", "lengths", "known")
_OF_COMPLETIONS += ("ended", "keys")


class Drawn:
    """Groups with their prompts, random keys and tokens.

    A completion has the number group x group_size + sample, and an entry of that number
    in the arrays. The number of a group that was forgotten is given to another.

    Attributes:
      prompts: token ids of each group's prompt.
      prompt_lengths: ``[n]``.
      keys: ``[n x G, *k]`` the data of the key of each completion.
      impl: of the keys.
      tokens: ``[n x G, T]``, with `logp` in nats and `versions` of the weights.
      sampled: ``[n x G, T]`` which tokens the policy drew; the others were given.
      lengths: ``[n x G]`` how many tokens have a log-probability.
      known: ``[n x G]`` the same, and those that were given and not yet run.
      ended: ``[n x G]``.
      begun: ``[n]`` the version with which a group began; -1 for one that waits.
    """

    def __init__(self, group_size: int, limit: int) -> None:
        self._group_size = group_size
        self.impl = ""
        self.prompts: list[Sequence[int] | None] = []
        self.prompt_lengths = np.zeros(0, np.int32)
        self.begun = np.zeros(0, np.int32)
        self.tokens = np.zeros((0, limit), np.int32)
        self.logp = np.zeros((0, limit), np.float32)
        self.versions = np.zeros((0, limit), np.int32)
        self.sampled = np.zeros((0, limit), bool)
        self.lengths = np.zeros(0, np.int32)
        self.known = np.zeros(0, np.int32)
        self.ended = np.zeros(0, bool)
        self.keys = np.zeros((0, 2), np.uint32)
        # A slot without a completion reads the first one, also where none was added.
        self._grow(1)

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        key: Key[Array, ""],
        numbers: Sequence[int],
        begun: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> list[int]:
        """The numbers of new groups; see `Engine.add`."""
        if begun is not None:
            self._check_begun(begun, count=len(prompts))
        free = [g for g, prompt in enumerate(self.prompts) if prompt is None]
        missing = max(len(prompts) - len(free), 0)
        free += range(len(self.prompts), len(self.prompts) + missing)
        self._grow(missing)
        groups = free[: len(prompts)]
        data, self.impl = _keys(key, numbers, self._group_size)
        if self.keys.shape[1:] != data.shape[2:]:
            self.keys = np.zeros((len(self.keys), *data.shape[2:]), np.uint32)
        for at, (group, prompt) in enumerate(zip(groups, prompts, strict=True)):
            own = self.of(group)
            self.prompts[group], self.prompt_lengths[group] = prompt, len(prompt)
            self.begun[group] = -1
            self.keys[own], self.lengths[own], self.ended[own] = data[at], 0, False
            self.known[own], self.sampled[own] = 0, False
            for sample, given in enumerate(begun[at] if begun else ()):
                self.give(own.start + sample, given)
        return groups

    def give(self, number: int, tokens: Sequence[int]) -> bool:
        """Tokens behind those of a completion; whether it had ended, and goes on."""
        start, ended = int(self.known[number]), bool(self.ended[number])
        self._check_room(tokens, behind=start)
        self.tokens[number, start : start + len(tokens)] = tokens
        self.known[number], self.ended[number] = start + len(tokens), False
        return ended

    def begin(self, groups: Sequence[int], *, version: int) -> None:
        """Note that the prompts of groups are computed, some of them once more."""
        first = [group for group in groups if self.begun[group] < 0]
        self.begun[first] = version

    def going(self) -> list[int]:
        """The completions that have not ended."""
        there = np.repeat(
            [prompt is not None for prompt in self.prompts], self._group_size
        )
        return np.flatnonzero(there & ~self.ended).tolist()

    def of(self, group: int) -> slice:
        """Where the completions of a group are in the arrays."""
        return slice(group * self._group_size, (group + 1) * self._group_size)

    def forget(self, group: int) -> None:
        """Give the group's place to another."""
        self.prompts[group] = None

    def tokens_from(
        self, numbers: np.ndarray, first: np.ndarray, count: int
    ) -> np.ndarray:
        """`count` tokens of each completion from own token `first` on.

        Any where it has none.
        """
        at = np.maximum(first, 0)[..., None] + np.arange(count)
        at = np.minimum(at, self.tokens.shape[1] - 1)
        return self.tokens[np.maximum(numbers, 0)[..., None], at]

    def forced(self, numbers: np.ndarray, index: np.ndarray, count: int) -> Forced:
        """Of each completion the first `count` tokens that are given and not run."""
        left = self.known[np.maximum(numbers, 0)] - index
        arrays: Any = (
            self.tokens_from(numbers, index, count),
            index.astype(np.int32),
            np.clip(left, 0, count).astype(np.int32),
        )
        return Forced(*arrays)

    def record(self, loop: Loop, *, version: int) -> list[int]:
        """Add what a loop has drawn; the numbers of completions that ended."""
        arrays = loop.tickets, loop.indices, loop.tokens, loop.logp
        run = np.asarray(loop.tickets >= 0)
        tickets, *others = (np.asarray(x)[run] for x in arrays)
        self.note(tickets, *others, version=version)
        seen = np.unique(tickets)
        going = np.isin(seen, loop.held.ticket[loop.alive])
        self.ended[seen[~going]] = True
        return seen[~going].tolist()

    def note(
        self,
        numbers: np.ndarray,
        indices: np.ndarray,
        tokens: np.ndarray,
        logp: np.ndarray,
        *,
        version: int,
    ) -> None:
        """Add tokens of completions; those that are there already stay."""
        # A completion that goes on after its end is run again from its beginning.
        new = indices >= self.lengths[numbers]
        at = numbers[new], indices[new]
        self.tokens[at], self.logp[at] = tokens[new], logp[new]
        self.sampled[at] = at[1] >= self.known[at[0]]
        self.versions[at] = version
        np.maximum.at(self.lengths, at[0], at[1] + 1)
        self.known = np.maximum(self.known, self.lengths)

    def completions(
        self, groups: Sequence[int], *, stop_ids: Sequence[int], pad_id: int
    ) -> tuple[Completions, Int[np.ndarray, "n G T"]]:
        """What was drawn of groups that have ended, and the version of each token."""
        # Of integers also where a process has no group.
        first = np.array(groups, int)[:, None] * self._group_size
        at = np.arange(self._group_size) + first
        tokens, lengths = self.tokens[at], self.lengths[at]
        last = np.take_along_axis(tokens, lengths[..., None] - 1, axis=-1)[..., 0]
        mask = np.arange(tokens.shape[-1]) < lengths[..., None]
        sampled = mask & self.sampled[at]
        arrays: Any = {
            "tokens": np.where(mask, tokens, pad_id).astype(np.int32),
            "lengths": lengths,
            "logp": np.where(sampled, self.logp[at], np.float32(0.0)),
            "finished": np.isin(last, stop_ids),
            "sampled": sampled,
        }
        return Completions(**arrays), self.versions[at]

    def state(self, kept: Bool[np.ndarray, " n"], *, width: int) -> dict[str, Any]:
        """The groups that are `kept` as arrays, with prompts of `width` tokens."""
        prompts = np.zeros((len(kept), width), np.int32)
        for group in np.flatnonzero(kept):
            tokens: Any = self.prompts[group]
            prompts[group, : self.prompt_lengths[group]] = tokens
        arrays = {name: vars(self)[name] for name in (*_OF_GROUPS, *_OF_COMPLETIONS)}
        impl = np.frombuffer(self.impl.encode(), np.uint8).astype(np.int32)
        return arrays | {
            "prompts": prompts,
            "kept": kept.astype(np.int32),
            "impl": impl,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken."""
        for name in (*_OF_GROUPS, *_OF_COMPLETIONS):
            vars(self)[name] = state[name].copy()
        self.impl = state["impl"].astype(np.uint8).tobytes().decode()
        self.prompts = [
            row[:length].tolist() if kept > 0 else None
            for row, length, kept in zip(
                state["prompts"], self.prompt_lengths, state["kept"], strict=True
            )
        ]

    def _check_begun(
        self, begun: Sequence[Sequence[Sequence[int]]], *, count: int
    ) -> None:
        given = [len(group) for group in begun]
        if given != [self._group_size] * count:
            raise ValueError(
                f"begun must have {self._group_size} beginnings for each of {count} "
                f"prompts, got {given}; give an empty one where there is none."
            )
        for group in begun:
            for tokens in group:
                self._check_room(tokens, behind=0)

    def _check_room(self, tokens: Sequence[int], *, behind: int) -> None:
        limit = self.tokens.shape[1]
        if behind + len(tokens) >= limit:
            raise ValueError(
                f"{len(tokens)} given tokens behind {behind} leave no room for one to "
                f"be drawn, as a completion has at most {limit}; give fewer tokens, or "
                "raise max_new_tokens."
            )

    def _grow(self, groups: int) -> None:
        def longer(x: np.ndarray, rows: int) -> np.ndarray:
            return np.pad(x, [(0, rows), *[(0, 0)] * (x.ndim - 1)])

        self.prompts += [None] * groups
        for names, rows in (
            (_OF_GROUPS, groups),
            (_OF_COMPLETIONS, groups * self._group_size),
        ):
            for name in names:
                vars(self)[name] = longer(vars(self)[name], rows)


def _keys(
    key: Key[Array, ""], numbers: Sequence[int], group_size: int
) -> tuple[np.ndarray, str]:
    """The data ``[n, G, *k]`` of a key for each completion, and their kind.

    The order (prompt, sample, token) fixes all random numbers.
    """
    keys = _folded(key, np.asarray(numbers, np.uint32), group_size)
    return np.asarray(jax.random.key_data(keys)), str(jax.random.key_impl(key))


@functools.partial(jax.jit, static_argnames=("group_size",))
def _folded(
    key: Key[Array, ""], numbers: UInt32[Array, " n"], group_size: int
) -> Key[Array, "n G"]:
    fold = jax.random.fold_in
    of_prompts = jax.vmap(fold, (None, 0))(key, numbers)
    of_samples = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))
    return of_samples(of_prompts, jnp.arange(group_size))
