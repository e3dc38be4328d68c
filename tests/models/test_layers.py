"""The parts of a layer, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models._layers import Embedding, Projection, RMSNorm, activation


def test_rms_norm_by_hand():
    # x = (3, 4): mean of squares 12.5, and with eps 12.5 the root is 5: (0.6, 0.8).
    # Times offset + scale = (1.5, 3) that is (0.9, 2.4).
    norm = RMSNorm(eps=12.5, offset=1.0)
    params = {"scale": jnp.array([0.5, 2.0])}
    out = norm.apply({"params": params}, jnp.array([[3.0, 4.0]]))
    np.testing.assert_allclose(out, [[0.9, 2.4]], rtol=1e-6)


def test_rms_norm_rounds_once():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((50, 8)), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    exact = 0.7 * wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 0.1)
    params = {"scale": jnp.full(8, 0.7)}
    out = RMSNorm(eps=0.1, offset=0.0).apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    # Rounding between the steps would move about every other entry by one bit.
    wrong = np.asarray(out) != exact.astype(jnp.bfloat16)
    assert wrong.mean() < 0.02


def test_projection_adds_bias_and_scaled_adapter():
    projection = Projection(
        in_features=2,
        out_features=1,
        axes=("embed", "mlp"),
        use_bias=True,
        lora_scale=3,
    )
    params = {"kernel": jnp.array([[1.0], [10.0]]), "bias": jnp.array([100.0])}
    x = jnp.array([[[2.0, 3.0]]])
    # 2 * 1 + 3 * 10 + 100 = 132.
    np.testing.assert_allclose(projection.apply({"params": params}, x), [[[132.0]]])
    # x a = 2 * 1 - 3 * 1 = -1; times b = 5 and scale 3 that is -15.
    lora = {"a": jnp.array([[1.0], [-1.0]]), "b": jnp.array([[5.0]])}
    adapted = projection.apply({"params": params, "lora": lora}, x)
    np.testing.assert_allclose(adapted, [[[117.0]]])


def test_embedding_scale_is_rounded_to_the_compute_dtype():
    embedding = Embedding(vocab_size=2, features=1, scale=33.94, dtype="bfloat16")
    params = {"embedding": jnp.array([[1.0], [2.0]])}
    out = embedding.apply({"params": params}, jnp.array([[1, 0]]))
    # bfloat16 steps by 1/4 between 32 and 64: 33.94 becomes 34.
    np.testing.assert_array_equal(np.asarray(out, np.float32), [[[68.0], [34.0]]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    # silu(1) = 1 / (1 + e^-1); gelu(1) = Phi(1); its tanh form is 4e-4 below.
    [("silu", 0.731059), ("gelu", 0.841345), ("gelu_tanh", 0.841192)],
)
def test_activation_by_hand(kind, expected):
    np.testing.assert_allclose(activation(jnp.ones(()), kind=kind), expected, rtol=2e-6)
