"""The gated delta rule as pure functions: step by step, and in chunks of tokens.

Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks", https://arxiv.org/abs/2412.06464.
Each head has a memory, a matrix from keys to values. A token lets it decay. Then it
corrects what the memory answers to its key, by a share of the error. All is float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from grpo_jax.models._conv import convolved, convolved_in_rows, with_state
from grpo_jax.models.cache import MixerState

# Tokens of a chunk. The work within chunks grows with it, the number of steps falls.
CHUNK = 64
# Of the norm of queries and keys.
_EPS = 1e-6
# Memories add up over whole sequences. Accelerators round the factors of a product
# unless told otherwise.
_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Layers that have a memory in the place of attention.

    Raises:
        ValueError: a size that is not positive, heads that do not divide, no such
            layer, or no layer with attention.
    """

    layers: tuple[bool, ...]  # which layers they are
    key_heads: int  # K, of queries and keys
    value_heads: int  # V, a multiple of K
    key_dim: int  # k, of each head
    value_dim: int  # v, of each head
    kernel: int  # c, tokens that the convolution sees, itself among them

    part = "delta"  # the name of its parameters

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        layers = sizes.pop("layers")
        wrong = [name for name, size in sizes.items() if size < 1]
        if wrong:
            raise ValueError(f"delta layers need a positive {', '.join(wrong)}")
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"value_heads {self.value_heads} must be a multiple of key_heads "
                f"{self.key_heads}"
            )
        if all(layers) or not any(layers):
            raise ValueError(
                "delta layers need a layer of each kind, one with attention and one "
                f"without; got {layers}"
            )

    @property
    def channels(self) -> int:
        """Features that the convolution mixes: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def projected(self) -> int:
        """Features of all projections of a token: qkv, z and o, b and a."""
        values = self.value_heads * self.value_dim
        return self.channels + 2 * values + 2 * self.value_heads

    @property
    def head_channels(self) -> int:
        """w, those of one key head with its values."""
        return self.channels // self.key_heads

    @property
    def memory_size(self) -> int:
        """Numbers of a layer's memory for one sequence."""
        return self.value_heads * self.key_dim * self.value_dim

    def state_bytes(self, item: int) -> int:
        """Returns the bytes of all layers' states of one sequence.

        Args:
            item: those of a number in the compute dtype.
        """
        recent = item * (self.kernel - 1) * self.channels
        return sum(self.layers) * (4 * self.memory_size + recent)

    def of_device(self, parts: int) -> "DeltaConfig":
        """Returns the heads of one of `parts` devices that share them."""
        heads, each = -(-self.key_heads // parts), self.value_heads // self.key_heads
        return dataclasses.replace(self, key_heads=heads, value_heads=heads * each)

    def by_heads(self, x: Float[Array, "... f"]) -> Float[Array, "... K w"]:
        """Returns channels by key head, from all queries, then keys, then values."""
        ends = [self.key_heads * self.key_dim * n for n in (1, 2)]
        shape = (*x.shape[:-1], self.key_heads, -1)
        parts = [part.reshape(shape) for part in jnp.split(x, ends, axis=-1)]
        return jnp.concatenate(parts, axis=-1)


@struct.dataclass
class DeltaInputs:
    """What a layer makes of each token on its own."""

    channels: Float[Array, "R S K w"]  # inputs of the convolution
    decay: Float[Array, "R S V"]  # logarithm of what the memory keeps, at most 0
    share: Float[Array, "R S V"]  # of the error that is corrected
    kernel: Float[Array, "c K w"]  # of the convolution, the newest token last


def empty_state(config: DeltaConfig, rows: int, dtype: str) -> MixerState:
    """Returns the state of one layer before the first token."""
    heads, width = config.value_heads, (config.key_dim, config.value_dim)
    tail = (config.key_heads, config.kernel - 1, config.head_channels)
    return MixerState(
        memory=jnp.zeros((rows, heads, *width), jnp.float32),
        recent=jnp.zeros((rows, *tail), dtype),
    )


def advance(
    inputs: DeltaInputs,
    state: MixerState,
    counts: Int[Array, " R"] | None,
    *,
    config: DeltaConfig,
) -> tuple[Float[Array, "R S V v"], MixerState]:
    """Returns what the memory answers to each token, and the state after them.

    Only the first `counts` tokens of a row are real. What follows them changes no
    state: its decay and its share are 0. None: all are real.
    """
    length = inputs.channels.shape[1]
    decay, share = inputs.decay, inputs.share
    if counts is not None:
        real = (jnp.arange(length)[None, :] < counts[:, None])[..., None]
        decay, share = jnp.where(real, decay, 0.0), jnp.where(real, share, 0.0)
    tokens, recent = with_state(inputs.channels, state.recent, counts)
    mixed = jax.nn.silu(convolved(tokens, inputs.kernel))
    rule = delta_rule if length == 1 else chunked_delta_rule
    out, memory = rule(*_split(mixed, config), decay, share, state.memory)
    return out, MixerState(memory=memory, recent=recent)


def answers_in_rows(
    inputs: DeltaInputs,
    state: MixerState,
    index: Int[Array, "R S"],
    *,
    config: DeltaConfig,
) -> Float[Array, "R S V v"]:
    """Returns what the memory answers in rows with sequences behind each other.

    Each sequence of a row starts from the row's `state`, memory and convolution, and
    sees nothing of the one before. `index` is a token's number in its sequence.
    """
    given = inputs.channels, state.recent, inputs.kernel
    mixed = jax.nn.silu(convolved_in_rows(*given, index))
    given = *_split(mixed, config), inputs.decay, inputs.share, state.memory
    return chunked_delta_rule(*given, index=index)[0]


def delta_rule(
    queries: Float[Array, "R S K k"],
    keys: Float[Array, "R S K k"],
    values: Float[Array, "R S V v"],
    decay: Float[Array, "R S V"],
    share: Float[Array, "R S V"],
    memory: Float[Array, "R V k v"],
) -> tuple[Float[Array, "R S V v"], Float[Array, "R V k v"]]:
    """Returns M_t^T q_t of each token, and the last memory, token by token.

    M_t = e^d M_{t-1} + k_t (b (v_t - e^d M_{t-1}^T k_t))^T, where d is the decay of
    the token and b its share (equation 10). Value head i has query and key head
    i // (V / K).
    """
    groups = functools.partial(_grouped, heads=keys.shape[2])

    def step(memory: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        query, key, value, decay, share = token
        memory = jnp.exp(decay)[..., None, None] * memory
        seen = _product("rkgxy,rkx->rkgy", memory, key)
        error = share[..., None] * (value - seen)
        memory = memory + key[:, :, None, :, None] * error[..., None, :]
        return memory, _product("rkgxy,rkx->rkgy", memory, query)

    given = queries, keys, groups(values, 2), groups(decay, 2), groups(share, 2)
    tokens = tuple(x.astype(jnp.float32).swapaxes(0, 1) for x in given)
    memory, out = lax.scan(step, groups(memory, 1), tokens)
    return out.swapaxes(0, 1).reshape(values.shape), _ungrouped(memory)


def chunked_delta_rule(
    queries: Float[Array, "R S K k"],
    keys: Float[Array, "R S K k"],
    values: Float[Array, "R S V v"],
    decay: Float[Array, "R S V"],
    share: Float[Array, "R S V"],
    memory: Float[Array, "R V k v"],
    *,
    index: Int[Array, "R S"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "R S V v"], Float[Array, "R V k v"]]:
    """Returns what `delta_rule` does, with matrix products over chunks of tokens.

    The errors of a chunk depend on each other: (1 + A) E = b (V - e^D K M), where M is
    the memory before the chunk, D the decays summed from its start, and A_ij =
    b_i e^(D_i - D_j) k_i^T k_j for j < i (section 3.3). The triangular system is
    solved for all chunks at once; only M goes from one to the next. D_i - D_j is a
    difference of sums: if decays of a chunk add up to thousands, it has an error of
    1e-4, and small ones behind large ones are as inexact.

    With `index`, the number of each token in its sequence, a row has sequences behind
    each other, which all start from `memory`. A and D are then those of each sequence,
    and M is the given memory for what starts within the chunk.
    """
    rows, length, heads = keys.shape[:3]
    size = min(chunk, length)
    count = -(-length // size)

    def split(x: Array) -> Float[Array, "n R K ... size"]:
        """Chunks first, and the tokens of a chunk next to last."""
        wide = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x.astype(jnp.float32), wide)
        x = x.reshape(rows, count, size, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2), (0, -2 if x.ndim > 4 else -1))

    queries, keys = split(queries), split(keys)  # [n, R, K, C, k]
    groups = functools.partial(_grouped, heads=heads, axis=2)
    values, decay, share = (groups(split(x)) for x in (values, decay, share))
    seen, begun = jnp.tri(size, dtype=bool).reshape(1, 1, size, size), None
    if index is not None:
        begins = jnp.cumsum(split(index == 0), axis=-1)  # [n, R, C]
        seen = seen & (begins[..., :, None] == begins[..., None, :])
        begun = jnp.expand_dims(begins > 0, (2, 3, 5))
    seen = jnp.expand_dims(seen, (2, 3))
    # Also of one sequence only, and with less error than a difference of sums.
    summed = jnp.where(seen, decay[..., None, :], 0.0).sum(axis=-1)  # [n, R, K, g, C]
    between = summed[..., :, None] - summed[..., None, :]
    # Behind a token the difference is positive, and its exponential may overflow.
    kept = jnp.exp(jnp.where(seen, between, -jnp.inf))
    overlap = _product("nrkix,nrkjx->nrkij", keys, keys)[:, :, :, None]
    system = share[..., None] * kept * overlap
    asked = jnp.exp(summed)[..., None] * keys[:, :, :, None]
    right = share[..., None] * jnp.concatenate([values, asked], axis=-1)
    # With ones on the diagonal, whatever is stored there.
    solved = lax.linalg.triangular_solve(
        system, right, left_side=True, lower=True, unit_diagonal=True
    )
    given, answered = jnp.split(solved, [values.shape[-1]], axis=-1)
    within = kept * _product("nrkix,nrkjx->nrkij", queries, keys)[:, :, :, None]
    left = kept[..., -1, :]
    start = _grouped(memory, 1, heads=heads)
    parts = queries, keys, given, answered, within, summed, left, begun
    step = functools.partial(_through_chunk, start)
    memory, out = lax.scan(step, start, parts)
    out = jnp.moveaxis(_ungrouped(out, 2), (0, 3), (1, 2))  # [R, n, C, V, v]
    out = out.reshape(rows, count * size, *out.shape[3:])[:, :length]
    return out, _ungrouped(memory)


def _through_chunk(
    start: Float[Array, "R K g k v"],
    memory: Float[Array, "R K g k v"],
    chunk: tuple[Any, ...],
) -> tuple[Float[Array, "R K g k v"], Float[Array, "R K g C v"]]:
    """Returns the memory behind a chunk, and what its tokens are answered."""
    queries, keys, given, answered, within, summed, left, begun = chunk

    def read(which: str, x: Array) -> Float[Array, "R K g C v"]:
        found = _product(which, x, memory)
        if begun is None:
            return found
        return jnp.where(begun, _product(which, x, start), found)

    errors = given - read("rkgix,rkgxy->rkgiy", answered)
    seen = jnp.exp(summed)[..., None] * read("rkix,rkgxy->rkgiy", queries)
    out = seen + _product("rkgij,rkgjy->rkgiy", within, errors)
    if begun is not None:
        memory = jnp.where(begun[..., -1:, :], start, memory)
    memory = jnp.exp(summed[..., -1])[..., None, None] * memory
    added = left[..., None] * errors
    return memory + _product("rkix,rkgiy->rkgxy", keys, added), out


def _split(
    mixed: Float[Array, "R S K w"], config: DeltaConfig
) -> tuple[Array, Array, Array]:
    """Returns queries and keys, normalized, and values of what was convolved."""
    ends = config.key_dim, 2 * config.key_dim
    queries, keys, values = jnp.split(mixed, ends, axis=-1)
    queries, keys = _normalized(queries) * config.key_dim**-0.5, _normalized(keys)
    shape = (*mixed.shape[:2], config.value_heads, config.value_dim)
    return queries, keys, values.reshape(shape)


def _normalized(x: Float[Array, "... k"]) -> Float[Array, "... k"]:
    return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPS)


def _grouped(x: Array, axis: int, *, heads: int) -> Array:
    """Returns an axis of value heads as one of key heads, and one of those of each."""
    return x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])


def _ungrouped(x: Array, axis: int = 1) -> Array:
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
