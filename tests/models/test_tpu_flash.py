"""Kernels for TPUs, computed without one, against the plain form of attention.

Blocks are as small as can be, so that each case has several of rows and of prompts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import _attention as attentions
from grpo_jax.models import _tpu_flash as flash
from grpo_jax.models.cache import Prefix
from grpo_jax.models.decoder import Decoder, abstract_params
from grpo_jax.parallel.mesh import AXES, batch_sharding
from tests.models.conftest import PLAIN

# Two blocks of prompts. Of the rows there are three, since 18 is more than 3 x 4.
PROMPT, TOKENS, WIDTH, LANES = 14, 18, 4, 4


def draw(seed, *shape):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def arrays(n, group, heads, kv_heads, prompts):
    """Queries, own keys and values, and those of prompts."""
    own, shared = (n, kv_heads, group, TOKENS, WIDTH), (prompts, kv_heads, PROMPT)
    shapes = [(n, group, TOKENS, heads, WIDTH), own, own, *[(*shared, WIDTH)] * 2]
    return tuple(draw(i, *shape) for i, shape in enumerate(shapes))


@pytest.fixture
def with_kernels(monkeypatch):
    """Makes `attention` take the kernels, without a TPU."""
    small = flash.Blocks(lanes=LANES, interpret=True)
    of_rows = functools.partial(flash.row_attention, blocks=small)
    monkeypatch.setattr(attentions, "row_attention", of_rows)
    monkeypatch.setattr(attentions, "serves_rows", lambda *given: True)


def mesh_of_four():
    axes = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((1, 2, 2), AXES, axis_types=axes, devices=jax.devices()[:4])


def check(given, lengths, **options):
    """Both forms give the same result, and gradients of a weighted sum of it."""
    weights = draw(9, *given[0].shape)

    def total(given, kernels):
        prefix = None if lengths is None else Prefix(*given[3:], lengths)
        out = attentions.attention(
            *given[:3], prefix=prefix, scale=0.4, kernels=kernels, **options
        )
        return jnp.sum(weights * out), out

    differentiate = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
    found, expected = (jax.tree.leaves(differentiate(given, k)) for k in (True, False))
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_rows_of_several_sequences_see_the_prompt_they_name(with_kernels):
    """Two parts of three rows and two prompts, of which the last one has none.

    An empty row names any prompt. Heads share keys, scores are capped.
    """
    starts = np.array([[0, 0], [0, 7], [3, 12], [1, 13], [9, 10], [0, 0]])
    token = np.arange(TOKENS)
    first = np.where(token < starts[:, :1], 0, starts[:, :1])
    first = np.where(token < starts[:, 1:], first, starts[:, 1:])
    check(
        arrays(6, 1, heads=2, kv_heads=1, prompts=4),
        jnp.array([PROMPT, 1, 9, 3]),
        index=jnp.asarray(token - first),
        owner=jnp.array([[1, 0, 5], [0, 0, 0]]),
        window=jnp.asarray(7),
        softcap=2.0,
    )


def test_a_group_shares_its_prompt_on_a_mesh(with_kernels):
    """The batch is split over two devices, the heads over two."""
    mesh = mesh_of_four()
    with jax.set_mesh(mesh):
        given = jax.device_put(
            arrays(2, 2, heads=2, kv_heads=2, prompts=2), batch_sharding(mesh)
        )
        check(given, jnp.array([PROMPT, 5]), window=None, softcap=None)


def test_prompts_alone_are_causal(with_kernels):
    given = arrays(2, 1, heads=2, kv_heads=2, prompts=0)[:3]
    with jax.set_mesh(mesh_of_four()):
        check(given, None, window=jnp.asarray(9), softcap=None)


@pytest.mark.parametrize(
    ("tokens", "prompt", "change", "served"),
    [
        (255, 128, {}, True),
        (95, None, {}, True),
        # 128 x 256 pairs are more than twice 63 x 191.
        (63, 128, {}, False),
        (1, 128, {}, False),
        (255, 128, {"dtype": jnp.float32}, True),
        (255, 128, {"dtype": jnp.float16}, False),
        (255, 128, {"width": 72}, False),
        # Eight heads for each of keys take 8 MiB in bfloat16, in blocks of 256 tokens.
        (255, 128, {"heads": 16, "width": 256}, True),
        (256, 128, {"heads": 16, "width": 256, "dtype": jnp.float32}, False),
        (300, 128, {"heads": 16, "width": 256}, False),
        (255, 128, {"heads": 64}, False),
        # Three prompts are not split over two devices, nor two heads over four.
        (255, 128, {"mesh": (1, 2, 1)}, True),
        (255, 128, {"n": 3, "mesh": (1, 2, 1)}, False),
        (255, 128, {"mesh": (1, 1, 4)}, False),
    ],
)
def test_shapes_that_kernels_serve(tokens, prompt, change, served, monkeypatch):
    how = {"n": 4, "heads": 14, "width": 64, "dtype": jnp.bfloat16, "mesh": (1, 1, 1)}
    how |= change
    of = functools.partial(jax.ShapeDtypeStruct, dtype=how["dtype"])
    queries = of((how["n"], 8, tokens, how["heads"], how["width"]))
    keys = of((how["n"], 2, 8, tokens, how["width"]))
    prefix = None
    if prompt is not None:
        shared = of((how["n"], 2, prompt, how["width"]))
        prefix = Prefix(shared, shared, of((how["n"],)))
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh(how["mesh"], AXES, axis_types=axes)
    with jax.sharding.use_abstract_mesh(mesh):
        assert not flash.serves_rows(queries, keys, prefix, None)  # not on a CPU
        monkeypatch.setattr(flash, "is_tpu", lambda mesh: True)
        assert flash.serves_rows(queries, keys, prefix, None) == served


def test_a_map_over_devices_keeps_the_plain_form(monkeypatch):
    monkeypatch.setattr(flash, "is_tpu", lambda mesh: True)
    queries, keys = jnp.zeros((1, 1, 128, 1, 64)), jnp.zeros((1, 1, 1, 128, 64))
    served = []

    def within(x):
        served.append(flash.serves_rows(queries, keys, None, None))
        return x

    within(0)
    jax.pmap(within)(jnp.zeros(1))
    assert served == [True, False]


@pytest.mark.parametrize(("attention", "asked"), [("auto", True), ("xla", False)])
def test_the_setting_turns_kernels_off(attention, asked, monkeypatch):
    calls = []

    def serves(*given):
        calls.append(given)
        return False

    monkeypatch.setattr(attentions, "serves_rows", serves)
    model = Decoder(dataclasses.replace(PLAIN, attention=attention))
    given = [jnp.zeros((1, 3), int), jnp.ones(1, int), jnp.zeros((1, 2, 3), int)]
    score = functools.partial(model.apply, method=model.score)
    jax.eval_shape(score, {"params": abstract_params(model)}, *given)
    assert bool(calls) == asked
