"""Flash attention's arrangement of prefix and group, against the plain form.

The arrangement runs anywhere, with JAX's own attention in place of cuDNN's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import _attention as attentions
from grpo_jax.models._flash import flash_attention, has_flash
from grpo_jax.models.cache import Prefix

N, G, P, H, K, WIDTH = 2, 3, 5, 4, 2, 8


def draw(seed, *shape):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def inputs(tokens):
    prefix = Prefix(
        keys=draw(3, N, K, P, WIDTH),
        values=draw(4, N, K, P, WIDTH),
        lengths=jnp.array([5, 2]),
    )
    own = (N, K, G, tokens, WIDTH)
    return draw(0, N, G, tokens, H, WIDTH), draw(1, *own), draw(2, *own), prefix


def attended(arrays, lengths, *, window, scale, index=None):
    """Attention of queries, keys and values, and of a prefix's where lengths are."""
    queries, keys, values, *shared = arrays
    return attentions.attention(
        queries,
        keys,
        values,
        prefix=None if lengths is None else Prefix(*shared, lengths),
        window=window,
        scale=scale,
        softcap=None,
        index=index,
    )


@pytest.fixture
def with_flash(monkeypatch):
    """Makes `attention` take the arrangement for cuDNN."""

    def use():
        plain = functools.partial(flash_attention, implementation="xla")
        monkeypatch.setattr(attentions, "flash_attention", plain)
        monkeypatch.setattr(attentions, "has_flash", lambda queries: True)

    return use


@pytest.mark.accelerator
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_a_gpu_gives_what_the_plain_form_gives(window, with_prefix, monkeypatch):
    n, group, heads, kv_heads, width, tokens, prompt = 2, 8, 9, 3, 64, 255, 64
    own = (n, kv_heads, group, tokens, width)
    shared = (n, kv_heads, prompt, width)
    shapes = [(n, group, tokens, heads, width), own, own, shared, shared]
    arrays = [draw(i, *s).astype(jnp.bfloat16) for i, s in enumerate(shapes)]
    if not has_flash(arrays[0]):
        pytest.skip("needs an NVIDIA GPU: JAX_PLATFORMS=cuda pytest -m accelerator")
    weights = draw(5, *shapes[0])

    lengths = jnp.array([prompt, prompt // 3]) if with_prefix else None

    def total(*arrays):
        out = attended(arrays, lengths, window=window, scale=width**-0.5)
        return jnp.sum(weights * out), out

    # One after the other: a function that was traced is not traced again.
    def differentiate(*arrays):
        gradient = jax.grad(total, argnums=range(len(shapes)), has_aux=True)
        return jax.jit(lambda *a: gradient(*a))(*arrays)

    gradients, out = differentiate(*arrays)
    monkeypatch.setattr(attentions, "has_flash", lambda queries: False)
    wide = [x.astype(jnp.float32) for x in arrays]
    expected_gradients, expected = differentiate(*wide)
    for ours, plain in zip(
        [out, *gradients], [expected, *expected_gradients], strict=True
    ):
        error = jnp.linalg.norm(ours.astype(jnp.float32) - plain)
        assert error <= 1e-2 * jnp.linalg.norm(plain)  # bfloat16 has 8 bits


@pytest.mark.parametrize("tokens", [4, 3])  # odd lengths are padded
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_it_equals_the_plain_form_in_value_and_gradient(
    tokens, window, with_prefix, with_flash
):
    queries, keys, values, prefix = inputs(tokens)
    lengths = prefix.lengths if with_prefix else None
    arrays = queries, keys, values, prefix.keys, prefix.values
    check(with_flash, arrays, lengths, window=window, scale=0.8)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_it_serves_rows_of_several_sequences(window, with_prefix, with_flash):
    queries, keys, values, prefix = inputs(4)
    lengths = prefix.lengths if with_prefix else None
    arrays = (
        queries[:, :1],
        keys[:, :, :1],
        values[:, :, :1],
        prefix.keys,
        prefix.values,
    )
    index = jnp.array([[0, 1, 0, 1], [0, 0, 1, 2]])
    check(with_flash, arrays, lengths, window=window, scale=0.8, index=index)


def check(with_flash, arrays, lengths, **options):
    """Both forms give the same sum of the results with weights, and its gradients."""
    weights = draw(5, *arrays[0].shape)

    def total(*arrays):
        return jnp.sum(weights * attended(arrays, lengths, **options))

    # Each time another function: what was traced is not traced again.
    def differentiate(*arrays):
        gradient = jax.value_and_grad(total, argnums=range(len(arrays)))
        return jax.jit(lambda *a: gradient(*a))(*arrays)

    expected, expected_gradients = differentiate(*arrays)
    with_flash()
    found, gradients = differentiate(*arrays)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for ours, plain in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_one_query_and_capped_scores_stay_with_the_plain_form(with_flash, monkeypatch):
    queries, keys, values, prefix = inputs(4)
    with_flash()
    monkeypatch.setattr(attentions, "flash_attention", None)
    options = {"prefix": prefix, "window": None, "scale": 1.0}
    attentions.attention(queries, keys, values, softcap=2.0, **options)
    one = queries[:, :, :1]
    attentions.attention(
        one, keys[..., :1, :], values[..., :1, :], softcap=None, **options
    )


def test_a_device_without_it_is_told_apart():
    assert not has_flash(jnp.zeros((1, 1, 2, 1, 64), jnp.bfloat16))
