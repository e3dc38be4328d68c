"""Which completions come together in a microbatch, and where they come back."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.training import _like_lengths
from grpo_jax.training._like_lengths import at_own_width, like_lengths
from grpo_jax.training._microbatches import microbatches
from grpo_jax.training.learner import _minibatch
from grpo_jax.training.state import Batch

WIDTH = 128


@st.composite
def cases(draw):
    shards, minibatches = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    turns, each, group = (draw(st.sampled_from([1, 2, 3])) for _ in range(3))
    size = each * shards * group
    if draw(st.booleans()):  # parts of a group, on one device
        shards, group, size = 1, 4, draw(st.sampled_from([1, 2]))
    count = shards * minibatches * turns * each
    some = st.sampled_from([0, 3, 20, 32, 32, 33, 64, 65, WIDTH])
    lengths = draw(st.lists(some, min_size=count * group, max_size=count * group))
    return np.reshape(lengths, (count, group)), minibatches, size, shards


def batch_of(lengths):
    """A batch of which the advantages number the completions."""
    mask = np.arange(WIDTH) < lengths[..., None]
    numbers = np.arange(lengths.size, dtype=np.float32).reshape(lengths.shape)
    tokens = jnp.asarray(mask).astype(jnp.int32)
    first = jnp.arange(len(lengths))
    return Batch(
        first[:, None], first, tokens, jnp.asarray(mask), numbers, tokens * 1.0
    )


@given(cases())
@settings(deadline=None, max_examples=15)
def test_microbatches_are_of_like_length_and_have_each_completion_once(case):
    lengths, minibatches, size, shards = case
    batch = batch_of(lengths)
    how = {"minibatches": minibatches, "microbatch_size": size, "shards": shards}
    order, share = like_lengths(np.asarray(batch.mask), 16, **how)
    if order is None:
        assert size == lengths.size // minibatches
        return
    assert order.widths == (32, 64, WIDTH)
    group = lengths.shape[1]
    seen, widths = [], []
    for number in range(minibatches):
        given = batch.replace(like_lengths=order)
        parts, _ = microbatches(_minibatch(given, number, count=minibatches), size)
        longest = parts.mask.sum(axis=-1).max(axis=(1, 2))
        widths += [32 if x <= 32 else 64 if x <= 64 else WIDTH for x in longest]
        seen += np.asarray(parts.advantages).reshape(-1).tolist()
        # Each is still with its prompt, which has not left its minibatch.
        own = np.asarray(parts.advantages) // group
        assert (own == np.asarray(parts.prompt_lengths)[..., None]).all()
        assert (own % minibatches == number).all()
        if shards == 1 and size >= group:
            assert (np.diff(longest) >= 0).all()
    assert sorted(seen) == list(range(lengths.size))
    prompts = max(size // group, 1) * 16
    mean = np.mean([prompts + size * width for width in widths])
    assert share == pytest.approx(mean / (prompts + size * WIDTH))


def test_what_is_sorted_comes_back():
    lengths = np.random.default_rng(0).integers(1, WIDTH, (8, 3))
    batch = batch_of(lengths)
    how = {"minibatches": 1, "microbatch_size": 6, "shards": 2}
    order, _ = like_lengths(np.asarray(batch.mask), 16, **how)
    _, moved = order.sort(batch.prompts, batch.sampler_logp)
    assert (moved != batch.sampler_logp).any()
    np.testing.assert_array_equal(order.unsort(moved), batch.sampler_logp)


@pytest.mark.parametrize(
    ("width", "size"), [(_like_lengths._SHORTEST * 2 - 1, 2), (WIDTH, 12)]
)
def test_there_is_no_order_where_nothing_could_be_narrower(width, size):
    mask = np.ones((4, 3, width), bool)
    how = {"minibatches": 1, "microbatch_size": size, "shards": 1}
    assert like_lengths(mask, 16, **how) == (None, 1.0)


@pytest.mark.parametrize(
    ("longest", "width"), [(0, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)]
)
def test_a_microbatch_takes_the_least_width_that_holds_it(longest, width):
    mask = np.arange(8) < np.array([[[0], [longest]]])
    found = at_own_width(jnp.asarray, jnp.asarray(mask), (2, 4, 8))
    assert int(found) == width
