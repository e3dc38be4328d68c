"""Rotary frequencies by hand, and the properties that make them positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.rope import (
    RopeConfig,
    apply_rotary,
    cosines_and_sines,
    inverse_frequencies,
)


def rotate(x, position, rope):
    tables = cosines_and_sines(jnp.array([[position]]), [rope], head_dim=x.shape[-1])
    out = apply_rotary(jnp.asarray(x)[None, None, None], tables[0][0], tables[1][0])
    return np.asarray(out)[0, 0, 0]


def test_frequencies_are_a_geometric_series():
    # h = 4, theta = 100: 100^0 = 1 and 100^(-2/4) = 0.1.
    ours = inverse_frequencies(RopeConfig(theta=100.0), head_dim=4)
    np.testing.assert_allclose(ours, [1.0, 0.1], rtol=1e-6)


def test_linear_scaling_divides_every_frequency():
    rope = RopeConfig(theta=100.0, kind="linear", factor=4.0)
    ours = inverse_frequencies(rope, head_dim=4)
    np.testing.assert_allclose(ours, [0.25, 0.025], rtol=1e-6)


def test_llama3_scaling_keeps_fast_pairs_and_stretches_slow_ones():
    rope = RopeConfig(
        theta=10.0**8,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=1257,
    )
    # Frequencies 1, 1e-2, 1e-4, 1e-6; turns in 1257 tokens: 200.06, 2.0006, 0.02, 0.
    # More than 4 turns: kept. Less than 1: divided by 8. Between: (2.0006 - 1) / 3 =
    # 0.33352 kept plus 0.66648 / 8 = 0.08331 stretched, 0.41683 in all.
    ours = inverse_frequencies(rope, head_dim=8)
    np.testing.assert_allclose(ours, [1.0, 0.41683e-2, 0.125e-4, 0.125e-6], rtol=1e-4)


def test_rotation_by_hand():
    # h = 2: position 1 turns (1, 0) by one radian to (cos 1, sin 1) = (.5403, .84147).
    ours = rotate(np.array([1.0, 0.0], np.float32), 1, RopeConfig(theta=7.0))
    np.testing.assert_allclose(ours, [0.540302, 0.841471], rtol=1e-5)


def test_dimension_i_is_paired_with_i_plus_half():
    # h = 4: a vector along dimension 0 stays in dimensions 0 and 2.
    ours = rotate(np.array([1.0, 0, 0, 0], np.float32), 3, RopeConfig(theta=7.0))
    np.testing.assert_allclose(ours, [np.cos(3), 0, np.sin(3), 0], atol=1e-6)


def test_scores_depend_on_distance_only():
    q, k = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    rope = RopeConfig(theta=500.0)
    near = rotate(q, 5, rope) @ rotate(k, 2, rope)
    far = rotate(q, 105, rope) @ rotate(k, 102, rope)
    other = rotate(q, 6, rope) @ rotate(k, 2, rope)
    np.testing.assert_allclose(near, far, rtol=1e-4)
    assert abs(near - other) > 1e-2


def test_no_setting_is_no_rotation():
    x = np.arange(8, dtype=np.float32)
    np.testing.assert_array_equal(rotate(x, 11, None), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "yarn"}, "rope_type 'yarn'"),
        ({"kind": "linear"}, "needs a positive factor"),
        ({"kind": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"theta": 0.0}, "rope_theta must be positive"),
    ],
)
def test_a_setting_that_cannot_be_computed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**{"theta": 10.0, **options})
