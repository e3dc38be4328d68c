"""The gated delta rule: token by token, in chunks, and as its paper writes it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.models import _delta
from grpo_jax.models._delta import (
    DeltaConfig,
    DeltaInputs,
    advance,
    answers_in_rows,
    chunked_delta_rule,
    delta_rule,
    empty_state,
)

CONFIG = DeltaConfig(
    layers=(True, False), key_heads=2, value_heads=4, key_dim=3, value_dim=5, kernel=4
)
SHAPES = (2, 7, 2, 3), (2, 7, 2, 3), (2, 7, 4, 5), (2, 7, 4), (2, 7, 4), (2, 4, 3, 5)
in_chunks = jax.jit(chunked_delta_rule, static_argnames="chunk")
by_token = jax.jit(delta_rule)


def drawn(seed, strength=1.0):
    random = np.random.default_rng(seed)
    queries, keys, values, decay, share, memory = (
        random.standard_normal(shape).astype(np.float32) for shape in SHAPES
    )
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    # From what forgets nothing to what forgets all, and a share of up to 1.
    decay = -strength * np.exp(1.5 * decay)
    share = 1.0 / (1.0 + np.exp(-3.0 * share))
    return queries, keys, values, decay, share, memory


def of_paper(queries, keys, values, decay, share, memory):
    """S_t = S_(t-1) a_t (1 - b_t k_t k_t^T) + b_t v_t k_t^T and o_t = S_t q_t."""
    out, last = np.zeros(values.shape), np.zeros(memory.shape)
    for row, head in np.ndindex(2, 4):
        state, of = memory[row, head].T.astype(float), head // 2
        for t in range(values.shape[1]):
            key, b = keys[row, t, of].astype(float), share[row, t, head]
            kept = np.eye(3) - b * np.outer(key, key)
            state = np.exp(decay[row, t, head]) * state @ kept
            state = state + b * np.outer(values[row, t, head], key)
            out[row, t, head] = state @ queries[row, t, of]
        last[row, head] = state.T
    return out, last


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    strength=st.sampled_from([0.0, 0.1, 1.0, 8.0]),
    chunk=st.sampled_from([1, 3, 64]),
)
def test_both_forms_are_that_of_the_paper(seed, strength, chunk):
    inputs = drawn(seed, strength)
    expected = of_paper(*inputs)
    for found in (by_token(*inputs), in_chunks(*inputs, chunk=chunk)):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_both_forms_have_the_same_gradient():
    inputs = drawn(0)

    def loss(rule):
        def of(*inputs):
            out, memory = rule(*inputs)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(memory))

        return jax.jit(jax.grad(of, argnums=range(6)))(*inputs)

    chunked = loss(lambda *inputs: chunked_delta_rule(*inputs, chunk=3))
    for one, other in zip(chunked, loss(delta_rule), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


def test_a_memory_corrects_its_answer_by_the_share():
    # Of one head with key (1, 0) and a memory that answers 2: after half of it is
    # forgotten it answers 1, and half of the error of 4 is corrected: 1 + 0.5 x 4 = 3.
    one = np.ones((1, 1, 1), np.float32)
    key = np.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    memory = np.array([[2.0], [8.0]]).reshape(1, 1, 2, 1)
    inputs = key, key, 5.0 * one[..., None], np.log(0.5) * one, 0.5 * one, memory
    for rule in (delta_rule, chunked_delta_rule):
        out, after = rule(*map(jnp.asarray, inputs))
        np.testing.assert_allclose(out.ravel(), [3.0], rtol=1e-6)
        np.testing.assert_allclose(after.ravel(), [3.0, 4.0], rtol=1e-6)


def inputs_of(seed, length):
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)  # noqa: E731
    return DeltaInputs(
        channels=draw(2, length, 2, CONFIG.head_channels),
        decay=-jnp.abs(draw(2, length, 4)),
        share=jax.nn.sigmoid(draw(2, length, 4)),
        kernel=draw(4, 2, CONFIG.head_channels),
    )


def part_of(inputs, start, end):
    return DeltaInputs(
        channels=inputs.channels[:, start:end],
        decay=inputs.decay[:, start:end],
        share=inputs.share[:, start:end],
        kernel=inputs.kernel,
    )


@jax.jit
def go_on(inputs, state):
    return advance(inputs, state, None, config=CONFIG)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_what_is_cut_goes_on_where_it_was(cut):
    inputs, state = inputs_of(1, 6), empty_state(CONFIG, 2, "float32")
    whole, last = go_on(inputs, state)
    first, state = go_on(part_of(inputs, 0, cut), state)
    second, state = go_on(part_of(inputs, cut, 6), state)
    parts = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    np.testing.assert_allclose(state.memory, last.memory, atol=1e-5)
    np.testing.assert_array_equal(state.recent, last.recent)


def test_what_is_not_real_enters_no_state():
    run = jax.jit(lambda *args: advance(*args, config=CONFIG)[1])
    before, inputs = inputs_of(2, 3), inputs_of(3, 6)
    start = run(before, empty_state(CONFIG, 2, "float32"), None)
    counts = jnp.array([4, 0])
    padded = run(inputs, start, counts)
    expected = run(part_of(inputs, 0, 4), start, None)
    np.testing.assert_allclose(padded.memory[0], expected.memory[0], atol=1e-6)
    np.testing.assert_array_equal(padded.recent[0], expected.recent[0])
    # A row without real tokens stays as it was.
    np.testing.assert_array_equal(padded.memory[1], start.memory[1])
    np.testing.assert_array_equal(padded.recent[1], start.recent[1])


@functools.partial(jax.jit, static_argnames="chunk")
def in_rows(inputs, state, index, *, chunk):
    with pytest.MonkeyPatch.context() as patch:
        rule = functools.partial(chunked_delta_rule, chunk=chunk)
        patch.setattr(_delta, "chunked_delta_rule", rule)
        return answers_in_rows(inputs, state, index, config=CONFIG)


@given(
    cuts=st.tuples(*[st.sets(st.integers(1, 7))] * 2),
    chunk=st.sampled_from([3, 64]),
    seed=st.integers(0, 10**6),
)
def test_sequences_of_a_row_start_from_its_state_and_see_no_other(cuts, chunk, seed):
    """Wherever they begin within a chunk, and however short they are."""
    _, state = go_on(inputs_of(seed, 5), empty_state(CONFIG, 2, "float32"))
    inputs = inputs_of(seed + 1, 8)
    starts = [sorted({0, *own}) for own in cuts]
    begins = [np.isin(np.arange(8), own) for own in starts]
    index = np.stack(
        [np.arange(8) - np.maximum.accumulate(np.arange(8) * one) for one in begins]
    )
    found = in_rows(inputs, state, jnp.asarray(index), chunk=chunk)
    for start in sorted({*starts[0], *starts[1]}):
        # With the sequence in front, and behind it what it does not see.
        turned = jax.tree.map(
            lambda x, start=start: x if x.shape[0] == 4 else np.roll(x, -start, axis=1),
            inputs,
        )
        alone, _ = go_on(turned, state)
        for row in (row for row in (0, 1) if start in starts[row]):
            end = min([at for at in starts[row] if at > start], default=8)
            np.testing.assert_allclose(
                found[row, start:end], alone[row, : end - start], atol=1e-5
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (True, True)}, "a layer of each kind"),
        ({"layers": (False, False)}, "a layer of each kind"),
        ({"value_heads": 3}, "value_heads 3 must be a multiple of key_heads 2"),
        ({"kernel": 0}, "need a positive kernel"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
