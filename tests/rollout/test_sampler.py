"""A sampler: token ids in, completions on the host out, as `generate` draws them."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import SamplingConfig
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout import _programs as programs
from grpo_jax.rollout.generate import GroupSampler, generate

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15]]
# Some completions end early, the longest ones at the limit.
SAMPLING = SamplingConfig(stop_ids=tuple(range(0, 264, 7)))


@pytest.fixture
def make_sampler(tiny_policy, meshes_of):
    def make(*sizes, max_prompt_tokens=64):
        mesh = meshes_of(*sizes) if sizes else meshes_of(1, 1, 1)
        sampler = GroupSampler(
            tiny_policy.model, mesh, max_prompt_tokens=max_prompt_tokens
        )
        sampler.update(tiny_policy.variables, version=0)
        return sampler

    return make


def sample(sampler, prompts=PROMPTS, **changes):
    options = {
        "numbers": range(20, 20 + len(prompts)),
        "key": jax.random.key(3),
        "group_size": 4,
        "max_new_tokens": 20,
        "sampling": SAMPLING,
    }
    return sampler.sample(prompts, **(options | changes))


def test_completions_are_those_of_generate_on_the_host(make_sampler, tiny_policy):
    given = sample(make_sampler())
    padded = np.full((5, 16), 3, np.int32)
    for row, ids in zip(padded, PROMPTS, strict=True):
        row[: len(ids)] = ids
    expected = generate(
        tiny_policy.model,
        tiny_policy.params,
        jnp.asarray(padded),
        jnp.array([len(ids) for ids in PROMPTS]),
        jax.random.key(3),
        group_size=4,
        max_new_tokens=20,
        sampling=SAMPLING,
        prompt_ids=jnp.arange(20, 25, dtype=jnp.uint32),
    )
    for one, other in zip(
        jax.tree.leaves(given), jax.tree.leaves(expected), strict=True
    ):
        assert isinstance(one, np.ndarray)
        np.testing.assert_array_equal(one, other)


def test_batches_and_meshes_change_no_completion(make_sampler):
    whole = sample(make_sampler())
    # Batches of one prompt, of one that has more completions, of two, and of three on
    # three devices; the last one is filled up where the five prompts do not fill it.
    for sizes, batch_size in (
        ((), 4),
        ((), 1),
        ((), 8),
        ((3, 1, 1), 12),
        ((8, 1, 1), 8),
    ):
        parts = sample(make_sampler(*sizes), batch_size=batch_size)
        np.testing.assert_array_equal(parts.tokens, whole.tokens)
        np.testing.assert_array_equal(parts.lengths, whole.lengths)
        np.testing.assert_array_equal(parts.finished, whole.finished)
        np.testing.assert_allclose(parts.logp, whole.logp, atol=1e-5)


def test_completions_are_cut_to_the_bucket_of_the_longest(make_sampler):
    at_once = SamplingConfig(stop_ids=tuple(range(264)))
    cut = sample(make_sampler(), max_new_tokens=40, sampling=at_once)
    assert cut.tokens.shape == (5, 4, 16) == cut.logp.shape
    # More completions of a prompt than tokens of each: no other axis is cut.
    wide = sample(make_sampler(), max_new_tokens=3, group_size=20)
    assert wide.tokens.shape == (5, 20, 3) and wide.lengths.shape == (5, 20)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_get_their_shares_and_one_shape(make_sampler, on_processes, count):
    whole = sample(make_sampler())
    # A share has no prompt where there are more processes than prompts.
    parts = on_processes(
        lambda _: (sample(make_sampler()), meshes.own_share(len(PROMPTS))), count
    )
    for part, share in parts:
        np.testing.assert_array_equal(part.tokens, whole.tokens[share])
        np.testing.assert_array_equal(part.lengths, whole.lengths[share])


def test_weights_are_needed_and_freed(make_sampler, tiny_policy):
    sampler = make_sampler()
    copy = jax.tree.map(jnp.copy, tiny_policy.params)
    sampler.update({"params": copy}, version=1)
    sample(sampler)
    leaf = weakref.ref(jax.tree.leaves(copy)[0])
    sampler.release()
    del copy
    gc.collect()
    assert leaf() is None
    with pytest.raises(RuntimeError, match="no weights; call update"):
        sample(sampler)


def test_newer_weights_are_used(make_sampler, tiny_policy):
    sampler = make_sampler()
    old = sample(sampler)
    sampler.update(
        {"params": jax.tree.map(jnp.zeros_like, tiny_policy.params)}, version=1
    )
    assert (sample(sampler).tokens != old.tokens).any()


def test_weights_that_a_loop_reads_as_they_are_are_not_copied(tiny_policy):
    given = {"params": tiny_policy.params}
    ready = programs.prepare(tiny_policy.model, given, unrolled=True)
    table = given["params"]["embed"]["embedding"]
    assert ready["params"]["embed"]["embedding"] is table
    laid = tiny_policy.model.unroll(given)
    for leaf, expected in zip(*map(jax.tree.leaves, (ready, laid)), strict=True):
        np.testing.assert_array_equal(leaf, expected)
