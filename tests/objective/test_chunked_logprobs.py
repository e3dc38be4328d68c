"""Chunked log-probabilities: the dense ones, without the memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.objective import chunked_logprobs, token_entropy, token_logprobs

N, G, T, D, V = 2, 3, 7, 8, 50


def random_inputs(shape=(N, G, T), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (*shape, D)).astype(dtype)
    head = jax.random.normal(keys[1], (D, V)).astype(dtype)
    tokens = jax.random.randint(keys[2], shape, 0, V)
    cotangents = [jax.random.normal(key, shape) for key in keys[3:]]
    return hidden, head, tokens, cotangents


def dense(hidden, head, tokens, *, temperature=1.0, logit_softcap=None):
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    return (
        token_logprobs(logits, tokens, temperature=temperature),
        token_entropy(logits, temperature=temperature),
    )


def chunked(hidden, head, tokens, **options):
    out = chunked_logprobs(hidden, head, tokens, with_entropy=True, **options)
    return out.logp, out.entropy


def value_and_gradients(function, hidden, head, cotangents):
    @jax.jit
    def run(hidden, head, cotangents):
        outputs, pull = jax.vjp(function, hidden, head)
        return *outputs, *pull(tuple(cotangents))

    return run(hidden, head, cotangents)


@pytest.mark.parametrize(  # 42 tokens
    ("chunk_size", "temperature", "logit_softcap"),
    [
        (1, 1.0, None),
        (4, 1.0, None),
        (42, 1.0, None),
        (1000, 1.0, None),
        (5, 0.6, None),
        (5, 1.0, 3.0),
        (5, 0.6, 3.0),
    ],
)
def test_chunked_equals_dense_in_value_and_gradient(
    chunk_size, temperature, logit_softcap
):
    hidden, head, tokens, cotangents = random_inputs()
    options = {"temperature": temperature, "logit_softcap": logit_softcap}
    expected = value_and_gradients(
        lambda h, w: dense(h, w, tokens, **options), hidden, head, cotangents
    )
    got = value_and_gradients(
        lambda h, w: chunked(h, w, tokens, chunk_size=chunk_size, **options),
        hidden,
        head,
        cotangents,
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_a_token_count_with_no_even_split_is_padded():
    # 13 tokens in chunks of at most 4: no count from 4 to 7 divides 13.
    hidden, head, tokens, cotangents = random_inputs((13,))
    expected = value_and_gradients(
        lambda h, w: dense(h, w, tokens), hidden, head, cotangents
    )
    got = value_and_gradients(
        lambda h, w: chunked(h, w, tokens, chunk_size=4), hidden, head, cotangents
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_entropy_is_left_out_unless_asked_for():
    hidden, head, tokens, _ = random_inputs()
    out = chunked_logprobs(hidden, head, tokens, chunk_size=8)
    assert out.entropy is None
    np.testing.assert_allclose(out.logp, dense(hidden, head, tokens)[0], rtol=1e-5)


def test_no_tokens_give_an_empty_array_and_a_zero_gradient():
    hidden, head, tokens, _ = random_inputs((2, 0))
    assert chunked_logprobs(hidden, head, tokens).logp.shape == (2, 0)
    grad = jax.grad(lambda w: chunked_logprobs(hidden, w, tokens).logp.sum())(head)
    np.testing.assert_array_equal(grad, jnp.zeros((D, V)))


def test_bfloat16_products_are_summed_in_float32():
    hidden, head, tokens, cotangents = random_inputs(dtype=jnp.bfloat16)
    got = value_and_gradients(
        lambda h, w: chunked(h, w, tokens, chunk_size=5), hidden, head, cotangents
    )
    assert [x.dtype for x in got] == [jnp.float32] * 2 + [jnp.bfloat16] * 2
    expected = value_and_gradients(
        lambda h, w: dense(h, w, tokens),
        hidden.astype(jnp.float32),
        head.astype(jnp.float32),
        cotangents,
    )
    # Values come from exact products of bfloat16 numbers; gradients are rounded to it.
    for one, other in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(got[2:], expected[2:], strict=True):
        scale = jnp.abs(other).max()
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.01 * scale)


def test_a_bfloat16_head_gradient_is_accumulated_in_float32():
    # 1024 equal terms, one per chunk. A bfloat16 sum (8 bits) stops growing at 256 of
    # them. Two words of equal probability: each token adds (1 - 1/2) = 1/2.
    tokens = jnp.zeros(1024, jnp.int32)
    hidden = jnp.ones((1024, 1), jnp.bfloat16)
    grad = jax.grad(
        lambda w: chunked_logprobs(hidden, w, tokens, chunk_size=1).logp.sum()
    )
    np.testing.assert_array_equal(grad(jnp.zeros((1, 2), jnp.bfloat16)), [[512, -512]])


def test_a_float32_head_with_bfloat16_hidden_states_multiplies_in_float32():
    hidden, _, tokens, _ = random_inputs(dtype=jnp.bfloat16)
    head = random_inputs()[1]
    got = chunked_logprobs(hidden, head, tokens).logp
    expected, _ = dense(hidden.astype(jnp.float32), head, tokens)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_head_is_never_copied_to_float32():
    hidden, head, tokens, _ = random_inputs(dtype=jnp.bfloat16)
    program = jax.make_jaxpr(lambda h, w: chunked(h, w, tokens))(hidden, head)
    assert f"bf16[{D},{V}]" in str(program)
    assert f"f32[{D},{V}]" not in str(program)


def compiled_bytes(function, num_tokens, vocab=131_072, width=8):
    arrays = (
        jax.ShapeDtypeStruct((2, num_tokens // 2, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((2, num_tokens // 2), jnp.int32),
    )
    compiled = jax.jit(function).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def gradients(hidden, head, tokens, *, logprobs):
    return jax.grad(
        lambda h, w: sum(x.sum() for x in logprobs(h, w, tokens)), argnums=(0, 1)
    )(hidden, head)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_is_a_chunk_of_logits_whatever_the_number_of_tokens(direction):
    function = functools.partial(chunked, chunk_size=128)
    if direction == "backward":
        function = functools.partial(gradients, logprobs=function)
    short, long = (compiled_bytes(function, count) for count in (512, 8192))
    chunk = 128 * 131_072 * 4
    assert long < 4 * chunk
    # Per token only its hidden state and a few numbers may stay: not V = 131072.
    assert (long - short) / (8192 - 512) < 512


def test_dense_memory_grows_with_the_number_of_tokens():
    # The measure of the test above does see an array of all logits.
    function = functools.partial(gradients, logprobs=dense)
    assert compiled_bytes(function, 512) >= 512 * 131_072 * 4


def test_a_head_sharded_over_the_vocabulary_gives_the_same_and_is_not_gathered():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = jax.random.normal(keys[0], (4, 2, 32, D))
    head = jax.random.normal(keys[1], (D, 1024))
    tokens = jax.random.randint(keys[2], (4, 2, 32), 0, 1024)
    function = functools.partial(
        gradients, logprobs=functools.partial(chunked, chunk_size=64)
    )
    expected = jax.jit(function)(hidden, head, tokens)
    rows, columns = (
        NamedSharding(mesh, P("data")),
        NamedSharding(mesh, P(None, "tensor")),
    )
    sharded = jax.jit(
        function, in_shardings=(rows, columns, rows), out_shardings=(rows, columns)
    )
    for one, other in zip(sharded(hidden, head, tokens), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    program = sharded.lower(hidden, head, tokens).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": jnp.zeros((V, D))}, r"head has shape \(50, 8\).*transpose"),
        ({"tokens": jnp.zeros((N, G), int)}, r"tokens has shape \(2, 3\), expected"),
        ({"chunk_size": 0}, "chunk_size is 0, expected an integer above 0"),
        (
            {"logit_softcap": 0.0},
            "logit_softcap is 0.0, expected a finite number above 0",
        ),
        (
            {"temperature": -1.0},
            "temperature is -1.0, expected a finite number above 0",
        ),
    ],
)
def test_wrong_arguments_are_named(without_shape_checks, change, message):
    hidden, head, tokens, _ = random_inputs()
    arguments = {"hidden": hidden, "head": head, "tokens": tokens} | change
    with pytest.raises(ValueError, match=message):
        chunked_logprobs(**arguments)
