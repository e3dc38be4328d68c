"""Global random generators are lent to one call, and come back as they were."""

import asyncio
import random

import numpy as np
import pytest

from grpo_jax.environments._generators import Draws, Stepped, seeded


def draw():
    return random.random(), float(np.random.random())


def test_the_same_seed_gives_the_same_draws_and_the_states_come_back():
    random.seed(1)
    np.random.seed(1)
    expected = [draw() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    found, inside = [], []
    for _ in range(3):
        found.append(draw())
        with seeded(2**40 + 7):
            inside.append([draw(), draw()])
    assert found == expected
    assert inside[0] == inside[1] == inside[2]
    with seeded(2**40 + 8):
        assert draw() != inside[0][0]


def test_the_states_come_back_after_an_exception():
    before = random.getstate()
    with pytest.raises(KeyError), seeded(0):
        random.random()
        raise KeyError
    assert random.getstate() == before


def test_coroutines_that_take_turns_draw_as_if_alone():
    async def draws(turns):
        found = []
        for _ in range(turns):
            found.append(draw())
            await asyncio.sleep(0)
        return found

    async def together():
        steps = (Stepped(draws(3), Draws(seed).in_use) for seed in (5, 6, 5))
        return await asyncio.gather(*(asyncio.ensure_future(step) for step in steps))

    with seeded(5):
        alone = [draw() for _ in range(3)]
    before = random.getstate()
    first, second, third = asyncio.run(together())
    assert first == third == alone != second
    assert random.getstate() == before


def test_a_stepped_coroutine_sees_values_exceptions_and_its_cancellation():
    seen = []

    async def inner(future):
        try:
            return await future
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def outer():
        loop = asyncio.get_running_loop()
        good, bad, never = (loop.create_future() for _ in range(3))
        good.set_result(3)
        bad.set_exception(KeyError("x"))
        draws = Draws(0)
        assert await Stepped(inner(good), draws.in_use) == 3
        with pytest.raises(KeyError):
            await Stepped(inner(bad), draws.in_use)
        task = asyncio.ensure_future(Stepped(inner(never), draws.in_use))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(outer())
    assert seen == ["cancelled"]
