"""How a policy draws: its settings, and the next token with its log-probability.

A draw inverts the cumulative distribution at one uniform number per row. Drawing by
Gumbel noise, as `jax.random.categorical` does, needs a random number per vocabulary
entry, which costs more than the product with the head on a CPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from grpo_jax.config import SamplingConfig
from grpo_jax.models.limits import check_stop_ids
from grpo_jax.models.protocol import LanguageModelConfig
from grpo_jax.rollout import _blocks as blocks
from grpo_jax.weights.tokenizer import Tokenizer


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
    rows = hidden.reshape(-1, hidden.shape[-1])
    # `uniform` can be 0, at which the first token would be drawn, however unlikely it
    # is. Half a step of float32 is added, which is exact, and keeps numbers below 1.
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(keys) + 2.0**-24
    logits = blocks.logits(rows, head)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    token, logp = _sample(
        logits,
        uniform.reshape(-1),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        forced=None if forced is None else forced.reshape(-1),
        size=len(head),
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
    return _sample(
        blocks.in_blocks(logits.astype(jnp.float32)),
        uniform,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        forced=forced,
        size=logits.shape[-1],
    )


def _sample(
    logits: Float[Array, "R b n"],
    uniform: Float[Array, " R"],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    forced: Int[Array, " R"] | None,
    size: int,
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """`sample_token` for logits in blocks, of which the first `size` are tokens.

    What is needed of one block is computed from its logits once more, and not kept.
    """
    scaled = blocks.filled(logits / (temperature or 1.0), size)
    peaks = jnp.max(scaled, axis=-1)
    top = jnp.max(peaks, axis=-1, keepdims=True)
    weights = jnp.exp(scaled - top[..., None])
    sums = jnp.sum(weights, axis=-1)
    log_total = jnp.log(jnp.sum(sums, axis=-1))
    if temperature:
        kept = blocks.cut(weights, top_k, top_p, min_p)
        sums = sums if kept is None else jnp.sum(kept, axis=-1)
        block, rest = blocks.search(sums, uniform * jnp.sum(sums, axis=-1))
        inside = blocks.take_block(scaled, block)
        chances = jnp.exp(inside - top)
        if kept is not None:
            chances = blocks.take_block(kept, block)
        entry, _ = blocks.search(chances, rest)
    else:
        block = jnp.argmax(peaks, axis=-1).astype(jnp.int32)
        inside = blocks.take_block(scaled, block)
        entry = jnp.argmax(inside, axis=-1).astype(jnp.int32)
    token = block * blocks.BLOCK + entry
    if forced is not None:
        token = jnp.where(forced < 0, token, forced)
        block, entry = jnp.divmod(token, blocks.BLOCK)
        inside = blocks.take_block(scaled, block)
    chosen = jnp.take_along_axis(inside, entry[:, None], axis=-1) - top
    return token, chosen[:, 0] - log_total
