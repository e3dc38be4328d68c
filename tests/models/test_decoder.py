"""The modes of the decoder agree with each other, whatever the options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import decoder as decoders
from grpo_jax.models._block import Layer, per_layer_data, rotary_tables
from grpo_jax.models._layers import Embedding, RMSNorm
from grpo_jax.models._row_attention import attend_causal
from grpo_jax.models.decoder import Decoder, abstract_params, init_params, param_axes


def score(tiny, params, prompts=None, completions=None):
    model = tiny.model
    prompts = tiny.prompts if prompts is None else prompts
    completions = tiny.completions if completions is None else completions
    args = (prompts, tiny.lengths, completions)
    return model.apply({"params": params}, *args, method=model.score)


def score_by_forward(tiny, params):
    """The hidden states of `score`, from a plain pass over every whole sequence."""
    n, g, t = tiny.completions.shape
    width = tiny.prompts.shape[1] + t
    rows = np.zeros((n, g, width), np.int32)
    for i, length in enumerate(np.asarray(tiny.lengths)):
        rows[i, :, :length] = np.asarray(tiny.prompts)[i, None, :length]
        rows[i, :, length : length + t] = np.asarray(tiny.completions)[i]
    lengths = jnp.repeat(tiny.lengths + t, g)
    model = tiny.model
    tokens = jnp.asarray(rows.reshape(n * g, width))
    hidden = model.apply({"params": params}, tokens, lengths, method=model.forward)
    hidden = hidden.reshape(n, g, width, -1)
    index = tiny.lengths[:, None, None, None] - 1 + jnp.arange(t)[None, None, :, None]
    return jnp.take_along_axis(hidden, jnp.broadcast_to(index, (n, g, t, 1)), axis=2)


def value_and_grad(compute):
    """Hidden states and the gradient of a fixed random projection of them."""

    def loss(params):
        hidden = compute(params)
        weights = np.random.default_rng(1).standard_normal(hidden.shape)
        return jnp.sum(hidden * jnp.asarray(weights, hidden.dtype)), hidden

    return jax.jit(jax.grad(loss, has_aux=True))


def assert_trees_close(one, other, tolerance):
    for (path, a), b in zip(
        jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        scale = max(float(jnp.abs(b).max()), 1e-6)
        error = float(jnp.abs(a - b).max()) / scale
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"


def test_score_equals_forward_on_the_concatenation(tiny):
    shared = value_and_grad(lambda p: score(tiny, p))(tiny.params)
    repeated = value_and_grad(lambda p: score_by_forward(tiny, p))(tiny.params)
    assert_trees_close(shared, repeated, 1e-5)


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
def test_decode_equals_score(any_tiny, apart, in_layers):
    tiny = any_tiny
    model, (n, g, t) = tiny.model, tiny.completions.shape
    last, prefix = jax.jit(
        lambda: model.apply(
            tiny.variables, tiny.prompts, tiny.lengths, method=model.prefill
        )
    )()
    variables, cache = tiny.variables, model.init_cache(n, g, t)
    if apart:
        variables = model.unroll(variables)
        lengths, (prefix, cache) = prefix.lengths, in_layers((prefix, cache))
        prefix = dataclasses.replace(prefix, lengths=lengths)
    step = jax.jit(lambda *args: model.apply(variables, *args, method=model.decode))
    hidden = [jnp.broadcast_to(last[:, None], (n, g, last.shape[-1]))]
    for i in range(t - 1):
        out, cache = step(tiny.completions[..., i], i, prefix, cache)
        hidden.append(out)
    expected = jax.jit(lambda p: score(tiny, p))(tiny.params)
    np.testing.assert_allclose(jnp.stack(hidden, axis=2), expected, atol=3e-5)


def test_prefill_equals_forward_at_the_last_token_and_score_of_one_token(
    any_tiny,
):
    tiny = any_tiny
    model = tiny.model

    @jax.jit
    def both():
        inputs = (tiny.prompts, tiny.lengths)
        last, _ = model.apply(tiny.variables, *inputs, method=model.prefill)
        hidden = model.apply(tiny.variables, *inputs, method=model.forward)
        one = score(tiny, tiny.params, completions=tiny.completions[..., :1])
        return last, hidden, one

    last, hidden, one = both()
    for row, length in enumerate(tiny.lengths):
        np.testing.assert_allclose(last[row], hidden[row, length - 1], atol=1e-5)
        for sample in one[row]:
            np.testing.assert_allclose(sample[0], last[row], atol=1e-5)


def test_junk_in_padding_changes_nothing(tiny):
    run = jax.jit(lambda prompts: score(tiny, tiny.params, prompts=prompts))
    real = jnp.arange(tiny.prompts.shape[1])[None, :] < tiny.lengths[:, None]
    expected = run(tiny.prompts)
    for junk in (0, 5, -100, 10**6):
        padded = jnp.where(real, tiny.prompts, junk)
        np.testing.assert_array_equal(run(padded), expected)


def influence(config):
    """Which token moves which hidden state: [G, T, tokens], from one prompt of 4.

    Every position holds another token id, so the gradient of a hidden state with
    respect to the row of an id is that with respect to the position. The prompt holds
    ids 0 to 3, of which 3 is padding; completion g holds ids 10 (g + 1) and on.
    """
    model, random = Decoder(config), np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * random.standard_normal(leaf.shape)),
        abstract_params(model),
    )
    prompts, lengths = jnp.arange(4)[None], jnp.array([3])
    completions = jnp.stack([10 + jnp.arange(5), 20 + jnp.arange(5)])[None]

    def hidden(table):
        bound = {"params": {**params, "embed": {"embedding": table}}}
        out = model.apply(bound, prompts, lengths, completions, method=model.score)
        return out[0] @ jax.random.normal(jax.random.key(4), out.shape[-1:])

    gradient = jax.jit(jax.jacrev(hidden))(params["embed"]["embedding"])
    return np.abs(gradient).max(axis=-1)


@pytest.mark.parametrize("window", [None, 3])
def test_hidden_states_depend_on_the_visible_past_and_on_nothing_else(full, window):
    config = dataclasses.replace(
        full.model.config, num_layers=1, layer_rope=(0,), layer_window=(window,)
    )
    moved = influence(config) > 1e-6
    for g in range(2):
        # The sequence as ids; hidden state t is that of its entry 2 + t.
        sequence = [0, 1, 2, *(10 * (g + 1) + np.arange(5))]
        for t in range(5):
            seen = sequence[: 3 + t][-(window or 99) :]
            assert set(np.flatnonzero(moved[g, t])) == set(seen), (g, t)


def test_remat_changes_what_is_stored_and_not_the_result(plain):
    results, stored = {}, {}
    for remat in ("none", "layer", "dots"):
        config = dataclasses.replace(plain.model.config, remat=remat)
        other = dataclasses.replace(plain, model=Decoder(config))
        run = value_and_grad(lambda p, other=other: score(other, p))
        results[remat] = run(plain.params)
        # What a forward pass keeps for the backward one, as vjp shows it.
        _, pullback = jax.eval_shape(
            lambda p, other=other: jax.vjp(lambda q: score(other, q), p), plain.params
        )
        stored[remat] = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert_trees_close(results["layer"], results["none"], 1e-5)
    assert_trees_close(results["dots"], results["none"], 1e-5)
    assert stored["layer"] < stored["dots"] < stored["none"]


def test_scan_equals_an_explicit_loop_over_layers(full):
    model, config, params = full.model, full.model.config, full.params

    @jax.jit
    def loop(params):
        embed = Embedding(
            vocab_size=64, features=32, scale=config.embedding_scale, dtype="float32"
        )
        x = embed.apply({"params": params["embed"]}, full.prompts)
        n, s = full.prompts.shape
        positions = jnp.broadcast_to(jnp.arange(s)[None], (n, s))
        tables = rotary_tables(config, positions)
        data = per_layer_data(config)
        for i in range(config.num_layers):
            own, mine = jax.tree.map(
                lambda leaf, i=i: leaf[i], (params["layers"], data)
            )

            def attend(q, k, v, mine=mine):
                k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
                return attend_causal(q, k, v, config=config, window=mine.window), None

            x, _ = Layer(config).apply({"params": own}, x, tables, mine, attend)
        norm = RMSNorm(
            eps=config.norm_eps, offset=config.norm_offset, divisor=config.logit_divisor
        )
        return norm.apply({"params": params["final_norm"]}, x)

    scanned = jax.jit(
        lambda: model.apply(
            full.variables, full.prompts, full.lengths, method=model.forward
        )
    )()
    np.testing.assert_allclose(loop(params), scanned, atol=1e-5)


def test_the_prompt_is_computed_once_for_the_whole_group(plain):
    def flops(group):
        prompts = jnp.zeros((2, 60), jnp.int32)
        completions = jnp.zeros((2, group, 5), jnp.int32)
        shaped = dataclasses.replace(plain, lengths=jnp.array([60, 50]))
        lowered = jax.jit(lambda p: score(shaped, p, prompts, completions)).lower(
            plain.params
        )
        return lowered.cost_analysis()["flops"]

    # 60 prompt tokens and 4 own tokens per sequence: 8 sequences cost 92 / 64 = 1.44
    # times one in the projections (more in attention), where repeated prompts cost 8.
    assert flops(8) < 1.6 * flops(1)


def test_head_is_the_transposed_embedding_when_tied_else_its_own_kernel(plain, full):
    for tiny, expected in (
        (plain, plain.params["embed"]["embedding"].T),
        (full, full.params["lm_head"]["kernel"]),
    ):
        head = tiny.model.apply(tiny.variables, method=tiny.model.head)
        np.testing.assert_array_equal(head, expected)
    assert "lm_head" not in plain.params


def test_bfloat16_compute_follows_float32_and_keeps_parameters_float32(plain):
    config = dataclasses.replace(plain.model.config, dtype="bfloat16")
    low = dataclasses.replace(plain, model=Decoder(config))
    hidden = jax.jit(lambda p: score(low, p))(plain.params)
    exact = jax.jit(lambda p: score(plain, p))(plain.params)
    assert hidden.dtype == jnp.bfloat16
    assert low.model.init_cache(1, 1, 1).keys.dtype == jnp.bfloat16
    # bfloat16 has 8 bits of mantissa; two layers add a few roundings of 2^-8.
    assert float(jnp.abs(hidden - exact).mean() / jnp.abs(exact).mean()) < 0.03
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(abstract_params(low.model))}
    assert dtypes == {jnp.dtype("float32")}


def test_every_parameter_has_one_logical_axis_name_per_dimension(any_tiny):
    tiny = any_tiny
    shapes, axes = abstract_params(tiny.model), param_axes(tiny.model)
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=is_axes)
    sizes = {"layers": tiny.model.config.num_layers, "embed": 32, "mlp": 48}
    sizes |= {"vocab": 64, "heads": 32, "kv_heads": 16}
    if tiny.model.config.mixer is not None:
        # Of half of the layers each, and heads of several widths: see the mesh.
        sizes = {"embed": 32, "mlp": 48, "vocab": 64, "kv_heads": 16}
    if tiny.model.config.experts is not None:
        sizes |= {"expert": 5, "mlp": 12}
    for path, shape in jax.tree.leaves_with_path(shapes):
        names = axes
        for key in path:
            names = names[key.key]
        assert len(names) == shape.ndim
        for name, size in zip(names, shape.shape, strict=True):
            assert sizes.get(name, size) == size, (path, names)


def test_shapes_and_axes_of_equal_models_are_traced_once(plain, monkeypatch):
    before = abstract_params(plain.model), param_axes(plain.model)
    monkeypatch.setattr(decoders, "_boxed_params", None)
    model = Decoder(dataclasses.replace(plain.model.config))
    assert (abstract_params(model), param_axes(model)) == before


def test_fresh_parameters_are_the_identity_in_norms_and_zero_in_biases(full):
    params = jax.jit(lambda key: init_params(full.model, key))(jax.random.key(7))
    layers = params["layers"]
    # Gemma-style norms add 1 to the stored scale.
    np.testing.assert_array_equal(layers["attn_norm"]["scale"], 0.0)
    np.testing.assert_array_equal(layers["attn"]["q"]["bias"], 0.0)
    kernels = layers["mlp"]["up"]["kernel"]
    assert abs(float(kernels.std()) - 0.02) < 0.002
    assert float(jnp.abs(kernels[0] - kernels[1]).max()) > 0.01


def test_equal_configurations_share_one_compilation(plain):
    count = 0

    def traced(model, params):
        nonlocal count
        count += 1
        return model.apply({"params": params}, method=model.head)

    run = jax.jit(traced, static_argnums=0)
    run(plain.model, plain.params)
    run(Decoder(dataclasses.replace(plain.model.config)), plain.params)
    assert count == 1
