"""A draw inverts the cumulative distribution; its log-prob is that of the learner."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from grpo_jax.rollout import _blocks as blocks
from grpo_jax.rollout import draw as sampling

# The largest float32 that a uniform number in [0, 1) can be.
ALMOST_ONE = np.float32(1 - 2**-24)


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p", "min_p"))
def draw(logits, uniform, **options):
    return sampling.sample_token(logits, uniform, **options)


def tokens_of(probabilities, uniforms, *, temperature=1.0, **options):
    """The tokens drawn from one distribution at several uniform numbers."""
    with np.errstate(divide="ignore"):
        logits = np.log(np.asarray(probabilities, np.float32))
    logits = np.tile(logits, (len(uniforms), 1))
    uniforms = np.asarray(uniforms, np.float32)
    # Not jitted: the operations compile once for all options.
    drawn, _ = sampling.sample_token(
        logits, uniforms, temperature=temperature, **options
    )
    return drawn.tolist()


def kept(probabilities, **options):
    """The tokens that any of many evenly spaced draws takes."""
    uniforms = np.linspace(0, 1, 200, endpoint=False)
    return set(tokens_of(probabilities, uniforms, **options))


# Running sums of 0.5, 0.25, 0.125, 0.125 are 0.5, 0.75, 0.875, 1: exact in float32.
@pytest.mark.parametrize(
    ("uniform", "token"),
    [
        (0.0, 0),
        (0.49, 0),
        (0.51, 1),
        (0.74, 1),
        (0.76, 2),
        (0.87, 2),
        (0.88, 3),
        (ALMOST_ONE, 3),
    ],
)
def test_the_draw_inverts_the_running_sum(uniform, token):
    assert tokens_of([0.5, 0.25, 0.125, 0.125], [uniform]) == [token]


def test_frequencies_follow_the_softmax_at_the_temperature():
    # Evenly spaced uniforms give each token its share to 1 in 4000, and the vocabulary
    # of 700 spans three blocks of the search.
    rng = np.random.default_rng(0)
    logits = rng.normal(size=700).astype(np.float32) * 2
    rows = np.tile(logits, (4000, 1))
    uniforms = ((np.arange(4000) + 0.5) / 4000).astype(np.float32)
    drawn, _ = draw(rows, uniforms, temperature=0.7)
    frequencies = np.bincount(drawn, minlength=700) / 4000
    scaled = np.exp(logits / 0.7 - (logits / 0.7).max())
    np.testing.assert_allclose(frequencies, scaled / scaled.sum(), atol=1.01 / 4000)


def sparse_logits():
    """Rows of which most entries, the last ones too, have no probability."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(300, 600)).astype(np.float32) * 3
    logits[rng.random(logits.shape) < 0.8] = -np.inf
    logits[:, 590:] = -np.inf
    return logits


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999, ALMOST_ONE])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    logits = sparse_logits()
    drawn, logp = draw(logits, np.full(300, uniform, np.float32), temperature=1.0)
    assert np.isfinite(logits[np.arange(300), drawn]).all()
    assert np.isfinite(logp).all()


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999, ALMOST_ONE])
def test_sums_that_round_in_parallel_draw_no_token_of_probability_zero(
    uniform, monkeypatch
):
    # Accelerators sum in another order: there a running sum can rise, or fall, where
    # nothing is added. Here it does so everywhere.
    exact = jnp.cumsum

    def wobbling(values, axis):
        wobble = jnp.where(jnp.arange(values.shape[axis]) % 3 == 0, 1e-6, -1e-6)
        return exact(values, axis=axis) * (1 + wobble)[None, :]

    monkeypatch.setattr(sampling.jnp, "cumsum", wobbling)
    logits = sparse_logits()
    uniforms = np.full(300, uniform, np.float32)
    drawn, _ = sampling.sample_token(logits, uniforms, temperature=1.0)
    assert np.isfinite(logits[np.arange(300), drawn]).all()


