"""Attention over prefix and own tokens, against a plain softmax over their union."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models._attention import attention, head_major, slot_attention
from grpo_jax.models.cache import (
    Cache,
    Prefix,
    PromptBlock,
    Slots,
    per_layer,
    prompt_block,
    read_layer,
    write_token,
)

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


def plain_attention(queries, keys, values, prefix, *, window, scale, softcap, offset=0):
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
    options = {"window": window, "scale": 0.8, "softcap": softcap}
    ours = attention(
        queries, head_major(keys), head_major(values), prefix=prefix, **options
    )
    plain = plain_attention(queries, keys, values, prefix, **options)
    np.testing.assert_allclose(ours, plain, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_sequences_behind_each_other_attend_as_each_would_alone(window, softcap):
    queries, keys, values, prefix = inputs()
    queries, keys, values = (x[:, :1] for x in (queries, keys, values))
    options = {"window": window, "scale": 0.8, "softcap": softcap}
    ours = attention(
        queries,
        head_major(keys),
        head_major(values),
        prefix=prefix,
        index=jnp.array([[0, 1, 0, 1], [0, 0, 1, 2]]),
        **options,
    )
    for row, starts in enumerate(([0, 2, 4], [0, 1, 4])):
        for start, end in itertools.pairwise(starts):
            own = (x[:, :, start:end] for x in (queries, keys, values))
            alone = plain_attention(*own, prefix, **options)
            np.testing.assert_allclose(ours[row, :, start:end], alone[row], atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("offset", [0, 2])
def test_one_query_at_an_offset_sees_what_is_written_so_far(window, softcap, offset):
    queries, keys, values, prefix = inputs(num_queries=1)
    options = {"window": window, "scale": 0.8, "softcap": softcap}
    index = jnp.full((N, G), offset)
    slots = Slots(
        prompt_lengths=jnp.asarray(LENGTHS)[:, None] + jnp.zeros_like(index),
        index=index,
        column=offset,
    )
    ring = [jnp.swapaxes(x, 2, 3).reshape(N * G, K, T, WIDTH) for x in (keys, values)]
    ours = slot_attention(
        queries[:, :, 0],
        jnp.swapaxes(ring[0], 2, 3),
        ring[1],
        slots=slots,
        prompts=prompt_block(prefix),
        **options,
    )
    plain = plain_attention(queries, keys, values, prefix, offset=offset, **options)
    np.testing.assert_allclose(ours, plain[:, :, 0], atol=1e-5)


# Two parts of four slots and three rows of prompts: the prompt of each slot, and which
# of its own tokens is fed. Nobody has what is in the last slot of the first part.
COLUMNS = 7
PROMPT_OF = np.array([[1, 0, 1, 0], [2, 2, 0, 1]])
FED = np.array([[6, 0, 3, 4], [5, 1, 4, 6]])
PROMPT_LENGTHS = np.array([[5, 2, 1], [1, 4, 3]])
EMPTY = (0, 3)


def readers(members, place):
    """The slots that read each row, and the entry of each slot among them."""
    for part, slot in np.ndindex(*PROMPT_OF.shape):
        if (part, slot) != EMPTY:
            row = PROMPT_OF[part, slot]
            free = np.flatnonzero(members[part, row] == PROMPT_OF.shape[1])[0]
            members[part, row, free] = slot
            place[part, slot] = row * members.shape[2] + free
    return jnp.asarray(members), jnp.asarray(place)


def ring_of(own, column):
    """What is in the ring when `column` is written; older tokens are of no one."""
    ring = draw(9, *PROMPT_OF.shape, K, COLUMNS, WIDTH)
    for part, slot in np.ndindex(*PROMPT_OF.shape):
        for token in range(FED[part, slot] + 1):
            at = (column - FED[part, slot] + token) % COLUMNS
            ring[part, slot, :, at] = own[part, slot, :, token]
    return ring.reshape(-1, K, COLUMNS, WIDTH)


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("column", [0, 2, 6])
def test_slots_anywhere_in_a_ring_attend_as_each_would_alone(window, softcap, column):
    options = {"window": window, "scale": 0.8, "softcap": softcap}
    parts, slots, rows = *PROMPT_OF.shape, PROMPT_LENGTHS.shape[1]
    own = draw(7, 2, parts, slots, K, COLUMNS, WIDTH)  # keys and values
    shared = draw(8, 2, parts, rows, K, P, WIDTH)
    queries = draw(11, parts, slots, H, WIDTH)
    keys, values = (jnp.asarray(ring_of(x, column)) for x in own)
    blocks = jnp.asarray(shared.reshape(2, parts * rows, K, P, WIDTH))
    members = np.full((parts, rows, 3), slots, np.int32)
    ours = slot_attention(
        jnp.asarray(queries),
        jnp.swapaxes(keys, 2, 3),
        values,
        slots=Slots(
            jnp.asarray(np.take_along_axis(PROMPT_LENGTHS, PROMPT_OF, axis=1)),
            index=jnp.asarray(FED),
            column=jnp.int32(column),
        ),
        prompts=PromptBlock(
            jnp.swapaxes(blocks[0], 2, 3),
            blocks[1],
            None,
            *readers(members, np.full((parts, slots), rows * 3, np.int32)),
        ),
        **options,
    )
    assert np.isfinite(ours).all()
    for part, slot in set(np.ndindex(parts, slots)) - {EMPTY}:
        row, last = PROMPT_OF[part, slot], FED[part, slot]
        one = jnp.asarray(own[:, part, slot])[:, None, :, None]
        alone = attention(
            # Of queries at all tokens that of the slot; it does not see later ones.
            jnp.broadcast_to(queries[part, slot], (1, 1, COLUMNS, H, WIDTH)),
            *one,
            prefix=Prefix(
                *jnp.asarray(shared[:, part, row])[:, None],
                lengths=jnp.asarray(PROMPT_LENGTHS[part, row, None]),
            ),
            **options,
        )
        np.testing.assert_allclose(ours[part, slot], alone[0, 0, last], atol=1e-5)


def test_a_token_is_written_in_one_column_of_one_layer():
    stack = Cache(
        keys=jnp.asarray(draw(1, 3, 8, K, WIDTH, COLUMNS)),
        values=jnp.asarray(draw(2, 3, 8, K, COLUMNS, WIDTH)),
    )
    apart = Cache(per_layer(stack.keys, 3), per_layer(stack.values, 3))
    new = [jnp.asarray(draw(seed, 8, K, 1, WIDTH)) for seed in (3, 4)]
    written = [write_token(x, *new, layer=1, column=5) for x in (stack, apart)]
    for layer in range(3):
        keys, values = (np.array(x) for x in read_layer(stack, layer))
        if layer == 1:
            keys[..., 5], values[:, :, 5] = new[0][:, :, 0], new[1][:, :, 0]
        for cache in written:
            for ours, expected in zip(
                read_layer(cache, layer), (keys, values), strict=True
            ):
                np.testing.assert_array_equal(ours, expected)


def test_enormous_scores_stay_finite_in_value_and_gradient():
    queries, keys, values, prefix = inputs()
    options = {"window": None, "scale": 1e6, "softcap": None}

    def total(queries):
        return attention(
            queries, head_major(keys), head_major(values), prefix=prefix, **options
        ).sum()

    value, gradient = jax.value_and_grad(total)(queries)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_a_prefix_wholly_outside_the_window_changes_nothing():
    queries, keys, values, prefix = inputs()
    options = {"window": 1, "scale": 1.0, "softcap": None}
    ours = attention(
        queries, head_major(keys), head_major(values), prefix=prefix, **options
    )
    # With a window of 1 each query sees itself alone: the result is its own value.
    expected = np.repeat(values, H // K, axis=3)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
