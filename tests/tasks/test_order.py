"""The order of rows: every pass visits each row once, wherever one starts to read."""

import pytest

from grpo_jax.tasks.order import rows_at


def test_every_pass_visits_each_row_once():
    numbers = rows_at(0, 21, size=7, seed=3)
    for start in (0, 7, 14):
        assert sorted(numbers[start : start + 7]) == list(range(7))


def test_passes_differ_from_each_other_and_from_the_file():
    numbers = rows_at(0, 60, size=20, seed=0)
    passes = [tuple(numbers[start : start + 20]) for start in (0, 20, 40)]
    assert len({*passes, tuple(range(20))}) == 4


@pytest.mark.parametrize("start", [0, 1, 6, 7, 20])
def test_a_position_is_found_without_what_came_before(start):
    whole = rows_at(0, 30, size=7, seed=3)
    assert rows_at(start, 10, size=7, seed=3) == whole[start : start + 10]


def test_a_batch_may_span_several_passes():
    numbers = rows_at(5, 8, size=3, seed=1)
    # Positions 6 to 8 and 9 to 11 are whole passes.
    assert sorted(numbers[1:4]) == [0, 1, 2]
    assert sorted(numbers[4:7]) == [0, 1, 2]


def test_the_seed_decides_the_order():
    orders = {tuple(rows_at(0, 50, size=50, seed=seed)) for seed in range(4)}
    assert len(orders) == 4
    assert rows_at(0, 50, size=50, seed=2) == rows_at(0, 50, size=50, seed=2)


def test_a_single_row_is_repeated():
    assert rows_at(4, 3, size=1, seed=0) == [0, 0, 0]
