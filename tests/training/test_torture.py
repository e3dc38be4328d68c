"""A run that is killed, stopped and robbed of its checkpoint ends in the same bits."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from torture import CARRY_OVER, PLAYED, Torture  # noqa: E402


@pytest.mark.slow
def test_a_tortured_run_ends_in_the_bits_of_an_undisturbed_one(tiny_policy, tmp_path):
    cache = str(jax.config.jax_compilation_cache_dir)
    model = str(tiny_policy.folder)
    # With more state than a plain run has: completions that continue in the next step.
    torture = Torture(tmp_path, model=model, cache=cache, seed=0, options=CARRY_OVER)
    torture.kill_at_the_start()
    torture.kill_in_a_step()
    torture.kill_in_a_save()
    torture.kill_in_a_step()
    torture.kill_in_a_step()
    # On a slow machine one stop may not yet have left two checkpoints to choose from.
    while not torture.tally.damages:
        torture.terminate()
        torture.damage()
    torture.end()
    tally = torture.tally
    assert tally.kills.total() == 5 and tally.kills["in a save"] == 1, tally
    assert tally.terminated >= 1 and tally.quarantined == 1, tally


@pytest.mark.slow
def test_a_tortured_run_with_an_environment_ends_in_the_same_bits(
    tiny_policy, tmp_path
):
    cache = str(jax.config.jax_compilation_cache_dir)
    model = str(tiny_policy.folder)
    torture = Torture(tmp_path, model=model, cache=cache, seed=1, options=PLAYED)
    torture.kill_in_a_step()
    torture.kill_in_a_save()
    torture.end()
    assert torture.tally.kills.total() == 2 and torture.tally.ended >= 1, torture.tally
