"""Attention over a shared prefix plus own tokens, one function for every mode.

The G sequences of a prompt share its keys and values: their queries are folded into one
matrix product against the prefix, and both parts are joined under one softmax. A plain
causal pass is the case without prefix; decoding is the case of one query at an offset.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped

from grpo_jax.models import rope
from grpo_jax.models._flash import all_keys, flash_attention, has_flash
from grpo_jax.models._layers import Projection, RMSNorm, constrain
from grpo_jax.models._rows import of_owners
from grpo_jax.models._tpu_flash import Seen, row_attention, serves_rows
from grpo_jax.models.cache import Prefix, PromptBlock, Slots
from grpo_jax.models.config import ModelConfig

# Finite, so that the difference of two masked scores is 0 and not NaN.
_MASKED = -1e30

Aux = TypeVar("Aux")


def attention(
    queries: Float[Array, "N G T H h"],
    keys: Float[Array, "N K G S h"],
    values: Float[Array, "N K G S h"],
    *,
    prefix: Prefix | None,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
    index: Int[Array, "N T"] | None = None,
    owner: Int[Array, "A R"] | None = None,
    kernels: bool = True,
) -> Float[Array, "N G T H h"]:
    """Returns softmax(scale q k^T) v over the prefix and the sequence's own tokens.

    Query t is the sequence's own token t. It sees own tokens up to itself and the real
    tokens of the prefix, of both only the last `window` positions, itself among them;
    so no row is ever empty. With `index`, for groups of one, several sequences stand
    behind each other, query t is token `index[:, t]` of its own and sees none of the
    others. With `owner` they are A x R rows, and see these prompts of the prefix: see
    `of_owners`. A softcap c turns scores s into c tanh(s / c) (Gemma Team 2024,
    https://arxiv.org/abs/2408.00118, section 2). Scores and softmax are float32. Query
    head i reads key/value head i // (H / K) (Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245). Unless `kernels` is false, several queries at
    once are left to kernels where there are some, for TPUs or of cuDNN.
    """
    n, g, t, heads, width = queries.shape
    kv_heads = keys.shape[1]
    if kernels and serves_rows(queries, keys, prefix, owner):
        seen = Seen(prefix, owner, index, window)
        return row_attention(queries, keys, values, seen, scale=scale, softcap=softcap)
    if owner is not None:  # a row has a copy of its prompt: there are few rows
        prefix = jax.tree.map(lambda x: of_owners(x, owner), prefix)
    masks = [_own_mask(t, keys.shape[3], window=window, index=index)]
    if prefix is not None:
        masks.append(_prefix_mask(t, prefix, window=window, index=index))
    if kernels and t > 1 and softcap is None and has_flash(queries):
        seen = all_keys(keys, values, prefix, masks)
        plain = prefix is None and window is None and index is None
        causal = plain and t == keys.shape[3]
        return flash_attention(queries, seen, scale=scale, causal=causal)
    # One layout serves both products: with (N, K) as batch, all rows of a prompt's
    # sequences against its prefix; with (N, K, G), a sequence's rows against its own.
    # Keys and values come in it, so that decoding need not rearrange its cache.
    folded = queries.reshape(n, g, t, kv_heads, heads // kv_heads, width)
    folded = folded.transpose(0, 3, 1, 2, 4, 5)
    parts = [("nkgtrh,nkgsh->nkgtrs", "nkgtrs,nkgsh->nkgtrh", keys, values)]
    if prefix is not None:
        shared = (prefix.keys, prefix.values)
        parts.append(("nkgtrh,nkph->nkgtrp", "nkgtrp,nkph->nkgtrh", *shared))

    # One softmax over two sources of keys. The usual way joins keys and values first,
    # but a joined array repeats the prompt's keys for each of its G sequences. Scores
    # of each part are enough: the parts share one peak and one total.
    scores = []
    for (equation, _, part_keys, _), mask in zip(parts, masks, strict=True):
        raw = scale * _product(equation, folded, part_keys)
        capped = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
        scores.append(jnp.where(mask[:, None, None, :, None], capped, _MASKED))
    peaks = [part.max(axis=-1, keepdims=True) for part in scores]
    # The peak cancels in the quotient, so its gradient is 0 and need not be computed.
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks))
    weights = [jnp.exp(part - peak) for part in scores]
    totals = [part.sum(axis=-1, keepdims=True) for part in weights]
    mixed = [
        _product(equation, part.astype(part_values.dtype), part_values)
        for part, (_, equation, _, part_values) in zip(weights, parts, strict=True)
    ]
    # Dividing after the product touches h numbers per query instead of one per key.
    out = functools.reduce(jnp.add, mixed) / functools.reduce(jnp.add, totals)
    out = out.astype(queries.dtype).transpose(0, 2, 3, 1, 4, 5)
    return out.reshape(n, g, t, heads, width)


def slot_attention(
    queries: Float[Array, "A S H h"],
    keys: Float[Array, "B K h C"],
    values: Float[Array, "B K C h"],
    *,
    slots: Slots,
    prompts: PromptBlock,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "A S H h"]:
    """Returns attention of one new token per slot, over its prompt and the cache.

    The same as `attention`, for sequences that stand at different positions. Keys and
    values are the cache of a layer.
    """
    a, s, heads, width = queries.shape
    part = functools.partial(softmax_part, scale=scale, softcap=softcap)
    folded = queries.reshape(a, s, keys.shape[1], -1, width)
    own = part(
        folded.reshape(a * s, *folded.shape[2:]),
        keys,
        values,
        slots.seen(keys.shape[3], window).reshape(a * s, 1, 1, -1),
    )
    at = jnp.arange(prompts.keys.shape[3])[None, None, :]
    mask = at < slots.prompt_lengths[..., None]
    if window is not None:
        mask &= at > slots.positions[..., None] - window
    # One matrix for each row and head, as keys and values are stored.
    of_rows, mask = _to_rows(folded, prompts), _to_rows(mask, prompts)
    rows, members = mask.shape[1:3]
    of_rows = jnp.swapaxes(of_rows, 2, 3)
    each = of_rows.shape[4]
    mask = jnp.repeat(mask, each, axis=2).reshape(a * rows, 1, members * each, -1)
    of_rows = of_rows.reshape(a * rows, keys.shape[1], members * each, width)
    shared = part(of_rows, prompts.keys, prompts.values, mask)
    shared = shared.reshape(a, rows, keys.shape[1], members, each, -1)
    shared = _to_slots(jnp.swapaxes(shared, 2, 3), prompts)
    # Each part is a softmax of its own up to its total. They are joined by one peak.
    both = own.reshape(shared.shape), shared
    peak = jnp.maximum(both[0][..., :1], both[1][..., :1])
    weighted = [jnp.exp(x[..., :1] - peak) * x[..., 1:] for x in both]
    joined = functools.reduce(jnp.add, weighted)
    out = joined[..., 1:] / joined[..., :1]
    return out.astype(queries.dtype).reshape(a, s, heads, width)


def softmax_part(
    queries: Float[Array, "B K m h"],
    keys: Float[Array, "B K h C"],
    values: Float[Array, "B K C h"],
    mask: Bool[Array, "B 1 m C"],
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B K m h+2"]:
    """Returns the peak of the scores, their total and the mixed values, in this order.

    In one array, which can be moved at once.
    """
    raw = scale * _product("bkmh,bkhc->bkmc", queries, keys)
    capped = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
    scores = jnp.where(mask, capped, _MASKED)
    peak = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = _product("bkmc,bkch->bkmh", weights.astype(values.dtype), values)
    return jnp.concatenate([peak, total, mixed], axis=-1)


def _to_rows(x: Shaped[Array, "A S ..."], prompts: PromptBlock) -> Array:
    """Returns values of slots as those of the members of each row, [A, M, W, ...]."""
    if prompts.members is None:
        rows = prompts.keys.shape[0] // x.shape[0]
        return x.reshape(x.shape[0], rows, -1, *x.shape[2:])
    # Batched over the parts: no slot reads from another device.
    return jax.vmap(lambda x, at: x.at[at].get(mode="clip"))(x, prompts.members)


def _to_slots(x: Shaped[Array, "A M W ..."], prompts: PromptBlock) -> Array:
    """Returns values of the members of each row as those of slots, [A, S, ...]."""
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    if prompts.place is None:
        return x
    # A slot without a prompt takes any: nothing is drawn from it.
    return jax.vmap(lambda x, at: x.at[at].get(mode="clip"))(x, prompts.place)


def head_major(x: Float[Array, "N G S K h"]) -> Float[Array, "N K G S h"]:
    """Returns keys or values in the layout of `attention` and of the cache."""
    return x.transpose(0, 3, 1, 2, 4)


class SelfAttention(nn.Module):
    """Projections, query/key norms and rotary embedding around a way to attend."""

    config: ModelConfig

    def setup(self):
        """Declares the projections and, where the family has them, the norms."""
        config = self.config
        model_width, width = config.hidden_size, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        made = functools.partial(
            Projection, use_bias=config.attention_bias, lora_scale=config.lora_scale
        )
        into, into_kv = ("embed", "heads"), ("embed", "kv_heads")
        # The gate of each head is behind its query.
        gated = 2 if config.attention_gate else 1
        self.q = made(model_width, gated * width, into)
        self.k = made(model_width, kv_width, into_kv)
        self.v = made(model_width, kv_width, into_kv)
        out_of = ("heads", "embed")
        self.o = made(width, model_width, out_of, use_bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(eps=config.norm_eps, offset=config.norm_offset)
            self.k_norm = RMSNorm(eps=config.norm_eps, offset=config.norm_offset)

    def __call__(
        self,
        x: Float[Array, "N S D"],
        rotary: rope.Rotary,
        attend: Callable[[Array, Array, Array], tuple[Array, Aux]],
    ) -> tuple[Float[Array, "N S D"], Aux]:
        """Returns the attention output and whatever else `attend` returns.

        `attend(queries[N, S, H, h], keys[N, S, K, h], values)` does the mixing; it is
        what distinguishes a plain pass from prefill, decode and score.
        """
        q, k, v = self.q(x), self.k(x), self.v(x)
        norms = self.config.qk_norm
        if norms == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q = self._heads(q, self.config.num_heads, "heads")
        q, *gate = jnp.split(q, q.shape[-1] // self.config.head_dim, axis=-1)
        k = self._heads(k, self.config.num_kv_heads, "kv_heads")
        v = self._heads(v, self.config.num_kv_heads, "kv_heads")
        if norms == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        # Keys are stored rotated: a score depends on the difference of positions alone,
        # so what is in a cache stays valid whatever follows.
        neighbors = self.config.rotary_neighbors
        q = rope.apply_rotary(q, rotary, neighbors=neighbors)
        k = rope.apply_rotary(k, rotary, neighbors=neighbors)
        if norms == "rotated":
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary.queries is not None:
            q = q * rotary.queries[:, :, None, None].astype(q.dtype)
        context, aux = attend(q, k, v)
        if gate:
            context = context * jax.nn.sigmoid(gate[0])
        return self.o(context.reshape(*x.shape[:2], -1)), aux

    def _heads(
        self, x: Float[Array, "N S W"], count: int, axis: str
    ) -> Float[Array, "N S count h"]:
        split = x.reshape(*x.shape[:2], count, -1)
        return constrain(split, "batch", "seq", axis, None)


def _product(equation: str, left: Array, right: Array) -> Float[Array, "..."]:
    # Scores of bfloat16 are summed in float32, as the softmax after them is.
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _own_mask(
    num_queries: int,
    num_keys: int,
    *,
    window: Int[Array, ""] | int | None,
    index: Int[Array, "N T"] | None,
) -> Bool[Array, "N|1 T S"]:
    queries = jnp.arange(num_queries)[:, None]
    distance = (queries - jnp.arange(num_keys)[None, :])[None]
    mask = distance >= 0
    if index is not None:  # its sequence begins so many tokens before a query
        mask &= distance <= index[..., None]
    if window is not None:
        mask &= distance < window
    return mask


def _prefix_mask(
    num_queries: int,
    prefix: Prefix,
    *,
    window: Int[Array, ""] | int | None,
    index: Int[Array, "N T"] | None,
) -> Bool[Array, "N T|1 P"]:
    key_positions = jnp.arange(prefix.keys.shape[-2])[None, None, :]
    lengths = prefix.lengths[:, None, None]
    # No causal mask: every own token comes after the whole prompt. Only padding hides.
    mask = key_positions < lengths
    if window is not None:
        own = jnp.arange(num_queries)[None] if index is None else index
        mask &= lengths + own[..., None] - key_positions < window
    return mask
