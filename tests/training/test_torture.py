"""A run that is killed, stopped and robbed of its checkpoint ends in the same bits."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from torture import CARRY_OVER, PLAYED, Torture  # noqa: E402

# Enough for all accidents. A run that ends before one costs the time of another.
STEPS = 20


TRIES = 10  # of one accident, which a run may end before


def kill(accidents, torture):
    """Has one kill of each, also where a run ends before one."""
    for count, accident in enumerate(accidents, start=1):
        for _ in range(TRIES):
            if torture.tally.kills.total() < count:
                accident()
        assert torture.tally.kills.total() == count, torture.tally


@pytest.mark.slow
def test_a_tortured_run_ends_in_the_bits_of_an_undisturbed_one(tiny_policy, tmp_path):
    cache = str(jax.config.jax_compilation_cache_dir)
    torture = Torture(
        tmp_path,
        model=str(tiny_policy.folder),
        cache=cache,
        seed=0,
        steps=STEPS,
        # With more state than a plain run has: completions that continue in the next
        # step.
        options=CARRY_OVER,
    )
    kill(
        [
            torture.kill_at_the_start,
            torture.kill_in_a_step,
            torture.kill_in_a_save,
            torture.kill_in_a_step,  # of a run that was restored
        ],
        torture,
    )
    # On a slow machine one stop may not yet have left two checkpoints to choose from.
    for _ in range(TRIES):
        if not torture.tally.damages:
            torture.terminate()
            torture.damage()
    torture.end()
    tally = torture.tally
    assert tally.kills == {"at the start": 1, "in a step": 2, "in a save": 1}, tally
    assert tally.terminated >= 1 and tally.quarantined == 1, tally


@pytest.mark.slow
def test_a_tortured_run_with_an_environment_ends_in_the_same_bits(
    tiny_policy, tmp_path
):
    cache = str(jax.config.jax_compilation_cache_dir)
    torture = Torture(
        tmp_path,
        model=str(tiny_policy.folder),
        cache=cache,
        seed=1,
        steps=STEPS // 2,
        options=PLAYED,
    )
    kill([torture.kill_in_a_step, torture.kill_in_a_save], torture)
    torture.end()
    assert torture.tally.ended >= 1, torture.tally
