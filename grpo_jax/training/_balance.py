"""The loss that spreads the tokens of a mixture over its experts.

Fedus, Zoph and Shazeer 2021, "Switch Transformers", https://arxiv.org/abs/2101.03961,
equations 4 to 6, over several experts per token as in transformers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from grpo_jax.models.limits import experts_per_token
from grpo_jax.models.protocol import LanguageModel
from grpo_jax.objective import Mean
from grpo_jax.training.state import Batch


def with_balance(
    loss: Mean,
    routers: Float[Array, "L A S E"],
    batch: Batch,
    coefficient: float,
    *,
    model: LanguageModel,
) -> dict[str, Mean]:
    """The loss with the weighted balance loss of a microbatch, and that as a metric.

    The balance is one of the tokens that are computed together, so the mean over
    microbatches is not that of all their tokens at once.
    """
    per_token = experts_per_token(model)
    balance = balance_loss(routers, token_weights(batch), per_token=per_token)
    return {
        "loss": Mean(loss.total + coefficient * balance * loss.weight, loss.weight),
        "router_aux_loss": Mean(lax.stop_gradient(balance) * loss.weight, loss.weight),
    }


def balance_loss(
    logits: Float[Array, "L A S E"], weights: Float[Array, "A S"], *, per_token: int
) -> Float[Array, ""]:
    """E sum_e f_e p_e over all layers together, `per_token` if even; 0 of no tokens.

    f_e is how many of a token's `per_token` experts are e, and p_e the probability of
    e, both means over tokens by weight. f has no gradient.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    _, chosen = lax.top_k(probabilities, per_token)
    taken = jax.nn.one_hot(chosen, logits.shape[-1]).sum(axis=-2)
    weighted = lambda x: jnp.einsum("lase,as->e", x, weights)  # noqa: E731
    count = len(logits) * weights.sum()
    count = jnp.where(count == 0.0, 1.0, count)
    shares = weighted(taken) / count, weighted(probabilities) / count
    return logits.shape[-1] * jnp.sum(shares[0] * shares[1])


def token_weights(batch: Batch) -> Float[Array, "A S"]:
    """How often each token of the rows of `score` counts.

    As if each completion had a row of its own: a prompt counts once for each of its
    completions that has tokens that count, of which those before the last are read.
    Padding counts nothing.
    """
    behind = jnp.cumsum(batch.mask[..., ::-1], axis=-1)[..., ::-1] > 0
    read = jnp.pad(behind[..., 1:], ((0, 0), (0, 0), (0, 1))).astype(jnp.int32)
    places = jnp.arange(batch.prompts.shape[1])[None, :]
    prompts = (places < batch.prompt_lengths[:, None]) * jnp.sum(
        behind[..., 0], axis=-1, keepdims=True
    )
    if batch.packing is None:
        own = read[..., :-1]
    else:
        own, *_ = batch.packing.rows(read)
    parts = [x.reshape(len(own), -1) for x in (prompts, own)]
    return jnp.concatenate(parts, axis=1).astype(jnp.float32)
