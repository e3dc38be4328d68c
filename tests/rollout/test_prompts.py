"""New prompts are computed in blocks; which ones changes no completion."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.config import SamplingConfig
from grpo_jax.models.decoder import abstract_params, param_axes
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout import _programs as programs
from grpo_jax.rollout import _prompts
from grpo_jax.rollout._prompts import power, prompt_blocks
from grpo_jax.rollout.generate import GroupSampler

# Of each prompt its length and whether it is new; two parts.
PART = st.lists(st.integers(0, 256), max_size=40)
PARTS = st.tuples(PART, PART).filter(any)


@given(parts=PARTS, by_length=st.booleans())
def test_every_new_prompt_is_in_one_block_at_its_row(parts, by_length):
    lengths = [*parts[0], *parts[1]]
    prompts = [[g % 100 + 1] * n for g, n in enumerate(lengths)]
    groups = [list(range(len(parts[0]))), list(range(len(parts[0]), len(lengths)))]
    new = [list(enumerate(own)) for own in groups]  # row, group
    nowhere = 64
    found = [{}, {}]
    for block in prompt_blocks(
        new,
        prompts,
        width=256,
        most=max(map(len, new)),
        nowhere=nowhere,
        by_length=by_length,
    ):
        parts_of, count, width = block.tokens.shape
        assert parts_of == 2 and power(count) == count
        assert width in ((64, 128, 192, 256) if by_length else (256,))
        assert count * width <= 2048 or not by_length
        for part, own in enumerate(found):
            for row, n, tokens in zip(
                block.rows[part], block.lengths[part], block.tokens[part], strict=True
            ):
                if row != nowhere:
                    assert row not in own and not tokens[n:].any()
                    own[int(row)] = tokens[:n].tolist()
    assert found == [{row: prompts[g] for row, g in own} for own in new]


@pytest.fixture
def sampled(tiny_policy, meshes_of, monkeypatch):
    """Greedy completions of prompts of 2 to 40 tokens; blocks of up to 32 tokens."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 250, n).tolist() for n in (40, 2, 17, 9, 30, 1, 8)]
    shapes = []
    prefill = programs.prefill

    def noted(model, variables, tokens, *rest, **options):
        shapes.append(tokens.shape)
        return prefill(model, variables, tokens, *rest, **options)

    monkeypatch.setattr(programs, "prefill", noted)

    def sample(tokens, *, sizes=(1, 1, 1), **changes):
        monkeypatch.setattr(_prompts, "_TOKENS", tokens)
        monkeypatch.setattr(_prompts, "_NARROWEST", 8)
        model, mesh = tiny_policy.model, meshes_of(*sizes)
        shapes_of = param_axes(model), abstract_params(model)
        shardings = meshes.parameter_shardings(*shapes_of, mesh)
        params = jax.device_put(tiny_policy.params, shardings)
        sampler = GroupSampler(model, mesh, max_prompt_tokens=64)
        sampler.update({"params": params}, version=0)
        options = {
            "numbers": range(len(prompts)),
            "key": jax.random.key(1),
            "group_size": 1,
            "max_new_tokens": 12,
            "sampling": SamplingConfig(stop_ids=tuple(range(0, 264, 9))),
        }
        shapes.clear()
        return sampler.sample(prompts, **(options | changes)), list(shapes)

    return sample


def test_blocks_of_like_lengths_change_no_completion(sampled, on_processes):
    whole, (shape,) = sampled(1 << 20)
    assert shape == (1, 8, 48)
    # Slots for three: the others come as the first ones end.
    for sizes, changes in (
        ((1, 1, 1), {}),
        ((2, 1, 1), {}),
        ((1, 1, 1), {"batch_size": 3}),
    ):
        parts, shapes = sampled(64, sizes=sizes, **changes)
        assert len(shapes) > 2 and len({width for *_, width in shapes}) > 1
        np.testing.assert_array_equal(parts.tokens, whole.tokens)
        np.testing.assert_array_equal(parts.lengths, whole.lengths)
        np.testing.assert_allclose(parts.logp, whole.logp, atol=1e-5)
    for part, share in on_processes(
        lambda _: (sampled(64)[0], meshes.own_share(len(whole.lengths))), 2
    ):
        np.testing.assert_array_equal(part.tokens, whole.tokens[share])


def test_the_prompts_of_groups_are_in_one_block(sampled):
    _, shapes = sampled(64, group_size=2)
    assert shapes == [(1, 8, 64)]


def test_weights_that_fsdp_splits_are_gathered_for_one_block(sampled):
    _, shapes = sampled(64, sizes=(1, 2, 1))
    assert shapes == [(2, 4, 64)]