def test_a_lone_possible_token_is_drawn_at_any_uniform():
    logits = np.full((5, 513), -np.inf, np.float32)
    logits[np.arange(5), [0, 255, 256, 511, 512]] = -50.0
    for uniform in (0.0, 0.5, ALMOST_ONE):
        drawn, logp = draw(logits, np.full(5, uniform, np.float32), temperature=1.0)
        assert drawn.tolist() == [0, 255, 256, 511, 512]
        assert logp.tolist() == [0.0] * 5


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}],
    ids=["plain", "top_k", "top_p", "min_p"],
)
def test_logp_is_the_uncut_log_softmax_at_the_temperature(options):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(64, 40)).astype(np.float32) * 4
    uniforms = rng.random(64).astype(np.float32)
    drawn, logp = draw(logits, uniforms, temperature=0.6, **options)
    expected = jax.nn.log_softmax(logits / 0.6)[np.arange(64), drawn]
    np.testing.assert_allclose(logp, expected, rtol=1e-5, atol=1e-6)


P5 = [0.1, 0.4, 0.2, 0.25, 0.05]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        # From the likeliest on: 0.4, 0.65, 0.85, 0.95, 1. The one that reaches stays.
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.8}, {1, 2, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        # Relative to 0.4: 0.25, 1, 0.5, 0.625, 0.125.
        ({"min_p": 0.2}, {0, 1, 2, 3}),
        ({"min_p": 0.6}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        # 0.4 and 0.25 are left, 0.615 of which is the first.
        ({"top_k": 2, "top_p": 0.61}, {1}),
        ({"top_k": 2, "top_p": 0.62}, {1, 3}),
        ({"top_k": 3, "min_p": 0.55}, {1, 3}),
    ],
)
def test_cuts_keep_the_sets_of_their_definitions(options, tokens):
    assert kept(P5, **options) == tokens


def test_a_cut_keeps_the_proportions_of_what_is_left():
    # 0.4 and 0.2 are left of 0.1, 0.4, 0.2, ...: two draws in three take the first.
    uniforms = (np.arange(300) + 0.5) / 300
    drawn = tokens_of([0.1, 0.4, 0.2, 0.15, 0.15], uniforms, top_k=2)
    assert drawn.count(1) == 200 and drawn.count(2) == 100


def test_temperature_zero_takes_the_likeliest_token_at_temperature_one_logp():
    logits = np.log(np.array([P5, P5[::-1]], np.float32))
    drawn, logp = draw(logits, np.full(2, 0.99, np.float32), temperature=0.0)
    assert drawn.tolist() == [1, 3]
    np.testing.assert_allclose(logp, np.log([0.4, 0.4]), rtol=1e-6)


def test_logits_of_lower_precision_are_drawn_in_float32():
    logits = jnp.log(jnp.array([P5])).astype(jnp.bfloat16)
    _, logp = draw(logits, jnp.array([0.3]), temperature=1.0)
    assert logp.dtype == jnp.float32
    expected = lax.stop_gradient(jax.nn.log_softmax(logits.astype(jnp.float32)))
    np.testing.assert_allclose(logp[0], expected[0, 1], rtol=1e-6)


def test_logits_of_a_head_in_blocks_are_those_of_its_rows():
    """The way of a TPU, on the CPU."""
    hidden, head = jax.random.normal(jax.random.key(0), (3, 8)), jnp.ones((256, 8))
    head = head * jnp.arange(256.0)[:, None]
    ours, plain = blocks._of_blocks(hidden, head), blocks._of_rows(hidden, head)
    np.testing.assert_allclose(ours, plain, rtol=1e-6)


def test_a_block_is_the_same_by_a_mask_and_by_a_gather():
    scores = jax.random.normal(jax.random.key(0), (3, 5, 128)).at[1, 2, 7].set(-jnp.inf)
    block = jnp.array([4, 2, 0])
    expected = np.asarray(scores)[np.arange(3), block]
    np.testing.assert_array_equal(blocks._by_mask(scores, block), expected)
    np.testing.assert_array_equal(blocks.take_block(scores, block), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_fills_the_last_block_is_never_drawn(temperature):
    logits = jnp.full((4, 130), -90.0)  # below the 0 of what is filled up
    token, logp = sampling.sample_token(
        logits, jnp.array([0.0, 0.5, 0.99, 1.0]), temperature=temperature
    )
    assert (token < 130).all()
    np.testing.assert_allclose(logp, -np.log(130), rtol=1e-5)
