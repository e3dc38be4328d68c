"""What a loop drew is found again under the completion's number."""

import jax
import numpy as np

from grpo_jax.rollout import _loop as loops
from grpo_jax.rollout._drawn import Drawn

KEY = jax.random.key(0)


def drawn_of(*prompts, group=2, limit=4):
    drawn = Drawn(group, limit)
    drawn.add(prompts, KEY, range(len(prompts)))
    return drawn


def loop(held, **arrays):
    """What a loop of one part returns; tokens are 10 x ticket + index."""
    arrays = {name: np.array(x)[None] for name, x in arrays.items()}
    tickets, indices = arrays["tickets"], arrays["indices"]
    held = np.array(held)[None]
    slots = np.zeros_like(held)
    return loops.Loop(
        turn=np.array([tickets.shape[2]]),
        column=np.array([0]),
        held=loops.Held(held, row=slots, prompt_lengths=slots, keys=slots),
        fed=slots,
        index=slots,
        taken=np.array([0]),
        tokens=10 * tickets + indices,
        logp=-1.0 - indices,
        **arrays,
    )


def test_tokens_of_several_loops_are_joined_also_where_a_slot_was_refilled():
    drawn = drawn_of([5, 6], [7])
    # The first slot draws completion 0 and goes on with 3, the second has 1.
    first = loop(
        [3, 1], tickets=[[0, 0, 3], [1, -1, 1]], indices=[[0, 1, 0], [0, 9, 1]]
    )
    assert drawn.record(first, version=4) == [0]
    second = loop([-1, -1], tickets=[[3, -1], [1, 1]], indices=[[1, 9], [2, 3]])
    assert drawn.record(second, version=5) == [1, 3]
    assert drawn.lengths.tolist() == [2, 4, 0, 2]
    assert drawn.tokens[[0, 1, 3]].tolist() == [
        [0, 1, 0, 0],
        [10, 11, 12, 13],
        [30, 31, 0, 0],
    ]
    assert drawn.versions[1].tolist() == [4, 4, 5, 5]
    held = np.array([[0, 1, 3]])
    last = drawn.tokens_from(held, drawn.lengths[held] - 1, 1)
    assert last.tolist() == [[[1], [13], [31]]]


def test_a_forgotten_group_gives_its_place_to_another_and_no_token():
    drawn = drawn_of([5, 6], [7])
    tickets, indices = [[0, 0], [2, 2]], [[0, 1], [0, 1]]
    drawn.record(loop([-1, 2], tickets=tickets, indices=indices), version=0)
    drawn.forget(0)
    assert drawn.add([[8, 9, 9], [4]], KEY, [6, 7]) == [0, 2]
    assert drawn.prompts == [[8, 9, 9], [7], [4]]
    assert drawn.prompt_lengths.tolist() == [3, 1, 1]
    assert drawn.lengths.tolist() == [0, 0, 2, 0, 0, 0] and not drawn.ended[0]


def test_a_place_without_a_completion_can_be_read_where_there_is_none():
    drawn = drawn_of()
    none = np.array([[-1, -1]])
    assert drawn.tokens_from(none, none, 1).tolist() == [[[0], [0]]]
    assert drawn.add([[5]], KEY, [0]) == [0]


def test_a_key_depends_on_its_prompt_s_number_and_its_sample_alone():
    few, many = Drawn(2, 4), Drawn(3, 4)
    few.add([[1], [2]], KEY, [8, 5])
    many.add([[3], [4], [5]], KEY, [5, 7, 8])
    np.testing.assert_array_equal(few.keys[:2], many.keys[6:8])
    np.testing.assert_array_equal(few.keys[2:], many.keys[:2])
    assert len(np.unique(many.keys, axis=0)) == 9
