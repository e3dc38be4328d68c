"""Mixture of experts: routing, the fast path against the reference, meshes."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from grpo_jax.config import MeshConfig
from grpo_jax.models import _experts, _tpu_experts
from grpo_jax.models._experts import ExpertsMLP
from grpo_jax.models._routing import (
    ExpertKernels,
    ExpertsConfig,
    Routing,
    route,
    through_all_experts,
    through_experts,
)
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.lora import init_lora, lora_axes, merge_lora
from grpo_jax.models.protocol import in_compute_dtype
from grpo_jax.parallel.mesh import RULES, make_mesh


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def test_the_likeliest_experts_are_chosen_and_weighed_by_their_probabilities():
    # e^logit = 1, 4, 2, 1: probabilities 1/8, 4/8, 2/8, 1/8.
    logits = jnp.log(jnp.array([[1.0, 4.0, 2.0, 1.0]]))
    as_is = route(logits, per_token=2, normalized=False)
    np.testing.assert_array_equal(as_is.experts, [[1, 2]])
    np.testing.assert_allclose(as_is.weights, [[0.5, 0.25]], rtol=1e-6)
    summed = route(logits, per_token=2, normalized=True)
    np.testing.assert_allclose(summed.weights, [[2 / 3, 1 / 3]], rtol=1e-6)


def test_a_token_gets_the_weighted_outputs_of_its_experts():
    # One feature, inner width 1: expert e computes gate * up * down = x^2 * c_e.
    scales = jnp.array([1.0, 10.0, 100.0])[:, None, None]
    kernels = ExpertKernels(
        gate=jnp.ones((3, 1, 1)), up=jnp.ones((3, 1, 1)), down=scales
    )
    routing = Routing(
        experts=jnp.array([[2, 0], [1, 2]]), weights=jnp.array([[0.5, 2.0], [3.0, 0.1]])
    )
    for through in (through_experts, through_all_experts):
        out = through(jnp.array([[1.0], [2.0]]), routing, kernels, act=lambda x: x)
        # 0.5 * 100 + 2 * 1; 4 * (3 * 10 + 0.1 * 100).
        np.testing.assert_allclose(out, [[52.0], [160.0]], rtol=1e-6)


@pytest.mark.parametrize("popular", [False, True], ids=["spread", "one expert"])
def test_the_fast_path_is_the_reference_with_its_gradient(popular):
    count, rows = 5, 12
    x, logits = draw(rows, 8), draw(rows, count, seed=1)
    if popular:  # every token to experts 3 and 0, so that the others' blocks are empty
        logits = logits + jnp.array([30.0, 0.0, 0.0, 60.0, 0.0])[None]
    kernels = ExpertKernels(
        gate=draw(count, 8, 6, seed=2),
        up=draw(count, 8, 6, seed=3),
        down=draw(count, 6, 8, seed=4),
    )

    factors = draw(count, 8, 2, seed=6), draw(count, 2, 6, seed=7)
    kernels = kernels.replace(adapters={"up": factors})

    def loss(through, x, logits, kernels):
        routing = route(logits, per_token=2, normalized=not popular)
        out = through(x, routing, kernels, act=nn.silu)
        return jnp.sum(out * draw(rows, 8, seed=5)), out

    results = [
        jax.jit(jax.grad(loss, argnums=(1, 2, 3), has_aux=True), static_argnums=0)(
            through, x, logits, kernels
        )
        for through in (through_experts, through_all_experts)
    ]
    for ours, expected in zip(*map(jax.tree.leaves, results), strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(ours, expected, atol=1e-5 * max(scale, 1e-3))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1)])
def test_every_device_of_a_mesh_mixes_its_own_tokens(experts, sizes):
    module = ExpertsMLP(experts.model.config)
    x = draw(8, 6, 32)
    params = {
        name: draw(*leaf.shape, seed=7)
        for name, leaf in nn.meta.unbox(
            jax.eval_shape(lambda: module.init(jax.random.key(0), x))["params"]
        ).items()
    }

    def loss(params, x):
        out = module.apply({"params": params}, x)
        return jnp.sum(out**2), out

    run = jax.jit(jax.grad(loss, has_aux=True))
    alone = run.lower(params, x).compile()
    expected = alone(params, x)
    data, fsdp, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        split = jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        apart = run.lower(params, split).compile()
        found = apart(params, split)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)
    # A sort of all tokens on every device would leave each the work of all.
    flops = [program.cost_analysis()["flops"] for program in (alone, apart)]
    assert flops[1] < 1.2 * flops[0] / (data * fsdp)


def test_the_router_works_in_float32(plain):
    # Two experts whose logits differ by less than bfloat16 resolves at 1.
    experts = ExpertsConfig(count=2, per_token=1, width=4, normalized=True)
    config = dataclasses.replace(plain.model.config, experts=experts)
    params = {
        "router": jnp.zeros((32, 2)).at[0].set(jnp.array([1.0, 1.0 + 2.0**-12])),
        "gate": jnp.ones((2, 32, 4)),
        "up": jnp.ones((2, 32, 4)),
        "down": jnp.stack([jnp.zeros((4, 32)), jnp.ones((4, 32))]),
    }
    x = jnp.ones((1, 1, 32), jnp.bfloat16)
    # As sampling rounds them.
    params = in_compute_dtype(params, "bfloat16")
    assert float(jnp.abs(ExpertsMLP(config).apply({"params": params}, x)).min()) > 1.0


def test_merged_adapters_of_experts_compute_what_they_did(experts):
    config = dataclasses.replace(experts.model.config, lora_scale=2.0)
    model = Decoder(config)
    targets = ("q", "gate", "up", "down")
    adapters = init_lora(model, jax.random.key(0), rank=2, targets=targets)
    mlp = adapters["layers"]["mlp"]
    assert jax.tree.map(jnp.shape, mlp["down"]) == {
        "a": (2, 5, 12, 2),
        "b": (2, 5, 2, 32),
    }
    assert lora_axes(model, adapters)["layers"]["mlp"]["gate"] == {
        "a": ("layers", "expert", "embed", None),
        "b": ("layers", "expert", None, "mlp"),
    }
    random = np.random.default_rng(5)
    move = lambda x: x + 0.2 * random.standard_normal(x.shape).astype("float32")  # noqa: E731
    adapters = jax.tree.map(move, adapters)
    args = experts.prompts, experts.lengths, experts.completions
    score = jax.jit(lambda given: model.apply(given, *args, method=model.score))
    found = score({**experts.variables, "lora": adapters})
    merged = score({"params": merge_lora(experts.params, adapters, config)})
    np.testing.assert_allclose(found, merged, atol=5e-5)
    assert jnp.abs(found - score(experts.variables)).max() > 0.1
    plain = Decoder(experts.model.config)
    with pytest.raises(ValueError, match="lora_scale is None"):
        given = {**experts.variables, "lora": adapters}
        plain.apply(given, *args, method=plain.score)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of which tiny arrays have several, for kernels without a TPU."""
    for name, size in {"_ROWS": 16, "_FEWEST_ROWS": 8, "_SIDE": 4}.items():
        monkeypatch.setattr(_tpu_experts, name, size)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        # No block is a whole number of tiles, some are empty, and rows are left over.
        ((0, 9, 0, 13, 0), jnp.float32),
        ((0, 9, 0, 13, 0), jnp.bfloat16),
        ((30,), jnp.float32),
        ((0, 0), jnp.float32),
    ],
)
def test_kernels_for_blocks_of_rows_are_the_plain_product(sizes, dtype, small_tiles):
    rows, kernels = draw(30, 6).astype(dtype), draw(len(sizes), 6, 5, seed=1)
    weights, sizes = draw(30, 5, seed=2), jnp.asarray(sizes, jnp.int32)

    def total(rows, kernels, product):
        out = product(rows, kernels, sizes)
        return jnp.sum(weights * out.astype(jnp.float32)), out

    differentiate = jax.jit(
        jax.grad(total, argnums=(0, 1), has_aux=True), static_argnums=2
    )
    interpreted = lambda *given: _tpu_experts.block_product(*given, True)  # noqa: E731
    found, expected = (
        differentiate(rows, kernels.astype(dtype), product)
        for product in (interpreted, jax.lax.ragged_dot)
    )
    for ours, plain in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert ours.dtype == plain.dtype == dtype
        exact = [np.asarray(x, np.float32) for x in (ours, plain)]
        np.testing.assert_allclose(*exact, atol=2e-2 if dtype != jnp.float32 else 1e-5)


