"""Attention over prefix and own tokens, against a plain softmax over their union."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models._attention import attention, head_major
from grpo_jax.models.cache import Prefix

N, G, T, P, H, K, WIDTH = 2, 3, 4, 5, 4, 2, 6
LENGTHS = np.array([5, 2])


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(num_queries=T):
    own = (N, G, T, K, WIDTH)
    prefix = Prefix(
        keys=jnp.asarray(draw(3, N, K, P, WIDTH)),
        values=jnp.asarray(draw(4, N, K, P, WIDTH)),
        lengths=jnp.asarray(LENGTHS),
    )
    queries = draw(0, N, G, num_queries, H, WIDTH)
    return (
        jnp.asarray(queries),
        jnp.asarray(draw(1, *own)),
        jnp.asarray(draw(2, *own)),
        prefix,
    )


def plain_attention(queries, keys, values, prefix, *, offset, window, scale, softcap):
    """One query at a time, over a list of the keys that it may see."""
    out = np.zeros(queries.shape)
    for n, g, t, head in np.ndindex(*queries.shape[:4]):
        length = LENGTHS[n] if prefix is not None else 0
        kv = head // (H // K)
        own = np.asarray(keys)[n, g, :, kv], np.asarray(values)[n, g, :, kv]
        if prefix is not None:
            shared = np.asarray(prefix.keys)[n, kv, :length]
            own = (
                np.concatenate([shared, own[0]]),
                np.concatenate([np.asarray(prefix.values)[n, kv, :length], own[1]]),
            )
        position = length + offset + t
        first = 0 if window is None else max(0, position - window + 1)
        seen = slice(first, position + 1)
        scores = scale * own[0][seen] @ np.asarray(queries)[n, g, t, head]
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[n, g, t, head] = weights / weights.sum() @ own[1][seen]
    return out


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_attention_equals_a_softmax_over_the_visible_keys(window, softcap, with_prefix):
    queries, keys, values, prefix = inputs()
    prefix = prefix if with_prefix else None
    options = {"offset": 0, "window": window, "scale": 0.8, "softcap": softcap}
    ours = attention(
        queries, head_major(keys), head_major(values), prefix=prefix, **options
    )
    plain = plain_attention(queries, keys, values, prefix, **options)
    np.testing.assert_allclose(ours, plain, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("offset", [0, 2])
def test_one_query_at_an_offset_sees_what_is_written_so_far(window, offset):
    queries, keys, values, prefix = inputs(num_queries=1)
    options = {"offset": offset, "window": window, "scale": 1.0, "softcap": None}
    ours = attention(
        queries, head_major(keys), head_major(values), prefix=prefix, **options
    )
    plain = plain_attention(queries, keys, values, prefix, **options)
    np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_enormous_scores_stay_finite_in_value_and_gradient():
    queries, keys, values, prefix = inputs()
    options = {"offset": 0, "window": None, "scale": 1e6, "softcap": None}

    def total(queries):
        return attention(
            queries, head_major(keys), head_major(values), prefix=prefix, **options
        ).sum()

    value, gradient = jax.value_and_grad(total)(queries)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_a_prefix_wholly_outside_the_window_changes_nothing():
    queries, keys, values, prefix = inputs()
    options = {"offset": 0, "window": 1, "scale": 1.0, "softcap": None}
    ours = attention(
        queries, head_major(keys), head_major(values), prefix=prefix, **options
    )
    # With a window of 1 each query sees itself alone: the result is its own value.
    expected = np.repeat(values, H // K, axis=3)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
