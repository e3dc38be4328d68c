"""Dense log-probabilities, entropies and their sums over sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from grpo_jax.objective import sequence_logprobs, token_entropy, token_logprobs

LOGITS = jnp.log(jnp.array([[1.0, 3.0], [1.0, 3.0]]))  # p = 0.25, 0.75


def test_token_logprobs_by_hand():
    logp = token_logprobs(LOGITS, jnp.array([0, 1]))
    # The logarithms of 0.25 and 0.75.
    np.testing.assert_allclose(logp, [-1.3862944, -0.2876821], rtol=1e-6)


def test_temperature_divides_the_logits():
    # At temperature 1/2 odds of 3 become 9: p = 0.1, 0.9.
    logp = token_logprobs(LOGITS, jnp.array([0, 1]), temperature=0.5)
    np.testing.assert_allclose(logp, np.log([0.1, 0.9]), rtol=1e-6)


def test_token_entropy_by_hand():
    # 0.25 * 1.3862944 + 0.75 * 0.2876821 = 0.3465736 + 0.2157616
    np.testing.assert_allclose(token_entropy(LOGITS), [0.5623352] * 2, rtol=1e-6)
    # At temperature 1/2: -0.1 * log(0.1) - 0.9 * log(0.9) = 0.2302585 + 0.0948245
    np.testing.assert_allclose(
        token_entropy(LOGITS, temperature=0.5), [0.3250830] * 2, rtol=1e-6
    )


def test_entropy_of_the_uniform_distribution_is_log_v():
    np.testing.assert_allclose(token_entropy(jnp.zeros((1, 8))), [np.log(8.0)])


def test_a_minus_inf_logit_is_impossible_and_leaves_gradients_finite():
    logits = jnp.array([[0.0, -jnp.inf, 0.0]] * 2)
    tokens = jnp.array([1, 0])
    np.testing.assert_allclose(
        token_logprobs(logits, tokens), [-np.inf, -np.log(2.0)], rtol=1e-6
    )
    grad = jax.grad(lambda z: token_logprobs(z, tokens).sum())(logits)
    # onehot - p, with p = (1/2, 0, 1/2).
    np.testing.assert_allclose(grad, [[-0.5, 1.0, -0.5], [0.5, 0.0, -0.5]], atol=1e-6)


def test_entropy_counts_zero_times_log_zero_as_zero():
    logits = jnp.array([[0.0, -jnp.inf, 0.0], [0.0, -jnp.inf, jnp.log(3.0)]])
    np.testing.assert_allclose(
        token_entropy(logits), [np.log(2.0), 0.5623352], rtol=1e-6
    )
    grad = jax.grad(lambda z: token_entropy(z).sum())(logits)
    # -p * (log(p) + H) = -0.25 * (-1.3862944 + 0.5623352) = 0.2059898; they sum to 0.
    expected = [[0.0, 0.0, 0.0], [0.2059898, 0.0, -0.2059898]]
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_huge_logits_do_not_overflow():
    logits = jnp.array([[1e4, 1e4, 0.0]])
    tokens = jnp.array([0])
    np.testing.assert_allclose(token_logprobs(logits, tokens), [-np.log(2.0)])
    np.testing.assert_allclose(token_entropy(logits), [np.log(2.0)], rtol=1e-6)


def test_gradients_match_finite_differences():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    tokens = jnp.array([[0, 4, 2], [1, 1, 3]])
    for function in (
        jax.jit(lambda z: token_logprobs(z, tokens, temperature=0.7)),
        jax.jit(lambda z: token_entropy(z, temperature=0.7)),
    ):
        check_grads(function, (logits,), order=1, modes=["rev"], rtol=1e-3)


def test_bfloat16_logits_are_computed_in_float32():
    logits = jax.random.normal(jax.random.key(1), (4, 50)).astype(jnp.bfloat16)
    tokens = jnp.arange(4)
    logp, entropy = token_logprobs(logits, tokens), token_entropy(logits)
    assert logp.dtype == entropy.dtype == jnp.float32
    wide = logits.astype(jnp.float32)
    np.testing.assert_array_equal(logp, token_logprobs(wide, tokens))
    np.testing.assert_array_equal(entropy, token_entropy(wide))


def test_a_token_outside_the_vocabulary_is_nan():
    assert jnp.isnan(token_logprobs(LOGITS, jnp.array([2, 0]))[0])


def test_sequence_logprobs_ignore_masked_entries_and_empty_sequences():
    logp = jnp.array([[-1.0, -2.0, jnp.nan], [-3.0, jnp.inf, jnp.nan], [jnp.nan] * 3])
    mask = jnp.array([[True, True, False], [True, False, False], [False] * 3])
    np.testing.assert_array_equal(sequence_logprobs(logp, mask), [-3.0, -3.0, 0.0])
    mean = sequence_logprobs(logp, mask, reduce="mean")
    np.testing.assert_array_equal(mean, [-1.5, -3.0, 0.0])  # -3 / 2, -3 / 1
    grad = jax.grad(lambda x: sequence_logprobs(x, mask, reduce="mean").sum())(logp)
    np.testing.assert_array_equal(grad, [[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: token_logprobs(LOGITS, jnp.array([0, 1]), temperature=0.0),
            "temperature is 0.0, expected a finite number above 0",
        ),
        (
            lambda: token_logprobs(LOGITS, jnp.array([0])),
            r"tokens has shape \(1,\), expected \(2,\)",
        ),
        (
            lambda: token_logprobs(LOGITS, jnp.array([0.0, 1.0])),
            "tokens has dtype float32, expected integer",
        ),
        (lambda: token_entropy(jnp.zeros(3)), r"logits has shape \(3,\)"),
        (
            lambda: sequence_logprobs(jnp.zeros((2, 3)), jnp.ones((2, 3))),
            "mask has dtype float32, expected bool: write `mask > 0`",
        ),
        (
            lambda: sequence_logprobs(
                jnp.zeros((2, 3)), jnp.ones((2, 3), bool), reduce="max"
            ),
            "reduce is 'max', expected one of sum, mean",
        ),
    ],
)
def test_wrong_arguments_are_named(without_shape_checks, call, message):
    with pytest.raises(ValueError, match=message):
        call()
