"""Rows of completions: several behind each other, so that less of them is padding.

Unpacked, each completion has a row of its own, as long as the longest one of the batch.
Packed, the completions of a prompt share rows, of which each prompt has as many as it
needs. The plan is made on the host from the lengths alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from grpo_jax.models._rows import join
from grpo_jax.models.protocol import LanguageModel, RowScorer
from grpo_jax.parallel import mesh as meshes

# Pairs of a query and a key that take as long as all other work for a token, about:
# this depends on model and device. Memory-bound softmax is part of it.
_PAIRS_OF_A_TOKEN = 2048
# Another form is used if it takes at most this share of the time, since more shapes
# mean more programs to compile.
WORTHWHILE = 0.9
# Completions of up to so many tokens have rows of their own: what would be saved is
# less than what the compilation of other shapes takes.
_SHORTEST = 16


class Packing(struct.PyTreeNode):
    """Where own tokens of completions stand in shared rows.

    The batch has A parts of n prompts with n * G * T tokens each, in the order of the
    prompts. Different parts are computed one after the other, or on different devices.
    Of M = n * G + R * S tokens of a part log-probs are computed.

    Attributes:
      source: which token of its part stands at each place; a multiple of T from
        n * G * T on where none does. A completion's tokens stand behind each other in
        one row, from the first to the last but one: the last token is predicted and
        never read. No token stands twice, and a row has completions of one prompt.
    """

    source: Int[Array, "A R S"]

    def rows(
        self, completions: Int[Array, "N G T"]
    ) -> tuple[Int[Array, "A R S"], Int[Array, "A R S"], Int[Array, "A R"]]:
        """The token at each place, its number in its completion, each row's prompt.

        An empty place has any token, as the first one of a completion. Prompts are
        counted within their part; an empty row has any.
        """
        of_prompt = completions.shape[1] * completions.shape[2]
        first = jnp.minimum(self.source[..., 0], self._tokens(completions).shape[1] - 1)
        tokens = self._read(completions, self.source)
        return tokens, self.source % completions.shape[2], first // of_prompt

    def targets(self, completions: Int[Array, "N G T"]) -> Int[Array, "A M"]:
        """The first token of each completion, then the token after each place."""
        after = self._read(completions, self.source + 1)
        first = completions[..., 0].reshape(len(after), -1)
        return jnp.concatenate([first, after.reshape(len(after), -1)], axis=1)

    def unpack(
        self, values: Float[Array, "A M"], like: Int[Array, "N G T"]
    ) -> Float[Array, "N G T"]:
        """Values of `targets` where these tokens are in completions; 0 elsewhere."""
        flat = jnp.zeros_like(self._tokens(like), values.dtype)
        after = self.source.reshape(len(flat), -1) + 1
        first = jnp.arange(0, flat.shape[1], like.shape[2])[None]
        first = jnp.broadcast_to(first, (len(flat), first.shape[1]))
        at = jnp.concatenate([first, after], axis=1)
        # Each part by itself: no device writes to another.
        put = jax.vmap(lambda to, at, values: to.at[at].add(values, mode="drop"))
        return put(flat, at, values).reshape(like.shape)

    def of_cuts(self, count: int, tokens: int) -> "Packing":
        """Rows of parts of a group, `count` behind each other for each group.

        A part has the next `tokens` of its group's tokens, and counts them from 0.
        """
        before = tokens * (jnp.arange(self.source.shape[0]) % count)
        return Packing(self.source - before[:, None, None, None])

    def _tokens(self, completions: Int[Array, "N G T"]) -> Int[Array, "A C"]:
        return completions.reshape(self.source.shape[0], -1)

    def _read(
        self, completions: Int[Array, "N G T"], source: Int[Array, "A R S"]
    ) -> Int[Array, "A R S"]:
        tokens = self._tokens(completions)
        at = jnp.minimum(source, tokens.shape[1] - 1).reshape(len(tokens), -1)
        return jnp.take_along_axis(tokens, at, axis=1).reshape(source.shape)


def completion_states(
    model: LanguageModel,
    variables: PyTree,
    prompts: Int[Array, "N P"],
    prompt_lengths: Int[Array, " N"],
    completions: Int[Array, "N G T"],
    *,
    packing: Packing | None,
    with_routers: bool = False,
) -> tuple[Float[Array, "*B M D"], Int[Array, "*B M"], Float[Array, "L A S E"] | None]:
    """Hidden states, the tokens that they predict, and router logits if asked for.

    The tokens are the completions, or `packing.targets` of them. Router logits are
    those of all layers of a mixture for the tokens of its rows: the prompts of a part,
    and behind them own tokens.

    Raises:
      ValueError: for a model that scores a completion per row only.
    """
    method: Any = model.score
    rows: Any = (completions,)
    if packing is not None:
        if not isinstance(model, RowScorer):
            raise ValueError(
                f"{type(model).__name__} has no score_rows for completions that share "
                "a row, which a packed batch needs; leave out Batch.packing."
            )
        method, rows = model.score_rows, packing.rows(completions)
    given = variables, prompts, prompt_lengths, *rows
    if with_routers:
        found, kept = model.apply(*given, method=method, mutable=("routers",))
        routers = next(iter(jax.tree.leaves(kept)), None)
    else:
        found, routers = model.apply(*given, method=method), None
    if packing is None:
        return found, completions, routers
    last, own = found
    first = jnp.broadcast_to(last[:, None], (*completions.shape[:2], last.shape[-1]))
    first = first.reshape(len(own), -1, last.shape[-1])
    return join(first, own), packing.targets(completions), routers


class _Shape(NamedTuple):
    rows: int
    places: int


def pack(
    mask: Bool[np.ndarray, "N G T"],
    prompt_tokens: int,
    *,
    minibatches: int = 1,
    microbatch_size: int | None = None,
    shards: int = 1,
    rival: float = 1.0,
) -> Packing | None:
    """Rows for completions of which the tokens under the mask count, if they pay.

    Tokens behind the last one that counts take no place, so a completion that does not
    count takes none. All processes call this together, each with its own prompts, and
    get the same R and S; these depend on the lengths alone.

    Args:
      prompt_tokens: P, to which prompts are padded.
      minibatches: updates among which the prompts are dealt.
      microbatch_size: completions that an update holds at once; None for all. Where a
        group is cut, each of its parts has rows of its own, and A is N.
      shards: devices that split the prompts, over all processes.
      rival: share of the time that another form takes.

    Returns:
      Rows on the host, or None if they would save less than a tenth of the rival's
      time, or if attention would hold more scores.
    """
    count, group, width = mask.shape
    if width <= _SHORTEST:
        return None
    update = count * jax.process_count() * group // minibatches
    size = min(microbatch_size or update, update)
    cuts = max(group // size, 1)
    each = max(size // group // shards, 1)  # prompts of a part
    read = _read_tokens(mask).reshape(count * cuts, group // cuts)
    everywhere = meshes.gather_rows(read)
    shape = _row_shape(
        _dealt(everywhere, each, shards),
        longest=width - 1,
        prompt_tokens=prompt_tokens,
        at_most=WORTHWHILE * rival,
    )
    if shape is None:
        return None
    own = _dealt(read, each, max(shards // jax.process_count(), 1))
    source: Any = _place(own, shape, width)
    if cuts > 1:
        before = (group // cuts) * width * (np.arange(len(source)) % cuts)
        empty = source >= (group // cuts) * width
        source = np.where(empty, group * width, source + before[:, None, None])
        source = source.reshape(count, -1, shape.places)
    return Packing(source.astype(np.int32))


def _read_tokens(mask: Bool[np.ndarray, "N G T"]) -> Int[np.ndarray, "N G"]:
    """The tokens of each completion before the last one that counts."""
    last = mask.shape[2] - 1 - np.argmax(mask[..., ::-1], axis=-1)
    return np.where(mask.any(axis=-1), last, 0)


def _dealt(
    read: Int[np.ndarray, "N G"], each: int, shards: int
) -> Int[np.ndarray, "A n G"]:
    """The groups of each part, as the prompts of a shard are dealt to turns."""
    group = read.shape[1]
    return read.reshape(shards, each, -1, group).swapaxes(1, 2).reshape(-1, each, group)


def _row_shape(
    read: Int[np.ndarray, "A n G"], *, longest: int, prompt_tokens: int, at_most: float
) -> _Shape | None:
    """The rows and places of a part that take least time; None for one row each."""

    def cost(rows: int, places: int) -> float:
        seen = (places + prompt_tokens) / _PAIRS_OF_A_TOKEN
        prompt = prompt_tokens * (1 + prompt_tokens / _PAIRS_OF_A_TOKEN)
        return read.shape[1] * prompt + rows * places * (1 + seen)

    unpacked = _Shape(read[0].size, longest)
    costs = {}
    least = max(read.max(), _SHORTEST)
    # Widths between powers of two would save 3 % of the places, but then twice as many
    # shapes occur.
    for places in _sizes(least, read.sum(axis=2).max(), of_octave=1):
        rows = _first_fit(read, places)[0].max(axis=2) + 1
        most = int(rows.sum(axis=1).max())
        shape = _Shape(_sizes(most, most, of_octave=4)[0], places)
        # As many scores as unpacked, at most, so that no more memory is needed.
        if shape.rows * places**2 <= unpacked.rows * longest**2:
            costs[shape] = cost(*shape)
    best = min(costs, key=lambda shape: costs[shape], default=None)
    if best is None or costs[best] > at_most * cost(*unpacked):
        return None
    return best


def _sizes(least: int, most: int, *, of_octave: int) -> list[int]:
    """Sizes from `least` to the first that is not below `most`.

    They are few, so that few shapes are compiled: `of_octave` between powers of two.
    """
    sizes, size = [], 1
    while not sizes or sizes[-1] < most:
        if size >= least:
            sizes.append(size)
        size += max((1 << (size.bit_length() - 1)) // of_octave, 1)
    return sizes


def _first_fit(
    read: Int[np.ndarray, "A n G"], places: int
) -> tuple[Int[np.ndarray, "A n G"], Int[np.ndarray, "A n G"]]:
    """The row of each completion and its first place there: the first that has room.

    Rows are counted within a prompt. Longer completions come first (first fit
    decreasing: Johnson 1973, "Near-optimal bin packing algorithms"); of equal ones, the
    earlier.
    """
    groups = read.reshape(-1, read.shape[-1])
    each = np.arange(len(groups))
    free = np.full(groups.shape, places)
    row, start = np.zeros_like(groups), np.zeros_like(groups)
    for at in np.argsort(-groups, axis=1, kind="stable").T:
        needed = groups[each, at]
        chosen = np.argmax(free >= needed[:, None], axis=1)
        row[each, at], start[each, at] = chosen, places - free[each, chosen]
        free[each, chosen] -= needed
    return row.reshape(read.shape), start.reshape(read.shape)


def _place(
    read: Int[np.ndarray, "A n G"], shape: _Shape, width: int
) -> Int[np.ndarray, "A R S"]:
    """The source of each place."""
    row, start = _first_fit(read, shape.places)
    rows = row.max(axis=2) + 1
    row += (np.cumsum(rows, axis=1) - rows)[..., None]  # behind those of other prompts
    first = row * shape.places + start
    empty = read[0].size * width
    source = np.full((len(read), shape.rows * shape.places), empty)
    token = np.arange(width)
    part, prompt, member, number = np.nonzero(token < read[..., None])
    at = first[part, prompt, member] + number
    source[part, at] = (prompt * read.shape[2] + member) * width + number
    return source.reshape(len(read), *shape)
