"""The best step, against a search through all of them; checkpoints as a dict."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.checkpointing.corruption import DamageError
from grpo_jax.checkpointing.retention import BestStep
from grpo_jax.config import CheckpointConfig

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)


def best_of(saved, mode="max", read=None):
    def inventory_of(step):
        if read is not None:
            read.append(step)
        if isinstance(saved[step], Exception):
            raise saved[step]
        return {"metrics": {"loss": saved[step]}}

    config = CheckpointConfig(keep_best="loss", best_mode=mode)
    return BestStep(config, inventory_of, report=lambda text: None)


@given(
    saved=st.dictionaries(st.integers(0, 99), numbers, max_size=8),
    mode=st.sampled_from(["max", "min"]),
)
def test_it_is_the_first_with_the_best_value(saved, mode):
    known = [step for step in sorted(saved) if saved[step] is not None]
    sign = 1 if mode == "max" else -1
    expected = min(known, key=lambda step: (-sign * saved[step], step), default=None)
    assert best_of(saved, mode).among(list(saved)) == expected


def test_steps_that_cannot_be_read_are_passed_over():
    gone = FileNotFoundError("gone")
    errors = [DamageError("?"), gone, ValueError("old"), KeyError("metrics")]
    saved = dict(enumerate(errors)) | {9: 0.5}
    assert best_of(saved).among(list(saved)) == 9


def test_a_storage_that_is_away_is_no_answer():
    with pytest.raises(OSError, match="away"):
        best_of({1: 0.5, 2: OSError("away")}).among([1, 2])


def test_each_inventory_is_read_once_and_again_after_a_new_save():
    read = []
    best = best_of({1: 0.5, 2: 0.4}, read=read)
    for _ in range(3):
        assert best.among([1, 2]) == 1
    assert read == [1, 2]
    best.saving(2, {"loss": 0.9})
    best.among([1, 2])
    assert read == [1, 2, 2]
