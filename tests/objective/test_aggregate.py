"""Aggregation: the four means by hand, empty ones, and sums that add."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import Mean, aggregate

NAN = jnp.nan
VALUES = jnp.array([[1.0, 2.0, 3.0], [4.0, NAN, jnp.inf], [NAN, NAN, NAN]])
MASK = jnp.array([[True, True, True], [True, False, False], [False] * 3])
MODES = ("sequence_mean", "sequence_sum", "token_mean", "fixed_length")


@pytest.mark.parametrize(
    ("mode", "options", "total", "weight"),
    [
        ("sequence_mean", {}, 6.0, 2.0),  # 6 / 3 + 4 / 1 over two sequences
        ("sequence_sum", {}, 10.0, 2.0),
        ("token_mean", {}, 10.0, 4.0),
        ("fixed_length", {}, 10.0, 6.0),  # two sequences of T = 3
        ("fixed_length", {"max_length": 8}, 10.0, 16.0),
    ],
)
def test_means_by_hand_without_padding_or_empty_sequences(mode, options, total, weight):
    mean = aggregate(VALUES, MASK, mode=mode, **options)
    assert (mean.total, mean.weight) == (total, weight)
    np.testing.assert_allclose(mean.value(), total / weight, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_mean_is_zero_with_zero_gradient(mode):
    def value(x):
        return aggregate(x, jnp.zeros((2, 3), bool), mode=mode).value()

    result, grad = jax.value_and_grad(value)(jnp.full((2, 3), NAN))
    assert result == 0.0
    np.testing.assert_array_equal(grad, jnp.zeros((2, 3)))


def test_the_gradient_of_an_empty_mean_is_zero_and_not_nan():
    grad = jax.grad(lambda total: Mean(total, jnp.float32(0.0)).value())
    assert grad(jnp.float32(0.0)) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_parts_add_up_to_the_whole(mode):
    values = jnp.arange(24.0).reshape(4, 6)
    mask = jnp.arange(6)[None] < jnp.array([6, 1, 0, 3])[:, None]
    parts = [
        aggregate(values[i : i + 1], mask[i : i + 1], mode=mode, max_length=9)
        for i in range(4)
    ]
    whole = aggregate(values, mask, mode=mode, max_length=9)
    added = functools.reduce(lambda a, b: a + b, parts)
    np.testing.assert_allclose(added.total, whole.total, rtol=1e-6)
    assert added.weight == whole.weight


def test_leading_axes_do_not_matter():
    values, mask = (
        jnp.arange(24.0).reshape(2, 2, 6),
        jnp.arange(24).reshape(2, 2, 6) % 5 > 0,
    )
    for mode in MODES:
        nested = aggregate(values, mask, mode=mode)
        flat = aggregate(values.reshape(4, 6), mask.reshape(4, 6), mode=mode)
        np.testing.assert_allclose(nested.value(), flat.value(), rtol=1e-6)


def test_a_mean_passes_through_transformations():
    means = jax.vmap(lambda x: Mean(x, 2.0 * x))(jnp.array([1.0, 3.0]))
    total, _ = jax.lax.scan(
        lambda carry, mean: (carry + mean, None),
        Mean(jnp.float32(0), jnp.float32(0)),
        means,
    )
    assert (total.total, total.weight, jax.jit(Mean.value)(total)) == (4.0, 8.0, 0.5)


def test_bfloat16_values_are_summed_in_float32():
    # 1024 ones: a bfloat16 sum stops at 256.
    mean = aggregate(
        jnp.ones((1, 1024), jnp.bfloat16),
        jnp.ones((1, 1024), bool),
        mode="sequence_sum",
    )
    assert mean.total.dtype == jnp.float32
    assert mean.total == 1024.0


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (jnp.ones((2, 4), bool), {"mode": "token_mean"}, r"mask has shape \(2, 4\)"),
        (jnp.ones((2, 3)), {"mode": "token_mean"}, "mask has dtype float32"),
        (
            jnp.ones((2, 3), bool),
            {"mode": "mean"},
            "mode is 'mean', expected one of seq",
        ),
        (
            jnp.ones((2, 3), bool),
            {"mode": "fixed_length", "max_length": 0},
            "max_length is 0, expected an integer above 0: tokens",
        ),
    ],
)
def test_wrong_arguments_are_named(without_shape_checks, mask, options, message):
    with pytest.raises(ValueError, match=message):
        aggregate(jnp.zeros((2, 3)), mask, **options)
