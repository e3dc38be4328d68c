"""Rows of several completions: each of them once and whole, and as it was alone."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from grpo_jax.config import MeshConfig, TrainConfig
from grpo_jax.models import packing as packings
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.models.lora import init_lora
from grpo_jax.models.packing import Packing, pack
from grpo_jax.parallel import mesh as meshes
from grpo_jax.training._microbatches import microbatches
from grpo_jax.training.learner import _minibatch
from grpo_jax.training.state import Batch
from grpo_jax.training.step import policy_logprobs, score_batch

# Lengths of six completions of up to 21 tokens for each of three prompts.
LENGTHS = np.array([[21, 15, 14, 12, 2, 3], [1, 9, 6, 5, 2, 8], [0, 0, 0, 18, 0, 1]])
WIDTH = 21


def mask_of(lengths, width):
    return np.arange(width) < np.asarray(lengths)[..., None]


@st.composite
def batches(draw):
    """A mask, the width of prompts, and how an update is cut."""
    width = draw(st.integers(1, 40))
    shards, minibatches, count = (draw(st.integers(1, 2)) for _ in range(3))
    cuts, size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    if cuts > 1:  # then a microbatch is a part of one prompt's group
        shards, held = 1, size
        prompts, group = minibatches * count, cuts * size
    else:
        prompts, group = shards * minibatches * count * 2, size
        held = draw(st.sampled_from([None, group * shards, 2 * group * shards]))
    lengths = st.lists(
        st.one_of(st.integers(0, width), st.integers(0, width // 4)),
        min_size=prompts * group,
        max_size=prompts * group,
    )
    mask = mask_of(np.reshape(draw(lengths), (prompts, group)), width)
    how = {"minibatches": minibatches, "microbatch_size": held, "shards": shards}
    return mask, draw(st.sampled_from([1, 16, 512])), how


@hypothesis.given(batches())
def test_each_completion_stands_once_and_whole_in_a_row_of_its_part(given):
    mask, prompt_tokens, how = given
    made = pack(mask, prompt_tokens, **how)
    again = pack(mask.copy(), prompt_tokens, **how)
    assert (made is None) == (again is None)
    if made is None:
        return
    np.testing.assert_array_equal(made.source, again.source)
    assert made.source.dtype == np.int32
    prompts, group, width = mask.shape
    parts, rows, places = made.source.shape
    tokens = mask.size // parts
    # No more places, and no more attention scores, than unpacked.
    assert made.source.size < prompts * group * (width - 1)
    assert parts * rows * places**2 <= prompts * group * (width - 1) ** 2
    found = {}
    for part, row in np.ndindex(parts, rows):
        source = made.source[part, row]
        assert not (source[source >= tokens] % width).any()
        for member in {*(source[source < tokens] // width)}:
            at = np.flatnonzero(source // width == member)
            # Behind each other, from the first to the last but one.
            np.testing.assert_array_equal(at, at[0] + np.arange(len(at)))
            np.testing.assert_array_equal(source[at] % width, np.arange(len(at)))
            assert (part, member) not in found
            found[part, int(member)] = len(at)
        assert len({*(source[source < tokens] // (width * group))}) <= 1
    read = np.sort([n - 1 for n in mask.sum(axis=-1).flat if n > 1])
    np.testing.assert_array_equal(np.sort([*found.values()]), read)


@pytest.mark.parametrize(
    ("minibatches", "size", "shards"),
    [(1, None, 1), (2, None, 2), (2, 8, 2), (2, 2, 1)],
)
def test_values_of_places_come_back_where_their_tokens_are(minibatches, size, shards):
    rng = np.random.default_rng(0)
    mask = mask_of(np.minimum(rng.geometric(0.3, (8, 4)), 33), 33)
    how = {"minibatches": minibatches, "microbatch_size": size, "shards": shards}
    made = pack(mask, 16, **how)
    # Each microbatch as the update cuts it; a token says where it is from.
    prompts, group, width = mask.shape
    tokens = 1 + np.arange(mask.size).reshape(mask.shape)
    floats = np.zeros(mask.shape[:2])
    batch = Batch(
        prompts=np.zeros((prompts, 1)),
        prompt_lengths=np.ones(prompts),
        completions=tokens,
        mask=mask,
        advantages=floats,
        sampler_logp=mask * 0.0,
        packing=made,
    )
    update = jax.tree.map(jnp.asarray, batch)
    for number in range(how["minibatches"]):
        minibatch = _minibatch(update, number, count=how["minibatches"])
        cut, _ = microbatches(minibatch, how["microbatch_size"])
        for turn in range(len(cut.prompts)):
            part = jax.tree.map(lambda leaf, turn=turn: leaf[turn], cut)
            targets = part.packing.targets(part.completions)
            back = part.packing.unpack(targets, part.completions)
            # The first token is always predicted, others only where they count.
            counts = part.mask | (jnp.arange(width) == 0)[None, None]
            expected = jnp.where(counts, part.completions, 0)
            np.testing.assert_array_equal(back, expected)


def test_what_is_read_is_a_token_with_its_number_and_its_prompt():
    # Two prompts with a group of two completions of three tokens.
    packing = Packing(jnp.array([[[6, 7, 9, 12], [0, 3, 4, 12], [12, 12, 12, 12]]]))
    tokens, index, owner = packing.rows(jnp.arange(50, 62).reshape(2, 2, 3))
    np.testing.assert_array_equal(tokens[0, 0, :3], [56, 57, 59])
    np.testing.assert_array_equal(tokens[0, 1, :3], [50, 53, 54])
    np.testing.assert_array_equal(index, [[[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]])
    np.testing.assert_array_equal(owner[0, :2], [1, 0])


def test_the_longest_that_counts_decides_not_the_longest():
    mask = mask_of([[40, 3, 3, 3]], 64)
    mask[0, 0, 3:] = False  # its tokens do not count
    rows, places = pack(mask, 8).source.shape[1:]
    assert (rows, places) == (1, 16)
    mask[0, 0, 20] = True  # given tokens in between are read
    assert pack(mask, 8).source.shape[2] >= 20


def test_equal_lengths_and_a_long_prompt_do_not_pay():
    assert pack(mask_of(np.full((2, 8), 64), 64), 8) is None
    few = mask_of([[64, 32, 32, 32]], 64)
    assert pack(few, 8) is not None
    assert pack(few, 1024) is None
    assert pack(mask_of([[1, 1]], 1), 8) is None  # none is read
    # Nor do short completions, for which more would be compiled.
    assert pack(mask_of([[16, 2, 2, 2]], 16), 1) is None
    assert pack(mask_of([[17, 2, 2, 2]], 17), 1) is not None


def test_few_shapes_serve_many_steps():
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(100):
        lengths = np.minimum(rng.geometric(1 / 64, (8, 8)), 256)
        packed = pack(mask_of(lengths, 256), 128)
        shapes.add(packed.source.shape)
    assert len(shapes) <= 12


def test_all_processes_take_the_shape_of_the_largest_group(monkeypatch):
    mine, others = mask_of([[9, 2, 2, 2]], 64), mask_of([[60, 30, 2, 2]], 64)
    alone = pack(mine, 8)
    monkeypatch.setattr(packings.jax, "process_count", lambda: 2)
    reads = [np.maximum(x.sum(-1) - 1, 0) for x in (mine, others)]
    both = lambda rows: np.concatenate(reads)  # noqa: E731
    monkeypatch.setattr(packings.meshes, "gather_rows", both)
    shapes = [pack(x, 8, shards=2).source.shape for x in (mine, others)]
    assert shapes[0] == shapes[1] != alone.source.shape


@pytest.fixture(scope="module")
def packed():
    """One part in which a prompt has two rows and the others have one."""
    made = pack(mask_of(LENGTHS, WIDTH), 6)
    assert made.source.shape == (1, 4, 32)
    return jax.tree.map(jnp.asarray, made)


def test_log_probs_and_gradients_are_those_of_rows_of_their_own(any_tiny, packed):
    model = Decoder(dataclasses.replace(any_tiny.model.config, lora_scale=2.0))
    memory = model.config.mixer is not None
    own = {
        "DeltaConfig": ("delta_qkv", "delta_a"),
        "ConvConfig": ("conv_bcx", "conv_o"),
    }
    targets = ("q", "v", *own.get(type(model.config.mixer).__name__, ()))
    adapters = init_lora(model, jax.random.key(1), rank=2, targets=targets)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    draw = np.random.default_rng(4)
    completions = jnp.asarray(draw.integers(0, 64, (*LENGTHS.shape, WIDTH)))
    mask = jnp.asarray(mask_of(LENGTHS, WIDTH))
    weights = jnp.asarray(draw.standard_normal((2, *mask.shape)), jnp.float32)

    def loss(variables, packing):
        scored = policy_logprobs(
            model,
            variables,
            any_tiny.prompts,
            any_tiny.lengths,
            completions,
            temperature=0.7,
            with_entropy=True,
            packing=packing,
        )
        kept = [jnp.where(mask, x, 0.0) for x in (scored.logp, scored.entropy)]
        return sum(jnp.sum(w * x) for w, x in zip(weights, kept, strict=True)), kept

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    variables = {**any_tiny.variables, "lora": adapters}
    ours, alone = gradient(variables, packed), gradient(variables, None)
    # Of memories both forms differ by 2e-14 in float64.
    tolerance = 5e-5 if memory else 1e-5
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, atol=tolerance * max(scale, 1.0))


def test_on_a_mesh_memories_of_shared_rows_are_those_of_their_prompts(hybrid):
    """In microbatches, on eight devices, as alone in rows of their own."""
    model, draw = hybrid.model, np.random.default_rng(1)
    mask = mask_of(np.minimum(draw.geometric(0.3, (8, 4)), 33), 33)
    mask[0, 1] = True
    sizes = {"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 33}
    config = TrainConfig(model="tiny", microbatch_size=16, **sizes)
    batch = Batch(
        prompts=draw.integers(0, 64, (8, 6)),
        prompt_lengths=draw.integers(1, 7, 8),
        completions=draw.integers(0, 64, mask.shape),
        mask=mask,
        advantages=np.zeros((8, 4), np.float32),
        sampler_logp=np.zeros(mask.shape, np.float32),
    )
    score = jax.jit(functools.partial(score_batch, model, config))
    alone = score(hybrid.variables, jax.tree.map(jnp.asarray, batch))
    rows = pack(mask, 6, microbatch_size=16, shards=4)
    assert rows.source.size < 0.5 * mask.size
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes, shapes = param_axes(model), abstract_params(model)
    places = {"params": meshes.parameter_shardings(axes, shapes, mesh)}
    with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
        given = meshes.to_mesh(mesh, batch.replace(packing=rows))
        shared = score(jax.device_put(hybrid.variables, places), given)
    np.testing.assert_allclose(shared[mask], alone[mask], atol=2e-5)


def test_a_model_without_such_rows_is_refused(packed):
    class Plain:
        score = None

    with pytest.raises(ValueError, match="Plain has no score_rows"):
        packings.completion_states(Plain(), {}, *[jnp.zeros(1)] * 3, packing=packed)
