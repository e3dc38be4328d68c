"""Attention of whole rows: prompts, and prompts with the completions behind them."""

from typing import Any

from jaxtyping import Array, Float, Int

from grpo_jax.models import _rows
from grpo_jax.models._attention import attention, head_major
from grpo_jax.models.cache import Prefix
from grpo_jax.models.config import ModelConfig


def attend_row(
    parts: list[tuple[Array, Array]],
    lengths: Int[Array, " N"],
    index: Int[Array, "A|1 R|1 S"],
    owner: Int[Array, "A R"] | None,
    *,
    config: ModelConfig,
    window: Int[Array, ""] | int | None,
) -> Float[Array, "A L H h"]:
    """Returns attention of a row of `score_rows` from its queries, keys and values.

    Each comes in two parts, that of the prompts and that of the completions.
    """
    (prompt_q, own_q), *_ = parts
    each = lambda x: x.reshape(len(lengths), -1, *x.shape[2:])  # noqa: E731
    keys, values = (_rows.of_prompts(each(prompt)) for prompt, _ in parts[1:])
    # One causal pass over the whole row would let completions see each other. So a
    # prompt attends alone, and is then the shared prefix of its completions.
    out = attend_causal(each(prompt_q), keys, values, config=config, window=window)
    out = out.reshape(prompt_q.shape)
    if own_q.size == 0:  # completions of one token: it is predicted, never read
        return out
    prefix = Prefix(keys=keys, values=values, lengths=lengths)
    q, k, v = (own for _, own in parts)
    within = None
    if owner is not None:
        q, k, v = (x.reshape(-1, 1, *x.shape[2:]) for x in (q, k, v))
        within = index.reshape(-1, index.shape[2])
    k, v = head_major(k), head_major(v)
    seen: Any = {"prefix": prefix, "index": within, "owner": owner, "window": window}
    own = _attention(q, k, v, config=config, **seen)
    return _rows.join(out, own.reshape(own_q.shape))


def attend_causal(
    queries: Float[Array, "N S H h"],
    keys: Float[Array, "N K S h"],
    values: Float[Array, "N K S h"],
    *,
    config: ModelConfig,
    window: Int[Array, ""] | int | None,
) -> Float[Array, "N S H h"]:
    """Returns attention within rows, which is that of groups of one."""
    k, v = keys[:, :, None], values[:, :, None]
    q = queries[:, None]
    return _attention(q, k, v, config=config, prefix=None, window=window)[:, 0]


def _attention(*arrays: Array, config: ModelConfig, **which: Any) -> Array:
    """Returns `attention` of these arrays as this model has it."""
    return attention(
        *arrays,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        kernels=config.attention == "auto",
        **which,
    )
