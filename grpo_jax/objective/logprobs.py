"""Log-probabilities and entropies of tokens, in nats and float32.

The dense functions take logits. `chunked_logprobs` takes hidden states and the output
matrix instead, and never holds more than one chunk of logits.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.objective import _checks
from grpo_jax.objective.structs import TokenLogprobs


def token_logprobs(
    logits: Float[Array, "*B T V"],
    tokens: Int[Array, "*B T"],
    *,
    temperature: float = 1.0,
) -> Float[Array, "*B T"]:
    """Log-probability in nats of each token: z[token] - log(sum(exp(z))).

    Here z = logits / temperature. A token whose logit is -inf has log-probability -inf,
    and gradients stay finite. An id outside [0, V) gives NaN, and so does a row in
    which every logit is -inf.
    """
    _check_tokens("logits", logits, tokens)
    _check_temperature(temperature)
    scaled = jnp.asarray(logits, jnp.float32) / temperature
    # A shift changes no log-probability, so its gradient is 0: the one that `max` would
    # give to the largest logit cancels only up to rounding.
    shifted = scaled - lax.stop_gradient(jnp.max(scaled, axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(shifted, tokens[..., None], axis=-1)[..., 0]
    return chosen - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


def token_entropy(
    logits: Float[Array, "*B T V"], *, temperature: float = 1.0
) -> Float[Array, "*B T"]:
    """Entropy in nats of each next-token distribution: -sum(p * log(p)).

    Here p = softmax(logits / temperature). A logit of -inf has p = 0 and adds 0, as
    0 * log(0) = 0, to the value and to the gradient.
    """
    _checks.require_rank("logits", logits, axes="T V")
    _check_temperature(temperature)
    scaled = jnp.asarray(logits, jnp.float32) / temperature
    shifted = scaled - lax.stop_gradient(jnp.max(scaled, axis=-1, keepdims=True))
    # A finite stand-in for -inf: its product with p = 0 is NaN, in the gradient too.
    possible = shifted > -jnp.inf
    finite = jnp.where(possible, shifted, 0.0)
    mass = jnp.where(possible, jnp.exp(finite), 0.0)
    total = jnp.sum(mass, axis=-1)
    return jnp.log(total) - jnp.sum(mass * finite, axis=-1) / total


def sequence_logprobs(
    logp: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    reduce: Literal["sum", "mean"] = "sum",
) -> Float[Array, "*B"]:
    """Log-probability in nats of each sequence: sum, or mean, over its unmasked tokens.

    A sequence with no unmasked token has 0. Masked entries may hold anything.
    """
    _checks.require_rank("logp", logp, axes="T")
    _checks.require_mask("mask", mask, logp.shape, like="logp's")
    _checks.require_choice("reduce", reduce, ("sum", "mean"))
    # `where` and not a product: NaN times 0 is NaN, and masked entries may hold NaN.
    total = jnp.sum(jnp.where(mask, jnp.asarray(logp, jnp.float32), 0.0), axis=-1)
    if reduce == "sum":
        return total
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def chunked_logprobs(
    hidden: Float[Array, "*B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "*B T"],
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 1024,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """Log-probabilities (and entropies) of tokens under logits = hidden @ head.

    Equal to `token_logprobs(logits, tokens)` and `token_entropy(logits)`, with logits =
    softcap * tanh(hidden @ head / softcap) where a softcap is given (Gemma 2,
    Gemma Team 2024, section 2, https://arxiv.org/abs/2408.00118). Peak memory is
    O(chunk_size * V), forward and backward: the gradient makes the logits of a chunk
    again. Products are taken in the dtype of `head` and summed in float32; the gradient
    of `head` is summed over chunks in float32. Reverse mode only.

    Args:
        hidden: final hidden states; entry t predicts `tokens[..., t]`.
        chunk_size: tokens per chunk, counted over the whole (global) array. Each chunk
            takes tokens from all along the flattened leading axes, so one that is
            sharded over devices stays sharded inside every chunk.
    """
    _check_tokens("hidden", hidden, tokens)
    _check_head(hidden, head)
    _check_temperature(temperature)
    _checks.require_whole("chunk_size", chunk_size, meaning="tokens per chunk")
    _checks.require_flag("with_entropy", with_entropy)
    if logit_softcap is not None:
        _checks.require_number(
            "logit_softcap", logit_softcap, above=0, meaning="a bound of the logits"
        )
    count, rows = _chunk_layout(tokens.size, chunk_size)
    width, padding = hidden.shape[-1], count * rows - tokens.size
    # What padded rows give is cut off below, so their gradient is 0.
    flat_hidden = jnp.pad(hidden.reshape(tokens.size, width), ((0, padding), (0, 0)))
    flat_tokens = jnp.pad(tokens.reshape(tokens.size), (0, padding))
    logp, entropies = _chunked(
        flat_hidden.reshape(rows, count, width),
        head,
        flat_tokens.reshape(rows, count),
        _Settings(temperature, logit_softcap, with_entropy),
    )
    logp = logp.reshape(-1)[: tokens.size].reshape(tokens.shape)
    if not with_entropy:
        return TokenLogprobs(logp, None)
    return TokenLogprobs(
        logp, entropies.reshape(-1)[: tokens.size].reshape(tokens.shape)
    )


class _Settings(NamedTuple):
    temperature: float
    softcap: float | None
    with_entropy: bool


def _check_temperature(temperature: float) -> None:
    _checks.require_number(
        "temperature", temperature, above=0, meaning="it divides the logits"
    )


def _check_tokens(
    name: str, array: Float[Array, "..."], tokens: Int[Array, "..."]
) -> None:
    _checks.require_rank(name, array, axes="T V" if name == "logits" else "T D")
    _checks.require_shape(
        "tokens", tokens, array.shape[:-1], like=f"{name}' without its last axis"
    )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens has dtype {tokens.dtype}, expected integer token ids."
        )


def _check_head(hidden: Float[Array, "..."], head: Float[Array, "..."]) -> None:
    _checks.require_array("head", head)
    if head.ndim != 2 or head.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"head has shape {head.shape}, expected [D, V] with D = "
            f"{hidden.shape[-1]}, hidden's last axis; a tied embedding is [V, D]: "
            "transpose it."
        )


def _chunk_layout(size: int, chunk_size: int) -> tuple[int, int]:
    """Number of chunks and tokens in each, without padding if a nearby number allows.

    Padding would move tokens between the devices of a sharded batch.
    """
    fewest = max(1, -(-size // chunk_size))
    # Chunks of at least half the size that was asked for: smaller ones would read the
    # head more often than padding costs.
    for count in range(fewest, 2 * fewest):
        if size % count == 0:
            return count, size // count
    return fewest, -(-size // fewest)


def _chunk_logits(
    rows: Float[Array, "C D"], head: Float[Array, "D V"], settings: _Settings
) -> Float[Array, "C V"]:
    # Summed in float32: a sum in bfloat16 keeps three digits.
    logits = jnp.matmul(
        rows.astype(head.dtype), head, preferred_element_type=jnp.float32
    )
    if settings.softcap is not None:
        logits = settings.softcap * jnp.tanh(logits / settings.softcap)
    return logits / settings.temperature


def _is_token(
    tokens: Int[Array, " C"], logits: Float[Array, "C V"]
) -> Bool[Array, "C V"]:
    # A comparison, unlike a gather, stays local when V is sharded, and fuses.
    return lax.broadcasted_iota(tokens.dtype, logits.shape, 1) == tokens[:, None]


def _chunked_primal(
    hidden: Float[Array, "C M D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "C M"],
    settings: _Settings,
) -> tuple[Float[Array, "C M"], Float[Array, "C M"]]:
    """Log-probabilities and entropies (0 if not asked for) of M chunks of C tokens."""
    return _chunked_forward(hidden, head, tokens, settings)[0]


def _chunked_forward(hidden, head, tokens, settings):
    def chunk(_, index):
        logits = _chunk_logits(hidden[:, index], head, settings)
        top = jnp.max(logits, axis=-1)
        # Shifted by the largest logit, exp cannot overflow and the total is at least 1.
        shifted = logits - top[:, None]
        mass = jnp.exp(shifted)
        total = jnp.sum(mass, axis=-1)
        chosen = _is_token(tokens[:, index], logits)
        logp = jnp.sum(jnp.where(chosen, shifted, 0.0), axis=-1) - jnp.log(total)
        entropy = jnp.zeros_like(logp)
        if settings.with_entropy:
            entropy = jnp.log(total) - jnp.sum(mass * shifted, axis=-1) / total
        return None, (logp, entropy, top + jnp.log(total))

    # The scan indexes axis 1. A mesh splits axis 0 over devices, and so every device
    # has its share of every chunk.
    _, (logp, entropy, normalizer) = lax.scan(chunk, None, jnp.arange(hidden.shape[1]))
    return (logp.T, entropy.T), (hidden, head, tokens, normalizer.T, entropy.T)


def _chunked_backward(settings, residuals, cotangents):
    hidden, head, tokens, normalizer, entropy = residuals
    logp_grad, entropy_grad = cotangents

    def chunk(head_grad, index):
        rows = hidden[:, index]
        # Logits are made again instead of stored: those of all chunks are [tokens, V].
        # The forward pass stores a normalizer and an entropy per token.
        scaled = _chunk_logits(rows, head, settings)
        logits_grad = _logits_grad(
            scaled,
            _is_token(tokens[:, index], scaled),
            normalizer[:, index, None],
            entropy[:, index, None],
            logp_grad[:, index, None],
            entropy_grad[:, index, None],
            settings,
        ).astype(head.dtype)
        rows_grad = lax.dot_general(
            logits_grad,
            head,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        # Carried in float32: many chunks add up, each smaller than the sum's last bit
        # in bfloat16.
        head_grad += lax.dot_general(
            rows.astype(head.dtype),
            logits_grad,
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return head_grad, rows_grad.astype(hidden.dtype)

    head_grad, hidden_grad = lax.scan(
        chunk, jnp.zeros(head.shape, jnp.float32), jnp.arange(hidden.shape[1])
    )
    return jnp.swapaxes(hidden_grad, 0, 1), head_grad.astype(head.dtype), None


def _logits_grad(
    scaled: Float[Array, "C V"],
    chosen: Bool[Array, "C V"],
    normalizer: Float[Array, "C 1"],
    entropy: Float[Array, "C 1"],
    logp_grad: Float[Array, "C 1"],
    entropy_grad: Float[Array, "C 1"],
    settings: _Settings,
) -> Float[Array, "C V"]:
    """Gradient of the logits before softcap and temperature.

    d logp / dz = onehot - p, and d entropy / dz = -p * (log(p) + entropy).
    """
    # The forward pass stored log(sum(exp)), so no second reduction over V is needed.
    log_probs = scaled - normalizer
    probs = jnp.exp(log_probs)
    grad = jnp.where(chosen, logp_grad, 0.0) - logp_grad * probs
    if settings.with_entropy:
        grad -= entropy_grad * probs * (log_probs + entropy)
    grad /= settings.temperature
    if settings.softcap is not None:
        # The derivative of softcap * tanh(x / softcap) is 1 - tanh(x / softcap) ** 2.
        grad *= 1.0 - jnp.square(scaled * (settings.temperature / settings.softcap))
    return grad


# A custom gradient, because that of lax.scan would store the residuals of every chunk,
# among them its logits.
_chunked = jax.custom_vjp(_chunked_primal, nondiff_argnums=(3,))
_chunked.defvjp(_chunked_forward, _chunked_backward)