@pytest.mark.parametrize(
    ("sizes", "attention", "batch", "taken"),
    [
        ((2, 4, 1), "auto", 8, True),
        (None, "auto", 8, True),
        ((2, 4, 1), "xla", 8, False),
        # Experts are split over two devices; three rows are not split over eight.
        ((2, 2, 2), "auto", 8, False),
        ((2, 4, 1), "auto", 3, False),
    ],
)
def test_kernels_serve_where_experts_are_whole(
    experts, sizes, attention, batch, taken, small_tiles, monkeypatch
):
    calls = []

    def product(*given):
        calls.append(given)
        return _tpu_experts.block_product(*given, True)

    monkeypatch.setattr(_experts, "block_product", product)
    config = dataclasses.replace(experts.model.config, attention=attention)
    module, x = ExpertsMLP(config), draw(batch, 2, 32)
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    params = {name: draw(*leaf.shape, seed=7) for name, leaf in shapes.items()}
    loss = lambda params, x: jnp.sum(module.apply({"params": params}, x) ** 2)  # noqa: E731
    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    assert not calls  # this is no TPU
    monkeypatch.setattr(_tpu_experts, "is_tpu", lambda mesh: True)
    with contextlib.ExitStack() as stack:
        if sizes is not None:
            data, fsdp, tensor = sizes
            mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
            stack.enter_context(jax.set_mesh(mesh))
            stack.enter_context(nn.logical_axis_rules(RULES))
        found = jax.jit(jax.grad(lambda *given: loss(*given), argnums=(0, 1)))(
            params, x
        )
    assert bool(calls) == taken
    for ours, plain in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        scale = float(jnp.abs(plain).max())
        np.testing.assert_allclose(ours, plain, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("dtype", "wide", "served"),
    [
        ("float32", False, True),
        ("bfloat16", False, True),
        ("float16", False, False),
        ("float32", True, False),
    ],
)
def test_kernels_serve_what_they_can_differentiate(dtype, wide, served, monkeypatch):
    monkeypatch.setattr(_tpu_experts, "is_tpu", lambda mesh: True)
    with jax.enable_x64(wide):
        assert _tpu_experts.serves_blocks(1, jnp.dtype(dtype)) == served


def test_products_of_blocks_have_no_forward_mode():
    rows, kernels, sizes = draw(4, 8), draw(2, 8, 8), jnp.array([1, 3])
    product = lambda rows: _tpu_experts.block_product(rows, kernels, sizes, True)  # noqa: E731
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(product, (rows,), (rows,))
