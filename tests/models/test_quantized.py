"""Quantized kernels: near the given ones, and used as the plain ones they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_jax.models._frozen import (
    dequantized,
    frozen_product,
)
from grpo_jax.models.decoder import Decoder, abstract_params
from grpo_jax.models.lora import init_lora, merge_lora
from grpo_jax.models.protocol import in_compute_dtype
from grpo_jax.models.quantized import (
    KINDS,
    NF4,
    QUANTIZED,
    quantize,
    quantized_shapes,
)
from grpo_jax.parallel.mesh import named_leaves

# bitsandbytes 0.50.2 (CPU): quantize_4bit(w.T, blocksize=64, quant_type="nf4") of the
# w of `integers`; the bytes are those of an array [out, in / 2].
PACKED = """
01b68e98d413d77e6480ef3ff2dbd2f04fe1a58ea9e637fbc1cbe523c66c314eab0bae423d66d426fcd1dd
0958fcc0a8c2017115fdf5117102c8a0ccf8590dd1dcf624d66d324eab0b9e413c56c325ebc0ccf736e9af
85a1ef40f2dbd2ff3fe0846e77d314d89e86b10172160e1834c4370ef5115fe0734c4381e06127101b68
"""


def integers():
    i = np.arange(2 * 128).reshape(2, 128)
    return (((i * i * 37 + 11 * i) % 251 - 125) / 4096).astype(np.float32).T


def restored(kernel, kind):
    return np.asarray(dequantized(*quantize(kernel, kind).values(), "float32"))


def test_int8_by_hand():
    # The scales are 127/127 and 6.35/127 = 0.05.
    made = quantize(np.array([[127.0, 0.02], [-3.5, 6.35], [2.5, -0.1]]), "int8")
    np.testing.assert_allclose(made["scale"], [[1.0, 0.05]], rtol=1e-6)
    # Of two nearest integers the even one; 0.02 / 0.05 is 0.4.
    assert made["codes"].tolist() == [[127, 0], [-4, 127], [2, -2]]


def test_nf4_has_the_bits_of_bitsandbytes():
    made = quantize(integers(), "nf4")
    assert made["codes"].T.tobytes().hex() == "".join(PACKED.split())
    peaks = [[125 / 4096, 122 / 4096], [123 / 4096, 125 / 4096]]
    assert made["scale"].T.tolist() == peaks


whole_numbers = st.sampled_from([(2, 128, 2), (6, 4)]).flatmap(
    lambda shape: hnp.arrays(np.int16, shape)
)
kernels = whole_numbers.map(lambda values: values.astype(np.float32) / 37)


@settings(deadline=None, max_examples=20)
@given(kernels)
def test_no_number_is_further_off_than_its_code_allows(kernel):
    whole = np.abs(kernel).max(axis=-2, keepdims=True)
    made = restored(kernel, "int8")
    assert (np.abs(made - kernel) <= whole / 254 * (1 + 1e-4)).all()
    again = quantize(made, "int8")
    assert (again["codes"] == quantize(kernel, "int8")["codes"]).all()
    block = int(np.gcd(kernel.shape[-2], 64))
    parts = kernel.reshape(*kernel.shape[:-2], -1, block, kernel.shape[-1])
    peak = np.abs(parts).max(axis=-2, keepdims=True)
    choices = peak[..., None] * NF4
    nearest = np.abs(choices - parts[..., None]).min(axis=-1)
    off = np.abs(restored(kernel, "nf4").reshape(parts.shape) - parts)
    assert (off <= nearest + 1e-6 * peak).all()
    for kind in KINDS:
        shapes = quantized_shapes(kernel.shape, kind)
        for name, values in quantize(kernel, kind).items():
            assert (values.shape, values.dtype) == (
                shapes[name].shape,
                shapes[name].dtype,
            )


@pytest.mark.parametrize(
    ("kind", "least", "most"), [("int8", 0.005, 0.01), ("nf4", 0.085, 0.1)]
)
def test_the_error_of_normal_weights(kind, least, most):
    """Root mean square, over that of the weights: docs/models.md has these numbers."""
    kernel = np.random.default_rng(0).normal(0, 0.02, (576, 64)).astype(np.float32)
    off = restored(kernel, kind) - kernel
    assert least < np.sqrt((off**2).mean() / (kernel**2).mean()) < most


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_zeros_stays_zero(kind):
    assert not restored(np.zeros((64, 2), np.float32), kind).any()


def test_an_odd_number_of_inputs_has_no_pairs():
    with pytest.raises(ValueError, match="pairs of inputs, but a projection has 5"):
        quantized_shapes((5, 2), "nf4")


def test_the_product_rounds_the_kernel_to_the_dtype_of_its_input():
    made = quantize(integers(), "int8")
    x = jnp.ones((3, 128), jnp.bfloat16)
    plain = dequantized(*made.values(), "bfloat16")
    out = frozen_product(x, *map(jnp.asarray, made.values()))
    assert out.dtype == jnp.bfloat16 and (out == x @ plain).all()


def quantized_of(params, kind):
    made = {}
    for path, leaf in named_leaves(params).items():
        if not QUANTIZED.fullmatch(path):
            made[path] = leaf
            continue
        for name, values in quantize(np.asarray(leaf), kind).items():
            made[f"{path.removesuffix('kernel')}{name}"] = jnp.asarray(values)
    return nested(made)


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parts, last = path.split("/")
        inner = tree
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = leaf
    return tree


def adapted(tiny, kind, *targets):
    config = dataclasses.replace(tiny.model.config, lora_scale=2.0, remat="none")
    lora = init_lora(Decoder(config), jax.random.key(1), rank=2, targets=targets)
    base = quantized_of(tiny.params, kind)
    plain = merge_lora(base, {}, config)
    return Decoder(config), base, plain, jax.tree.map(lambda leaf: leaf + 0.1, lora)


@pytest.fixture(scope="module", params=KINDS)
def both(request, plain):
    """A model with adapters, its base quantized, and the base that this stands for."""
    return plain, *adapted(plain, request.param, "q", "o", "down")


@pytest.mark.parametrize(
    ("family", "kind", "part", "name"),
    [("hybrid", "int8", "delta", "qkv"), ("conv", "nf4", "conv", "bcx")],
)
def test_layers_without_attention_are_quantized_too(family, kind, part, name, request):
    tiny = request.getfixturevalue(family)
    targets = "q", f"{part}_{name}", f"{part}_o", "down"
    model, base, plain, lora = adapted(tiny, kind, *targets)
    assert all("codes" in base["layers"][part][own] for own in (name, "o"))

    @jax.jit
    def hidden(base):
        variables = {"params": base, "lora": lora}
        tokens = tiny.prompts, tiny.lengths
        return model.apply(variables, *tokens, method=model.forward)

    np.testing.assert_allclose(hidden(base), hidden(plain), atol=2e-6)


def test_scores_and_gradients_are_those_of_the_dequantized_base(both):
    tiny, model, base, plain, lora = both
    inputs = tiny.prompts, tiny.lengths, tiny.completions

    @jax.jit
    def scored(lora, base):
        def loss(lora):
            hidden = model.apply(
                {"params": base, "lora": lora}, *inputs, method=model.score
            )
            return jnp.square(hidden).mean(), hidden

        return jax.grad(loss, has_aux=True)(lora)

    (ours, hidden), (theirs, expected) = scored(lora, base), scored(lora, plain)
    np.testing.assert_allclose(hidden, expected, atol=2e-6)
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, atol=4e-6 * float(jnp.abs(other).max()))
    # The base that was given would score otherwise.
    _, given_ = scored(lora, tiny.params)
    assert jnp.abs(given_ - hidden).max() > 1e-3


def test_a_backward_pass_keeps_no_kernel(both):
    """Without remat a plain product would keep what was dequantized, of all layers."""
    tiny, model, base, plain, lora = both
    inputs = tiny.prompts, tiny.lengths, tiny.completions

    def kept(base):
        def score(lora):
            variables = {"params": base, "lora": lora}
            return model.apply(variables, *inputs, method=model.score)

        jaxpr = jax.make_jaxpr(lambda lora: jax.vjp(score, lora)[1])(lora).jaxpr
        return {v.aval.shape for v in jaxpr.outvars if v.aval.dtype == jnp.float32}

    kernels = {
        leaf.shape
        for path, leaf in named_leaves(plain).items()
        if QUANTIZED.fullmatch(path)
    }
    assert not kernels & kept(base)


def test_the_compute_dtype_leaves_codes_and_scales(both):
    *_, base, _, _ = both
    cast = named_leaves(in_compute_dtype(base, "bfloat16"))
    assert {str(leaf.dtype) for path, leaf in cast.items() if "codes" in path} <= {
        "int8",
        "uint8",
    }
    assert cast["layers/attn/q/scale"].dtype == jnp.float32
    assert cast["embed/embedding"].dtype == jnp.bfloat16


def test_merged_is_what_the_codes_stand_for_and_the_adapters(both):
    _, model, base, plain, lora = both
    ours, theirs = (
        named_leaves(merge_lora(one, lora, model.config)) for one in (base, plain)
    )
    shapes = named_leaves(abstract_params(model))
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in shapes.items()
    }
    for path, values in ours.items():
        np.testing.assert_array_equal(values, theirs[path], err_msg=path)
