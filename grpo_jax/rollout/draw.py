"""How a policy draws: its settings, and the next token with its log-probability.

A draw inverts the cumulative distribution at one uniform number per row. Drawing by
Gumbel noise, as `jax.random.categorical` does, needs a random number per vocabulary
entry, which costs more than the product with the head on a CPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from grpo_jax.config import SamplingConfig
from grpo_jax.models.limits import check_stop_ids
from grpo_jax.models.protocol import LanguageModelConfig
from grpo_jax.weights.tokenizer import Tokenizer

# Entries summed together before the search; near the square root of a vocabulary.
_BLOCK = 256


def policy_sampling(
    model: LanguageModelConfig,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    *,
    temperature: float | None = None,
) -> SamplingConfig:
    """How a policy draws, whoever asks: training, evaluation, samples, an export.

    Args:
      model: its configuration.
      sampling: that of the run; where it names no stop tokens, they are the model's.
      temperature: in place of the run's; 0 takes the likeliest token.

    Raises:
      ValueError: for a stop token that the model does not have.
    """
    if temperature is None:
        temperature = sampling.temperature
    stop_ids = sampling.stop_ids
    if stop_ids is None:
        stop_ids = tokenizer.stop_ids
    check_stop_ids(stop_ids, vocab_size=model.vocab_size)
    return dataclasses.replace(sampling, temperature=temperature, stop_ids=stop_ids)


def draw(
    hidden: Float[Array, "A S D"],
    head: Float[Array, "V D"],
    keys: Key[Array, "A S"],
    *,
    sampling: SamplingConfig,
    softcap: float | None,
    forced: Int[Array, "A S"] | None = None,
) -> tuple[Int[Array, "A S"], Float[Array, "A S"]]:
    """A token for each hidden state, and its log-probability in nats.

    Args:
      keys: the key of each token.
      forced: tokens that are taken without a draw; -1 where one is drawn.
      softcap: the c of c tanh(x / c) on the logits, or None.
    """
    logits = jnp.dot(
        hidden.reshape(-1, hidden.shape[-1]), head.T, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    # `uniform` can be 0, at which the first token would be drawn, however unlikely it
    # is. Half a step of float32 is added, which is exact, and keeps numbers below 1.
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(keys) + 2.0**-24
    token, logp = sample_token(
        logits,
        uniform.reshape(-1),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        forced=None if forced is None else forced.reshape(-1),
    )
    return token.reshape(hidden.shape[:-1]), logp.reshape(hidden.shape[:-1])


def sample_token(
    logits: Float[Array, "R V"],
    uniform: Float[Array, " R"],
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    forced: Int[Array, " R"] | None = None,
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """One token per row and its log-probability in nats.

    The draw follows softmax(logits / temperature), cut to the `top_k` likeliest tokens,
    then to the likeliest that reach probability `top_p`, then to those above `min_p`
    times the largest probability. The log-probability is that of the uncut distribution
    at the same temperature, which is what the learner computes. Temperature 0 takes the
    likeliest token and gives its log-probability at temperature 1.

    Args:
      uniform: numbers in [0, 1), one per row.
      forced: see `draw`.
    """
    logits = logits.astype(jnp.float32)
    scaled = logits / temperature if temperature else logits
    top = jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.exp(scaled - top)
    log_total = jnp.log(jnp.sum(weights, axis=-1))
    if temperature:
        token = _invert(_cut(weights, top_k, top_p, min_p), uniform)
    else:
        token = jnp.argmax(scaled, axis=-1).astype(jnp.int32)
    if forced is not None:
        token = jnp.where(forced < 0, token, forced)
    chosen = jnp.take_along_axis(scaled - top, token[:, None], axis=-1)[:, 0]
    return token, chosen - log_total


def _cut(
    weights: Float[Array, "R V"],
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> Float[Array, "R V"]:
    """The weights with those outside the chosen sets at 0; the largest is 1."""
    if top_k is not None and top_k < weights.shape[-1]:
        least = lax.top_k(weights, top_k)[0][:, -1:]
        weights = jnp.where(weights >= least, weights, 0.0)
    if top_p is not None and top_p < 1.0:
        ordered = -jnp.sort(-weights, axis=-1)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        kept = before < top_p * jnp.sum(ordered, axis=-1, keepdims=True)
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        weights = jnp.where(weights >= least, weights, 0.0)
    if min_p is not None:
        weights = jnp.where(weights >= min_p, weights, 0.0)
    return weights


def _invert(
    weights: Float[Array, "R V"], uniform: Float[Array, " R"]
) -> Int[Array, " R"]:
    """The first index at which the running sum of a row exceeds uniform x its total.

    Two levels, blocks and then entries, keep the sums short and exact. An entry of
    weight 0 is never taken.
    """
    rows, size = weights.shape
    blocks = -(-size // _BLOCK)
    padded = jnp.pad(weights, ((0, 0), (0, blocks * _BLOCK - size)))
    padded = padded.reshape(rows, blocks, _BLOCK)
    sums = jnp.sum(padded, axis=-1)
    block, rest = _search(sums, uniform * jnp.sum(sums, axis=-1))
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    entry, _ = _search(inside, rest)
    return (block * _BLOCK + entry).astype(jnp.int32)


def _search(
    weights: Float[Array, "R M"], target: Float[Array, " R"]
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """Where the running sum of the weights passes the target, and what is left of it.

    Only entries with weight are found. Sums made in parallel, as on a GPU, may rise by
    rounding at an entry of weight 0, and a target may be rounded up to the total, which
    is passed nowhere: the last entry with weight is the answer then.
    """
    running = jnp.cumsum(weights, axis=-1)
    held = weights > 0.0
    passed = held & (running > target[:, None])
    positions = jnp.arange(weights.shape[-1], dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(held, positions, 0), axis=-1)
    first = jnp.argmax(passed, axis=-1).astype(jnp.int32)
    index = jnp.where(jnp.any(passed, axis=-1), first, last)
    before = jnp.take_along_axis(running, jnp.maximum(index - 1, 0)[:, None], axis=-1)
    return index, target - jnp.where(index > 0, before[:, 0], 0.0)
