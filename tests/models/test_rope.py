"""Rotary frequencies by hand, and the properties that make them positions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.rope import (
    RopeConfig,
    Rotary,
    apply_rotary,
    inverse_frequencies,
    rotary_tables,
)


def rotate(x, position, rope):
    tables = rotary_tables(jnp.array([[position]]), [rope], head_dim=x.shape[-1])
    one = Rotary(tables.cosines[0], tables.sines[0])
    out = apply_rotary(jnp.asarray(x)[None, None, None], one, neighbors=False)
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


def test_yarn_keeps_fast_pairs_and_divides_slow_ones_by_their_index():
    rope = RopeConfig(
        theta=100.0,
        kind="yarn",
        factor=4.0,
        original_max_position_embeddings=63,
        attention_factor=1.2,
        beta_fast=5.0,
        beta_slow=0.5,
    )
    # h = 8: frequencies 1, 0.316, 0.1, 0.0316. A pair turns beta times in 63 tokens at
    # index 8 ln(63 / (2 pi beta)) / (2 ln 100): 0.605 for 5 turns, 2.605 for half a
    # turn, rounded outwards to 0 and 3. So 0, 1/3, 2/3 and all are divided by 4: shares
    # 1, 0.75, 0.5 and 0.25 remain.
    ours = inverse_frequencies(rope, head_dim=8)
    np.testing.assert_allclose(
        ours, [1.0, 0.75 * 0.316228, 0.5 * 0.1, 0.25 * 0.0316228], rtol=1e-5
    )
    # Both tables are multiplied by the attention factor: (1, 0) at position 0.
    assert abs(rotate(np.eye(8, dtype=np.float32)[0], 0, rope)[0] - 1.2) < 1e-6


def test_longrope_divides_each_pair_by_its_own_factor():
    rope = RopeConfig(
        theta=100.0,
        kind="longrope",
        original_max_position_embeddings=32,
        attention_factor=1.0,
        short_factor=(1.0, 2.0),
        long_factor=(3.0, 4.0),
    )
    np.testing.assert_allclose(inverse_frequencies(rope, head_dim=4), [1.0, 0.05])
    # Longer sequences would have the other factors, for all of their positions.
    assert rope.context == 32
    same = dataclasses.replace(rope, long_factor=(1.0, 2.0))
    assert same.context is None and RopeConfig(theta=1.0).context is None


def test_dimensions_beyond_the_tables_do_not_rotate():
    # h = 6, of which 4 rotate: 0 with 2 and 1 with 3.
    tables = rotary_tables(jnp.array([[3]]), [RopeConfig(theta=7.0)], head_dim=4)
    one = Rotary(tables.cosines[0], tables.sines[0])
    x = np.array([1.0, 0, 0, 0, 5.0, 6.0], np.float32)
    out = np.asarray(
        apply_rotary(jnp.asarray(x)[None, None, None], one, neighbors=False)
    )[0, 0, 0]
    np.testing.assert_allclose(out, [np.cos(3), 0, np.sin(3), 0, 5, 6], atol=1e-6)


def test_neighbors_can_be_the_pairs():
    # h = 5, of which 4 rotate: 0 with 1 and 2 with 3.
    tables = rotary_tables(jnp.array([[3]]), [RopeConfig(theta=9.0)], head_dim=4)
    one = Rotary(tables.cosines[0], tables.sines[0])
    x = jnp.array([1.0, 0, 1.0, 0, 5.0])[None, None, None]
    out = np.asarray(apply_rotary(x, one, neighbors=True))[0, 0, 0]
    # The second frequency is 9^(-2/4) = 1/3, so it turns by one radian.
    expected = [np.cos(3), np.sin(3), np.cos(1), np.sin(1), 5]
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_queries_grow_with_the_logarithm_of_their_position():
    rope = RopeConfig(theta=7.0, original_max_position_embeddings=4, query_beta=0.5)
    positions = jnp.array([[0, 3, 4, 11]])
    # p // 4 is 0, 0, 1 and 2: 1 + log(1 + that) / 2.
    expected = [1.0, 1.0, 1 + np.log(2) / 2, 1 + np.log(3) / 2]
    tables = rotary_tables(positions, [rope, None], head_dim=2)
    np.testing.assert_allclose(tables.queries, [[expected], [[1.0] * 4]], rtol=1e-6)
    assert rotary_tables(positions, [None], head_dim=2).queries is None
    # Those of empty slots stay finite.
    negative = rotary_tables(jnp.array([[-1, -9]]), [rope], head_dim=2)
    np.testing.assert_array_equal(negative.queries, [[[1.0, 1.0]]])


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
        ({"kind": "dynamic"}, "rope_type 'dynamic'"),
        ({"kind": "yarn"}, "rope_type 'yarn' needs a positive factor"),
        ({"kind": "linear"}, "needs a positive factor"),
        ({"kind": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"theta": 0.0}, "rope_theta must be positive"),
        ({"kind": "yarn", "theta": 1.0}, "rope_theta must be positive"),
        ({"query_beta": 0.1}, "needs a positive original_max_position_embeddings"),
        (
            {
                "kind": "longrope",
                "original_max_position_embeddings": 4,
                "attention_factor": 1.0,
                "short_factor": (1.0, 0.0),
            },
            "needs a positive short_factor",
        ),
    ],
)
def test_a_setting_that_cannot_be_computed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**{"theta": 10.0, **options})
