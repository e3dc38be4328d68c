"""Every formula against its NumPy float64 mirror, on thousands of random inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import objective

ROWS, T, G, V = 3000, 6, 5, 11
DTYPES = ("float32", "bfloat16")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def rounded(array, dtype):
    """An array for JAX, and the same rounded numbers in float64 for the mirror."""
    array = jnp.asarray(array, dtype)
    return array, np.asarray(array.astype(jnp.float32), np.float64)


def assert_close(got, expected, rtol=1e-5, atol=2e-6):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def policies(dtype, count=4, rows=ROWS):
    """Log-probabilities of related policies (JAX, mirror), advantages and a mask."""
    generator = np.random.default_rng(0)
    logp = -generator.exponential(1.5, (rows, T))
    pairs = [
        rounded(logp + scale * generator.normal(size=logp.shape), dtype)
        for scale in (0.0, 0.4, 0.8, 0.3)[:count]
    ]
    advantages = rounded(generator.normal(size=rows), dtype)
    mask = np.arange(T) < generator.integers(0, T + 1, (rows, 1))
    return pairs, advantages, mask


@every_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_entropy(mirror, dtype, temperature):
    generator = np.random.default_rng(1)
    logits, exact = rounded(3.0 * generator.normal(size=(ROWS, V)), dtype)
    tokens = generator.integers(0, V, ROWS)
    assert_close(
        objective.token_logprobs(logits, jnp.array(tokens), temperature=temperature),
        mirror.token_logprobs(exact, tokens, temperature),
    )
    assert_close(
        objective.token_entropy(logits, temperature=temperature),
        mirror.token_entropy(exact, temperature),
    )


@every_dtype
@pytest.mark.parametrize("all_valid", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "mirrored"),
    [
        ("group_softmax_weights", {"temperature": 0.5}, "group_softmax_weights"),
        ("softmax_advantages", {"temperature": 0.5}, "softmax_advantages"),
        ("softmax_advantages", {"temperature": 50.0}, "softmax_advantages"),
        ("standardized_advantages", {"eps": 1e-4}, "standardized_advantages"),
        (
            "standardized_advantages",
            {"eps": 1e-4, "std_over": "batch"},
            "batch_standardized_advantages",
        ),
        ("centered_advantages", {}, "centered_advantages"),
        ("leave_one_out_advantages", {}, "leave_one_out_advantages"),
    ],
)
def test_advantages(mirror, dtype, all_valid, name, options, mirrored):
    generator = np.random.default_rng(2)
    rewards, exact = rounded(generator.normal(size=(ROWS, G)), dtype)
    valid = np.ones((ROWS, G), bool) if all_valid else generator.random((ROWS, G)) < 0.6
    arguments = {} if all_valid else {"valid": jnp.array(valid)}
    got = jax.jit(
        lambda r: getattr(objective, name)(
            jnp.where(valid, r, jnp.nan), **arguments, **options
        )
    )(rewards)
    shared = {key: x for key, x in options.items() if key != "std_over"}
    assert_close(got, getattr(mirror, mirrored)(exact, valid, **shared))


def test_overlong_penalty(mirror):
    lengths = np.arange(300)
    got = objective.overlong_penalty(jnp.array(lengths), max_length=200, cache=64)
    assert_close(got, mirror.overlong_penalty(lengths, 200, 64))


@every_dtype
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 3.0])
def test_kl_estimates(mirror, dtype, kind, scale):
    generator = np.random.default_rng(3)
    logp, exact = rounded(-generator.exponential(1.0, (ROWS, T)), dtype)
    ref_logp, ref_exact = rounded(
        exact + scale * generator.normal(size=(ROWS, T)), dtype
    )
    # Relative to the log-ratio in float32, whose own rounding is 1e-7 of the inputs.
    atol = 2e-6 * scale if kind == "k1" else 2e-6 * min(scale, 1.0)
    assert_close(
        objective.kl_estimate(logp, ref_logp, kind=kind),
        mirror.kl_estimate(exact, ref_exact, kind),
        atol=atol,
    )


@every_dtype
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratios_surrogates_and_corrections(mirror, dtype, level):
    pairs, (advantages, exact_advantages), mask = policies(dtype)
    (logp, exact), (old, exact_old), _, (sampler, exact_sampler) = pairs
    log_ratio = objective.log_importance_ratio(logp, old, jnp.array(mask), level=level)
    exact_ratio = mirror.log_importance_ratio(exact, exact_old, mask, level)
    assert_close(log_ratio, exact_ratio)
    for dual_clip in (None, 1.5):
        bounds = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": dual_clip}
        assert_close(
            objective.clipped_surrogate(log_ratio, advantages, **bounds),
            mirror.clipped_surrogate(exact_ratio, exact_advantages, **bounds),
        )
    assert_close(
        objective.cispo_surrogate(logp, log_ratio, advantages, max_weight=1.3),
        mirror.cispo_surrogate(exact, exact_ratio, exact_advantages, 1.3),
    )
    assert_close(
        objective.importance_correction(old, sampler, cap=1.3),
        mirror.importance_correction(exact_old, exact_sampler, 1.3),
    )


@every_dtype
@pytest.mark.parametrize(
    "mode", ["sequence_mean", "sequence_sum", "token_mean", "fixed_length"]
)
@pytest.mark.parametrize("max_length", [None, 9])
def test_aggregates(mirror, dtype, mode, max_length):
    ((values, exact), *_), _, mask = policies(dtype, 1)
    got = objective.aggregate(values, jnp.array(mask), mode=mode, max_length=max_length)
    expected = mirror.aggregate(exact, mask, mode, max_length)
    assert_close(got.value(), expected)


@every_dtype
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_weighted_likelihood(mirror, dtype, reduce):
    ((logp, exact), *_), (weights, exact_weights), mask = policies(dtype, 1)
    shape = (ROWS // G, G)
    got = objective.weighted_likelihood_loss(
        logp.reshape(*shape, T),
        jnp.array(mask).reshape(*shape, T),
        weights.reshape(shape),
        reduce=reduce,
    )
    expected = mirror.weighted_likelihood_loss(
        exact.reshape(*shape, T),
        mask.reshape(*shape, T),
        exact_weights.reshape(shape),
        reduce,
    )
    assert_close(got.value(), expected)


KL = {"kl_coef": 0.04}
LOSSES = {
    "softmax": KL,
    "likelihood": {"surrogate": "likelihood", "aggregation": "sequence_sum"},
    "grpo": KL,
    "grpo k2": {"kl_coef": 0.04, "kl_estimator": "k2"},
    "dr_grpo": {"aggregation": "fixed_length", "max_length": 9},
    "dapo": {"aggregation": "token_mean", "clip_high": 0.28, "dual_clip": 1.5},
    "gspo": {"ratio_level": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    "gspo tokens": {"ratio_level": "sequence", "aggregation": "token_mean"},
    "entropy": {"entropy_coef": 0.01},
    "corrected": {"sampler_correction_cap": 1.3, "kl_coef": 0.04},
    "cispo": {"surrogate": "cispo", "cispo_max_weight": 1.3},
}


def loss_arguments(pairs, which):
    logp, old, ref, sampler = (pair[which] for pair in pairs)
    return logp, {
        "old_logp": old,
        "ref_logp": ref,
        "sampler_logp": sampler,
        "entropy": -0.5 * ref,
    }


@every_dtype
@pytest.mark.parametrize("name", LOSSES)
def test_grpo_loss(mirror, dtype, name):
    pairs, advantages, mask = policies(dtype)
    logp, others = loss_arguments(pairs, 0)
    exact, exact_others = loss_arguments(pairs, 1)
    got = jax.jit(functools.partial(objective.grpo_loss, **LOSSES[name]))(
        logp, jnp.array(mask), advantages[0], **others
    )
    expected = mirror.grpo_loss(
        exact, mask, advantages[1], **exact_others, **LOSSES[name]
    )
    assert_close(got.loss.value(), expected)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cispo"])
def test_gradients_match_finite_differences_of_the_mirror(mirror, name):
    # CISPO's stopped gradient has no finite difference; its test is by hand.
    pairs, advantages, mask = policies("float32", rows=12)
    logp, others = loss_arguments(pairs, 0)
    exact, exact_others = loss_arguments(pairs, 1)
    grad = jax.jit(
        jax.grad(
            lambda x: objective.grpo_loss(
                x, jnp.array(mask), advantages[0], **others, **LOSSES[name]
            ).loss.value()
        )
    )(logp)

    def difference(index, step=1e-5):
        values = []
        for sign in (1, -1):
            moved = exact.copy()
            moved[index] += sign * step
            # The correction is of the old policy to the sampler: logp is not in it.
            values.append(
                mirror.grpo_loss(
                    moved, mask, advantages[1], **exact_others, **LOSSES[name]
                )
            )
        return (values[0] - values[1]) / (2 * step)

    expected = np.zeros(exact.shape)
    for index in np.argwhere(mask):
        expected[tuple(index)] = difference(tuple(index))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-6)
