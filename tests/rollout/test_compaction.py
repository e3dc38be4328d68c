"""Completions that go on keep their prompt, their number and what is stored of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.models.cache import Cache, Prefix, regroup
from grpo_jax.rollout import _compaction
from grpo_jax.rollout._compaction import Layout

PROMPTS, GROUP = 6, 4
SMALLER = [Layout(6, 2), Layout(4, 3), Layout(6, 1), Layout(2, 4)]


def needed_groups(alive, width):
    return sum(-(-int(row.sum()) // width) for row in alive)


@settings(max_examples=15)
@given(st.integers(0, 2 ** (PROMPTS * GROUP) - 1), st.sampled_from(SMALLER))
def test_a_layout_fits_exactly_when_its_groups_hold_the_prompts(bits, layout):
    alive = alive_from(bits)
    assignment = _compaction.first_assignment(Layout(PROMPTS, GROUP))
    fits = bool(_compaction.fit(assignment, jnp.asarray(~alive), layout))
    assert fits == (needed_groups(alive, layout.width) <= layout.groups)


def alive_from(bits):
    flat = [bits >> i & 1 for i in range(PROMPTS * GROUP)]
    return np.array(flat, bool).reshape(PROMPTS, GROUP)


@settings(max_examples=15)
@given(st.integers(0, 2 ** (PROMPTS * GROUP) - 1), st.data())
def test_moves_keep_every_completion_and_what_is_stored_of_it(bits, data):
    """Twice in a row, with arrays in which each entry says whose it is."""
    alive = alive_from(bits)
    assignment = _compaction.first_assignment(Layout(PROMPTS, GROUP))
    prompt = jnp.arange(PROMPTS)
    own = jnp.arange(PROMPTS * GROUP).reshape(PROMPTS, 1, GROUP, 1, 1)
    prefix, cache = Prefix(prompt, prompt, prompt), Cache(own, own)
    for wanted in (Layout(PROMPTS, 2), Layout(PROMPTS // 2, 1)):
        if needed_groups(alive, wanted.width) > wanted.groups:
            return
        held = np.isin(assignment.index, np.flatnonzero(alive))
        assignment, moves = _compaction.compact(assignment, jnp.asarray(~held), wanted)
        prefix, cache = regroup(prefix, cache, *moves)
        index = np.asarray(assignment.index)
        filled = index < PROMPTS * GROUP
        assert sorted(index[filled]) == sorted(np.flatnonzero(alive))
        np.testing.assert_array_equal(
            np.asarray(cache.keys)[:, 0, :, 0, 0][filled], index[filled]
        )
        of_prompt = np.broadcast_to(np.asarray(prefix.keys)[:, None], index.shape)
        np.testing.assert_array_equal(of_prompt[filled], index[filled] // GROUP)
        # Some of them end before the next move.
        keep = data.draw(st.integers(0, 2 ** (PROMPTS * GROUP) - 1))
        alive &= alive_from(keep)


def test_the_example_of_the_docstring():
    alive = np.zeros((3, 4), bool)
    alive[[0, 0, 0, 2], [0, 2, 3, 1]] = True
    first = _compaction.first_assignment(Layout(3, 4))
    moved, (prompts, old) = _compaction.compact(
        first, jnp.asarray(~alive), Layout(3, 2)
    )
    # Of twelve completions; 12 stands for an empty slot.
    assert np.asarray(moved.index).tolist() == [[0, 2], [3, 12], [9, 12]]
    assert np.asarray(prompts)[0].tolist() == [0, 0, 2]
    assert np.asarray(old)[0].reshape(-1)[[0, 1, 2, 4]].tolist() == [0, 2, 3, 9]


def test_completions_stay_in_their_part():
    alive = np.zeros((8, 2), bool)
    alive[[0, 1, 6], 1] = True
    assignment = _compaction.first_assignment(Layout(8, 2, parts=2))
    layout = Layout(4, 1, parts=2)
    assert _compaction.fit(assignment, jnp.asarray(~alive), layout)
    assignment, (prompts, old) = _compaction.compact(
        assignment, jnp.asarray(~alive), layout
    )
    # 16 stands for none: prompts 0 and 1 are in the first part, 6 in the second.
    assert np.asarray(assignment.index).tolist() == [[1], [3], [13], [16]]
    assert np.asarray(prompts)[:, 0].tolist() == [0, 2]
    assert np.asarray(old)[:, 0, 0].tolist() == [1, 5]
    # Three in one part do not fit, though they would fit into both together.
    alive[2, 0] = True
    assert not _compaction.fit(
        _compaction.first_assignment(Layout(8, 2, parts=2)), jnp.asarray(~alive), layout
    )


@pytest.mark.parametrize(
    ("shape", "parts", "expected"),
    [
        ((16, 8), 1, [(16, 8), (16, 4), (16, 2), (16, 1)]),
        ((16, 3), 1, [(16, 3), (16, 2), (16, 1)]),
        ((64, 1), 1, [(64, 1), (32, 1), (16, 1)]),
        ((16, 8), 4, [(16, 8), (16, 4)]),
        ((2, 2), 1, [(2, 2)]),
        ((1, 64), 1, [(1, 64), (1, 32), (1, 16)]),
    ],
)
def test_layouts_halve_down_to_the_fewest_slots(shape, parts, expected):
    found = _compaction.layouts(*shape, max_new_tokens=256, parts=parts)
    assert [tuple(layout) for layout in found] == [(*one, parts) for one in expected]


@pytest.mark.parametrize("tokens, count", [(8, 1), (15, 1), (16, 2), (32, 3), (999, 4)])
def test_short_rollouts_have_few_layouts(tokens, count):
    assert len(_compaction.layouts(64, 16, max_new_tokens=tokens, parts=1)) == count


def test_layouts_shrink_to_one_group(monkeypatch):
    monkeypatch.setattr(_compaction, "_FEWEST_SLOTS", 1)
    found = _compaction.layouts(3, 2, max_new_tokens=256, parts=1)
    assert [tuple(one) for one in found] == [
        (3, 2, 1),
        (3, 1, 1),
        (2, 1, 1),
        (1, 1, 1),
    ]


def test_regrouping_takes_parts_apart():
    prefix = Prefix(jnp.arange(4), jnp.arange(4), jnp.arange(4))
    own = jnp.arange(8).reshape(4, 1, 2, 1, 1)
    prompts, old = jnp.array([[1], [0]]), jnp.array([[[2, 0]], [[3, 3]]])
    prefix, cache = jax.jit(regroup)(prefix, Cache(own, own), prompts, old)
    assert np.asarray(prefix.lengths).tolist() == [1, 2]
    assert np.asarray(cache.values)[:, 0, :, 0, 0].tolist() == [[2, 0], [7, 7]]
