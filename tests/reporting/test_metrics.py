import json
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.config.files import to_json_line, to_jsonable
from grpo_jax.reporting import _run_files, metrics


def _strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


@given(
    st.dictionaries(st.text(), st.floats() | st.integers() | st.text() | st.none()),
)
def test_json_lines_are_strict_and_come_back_with_non_finite_numbers_as_null(record):
    line = to_json_line(record)
    assert "\n" not in line and line.isascii()
    expected = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    assert _strict(line) == expected


def test_json_lines_take_numpy_and_jax_numbers_and_arrays():
    record = {
        "f32": np.float32(0.5),
        "nan": np.float64("nan"),
        "i": np.int64(3),
        "b": np.bool_(True),
        "list": np.array([1.0, math.inf]),
        "jax": jnp.float32(2.0),
        "bf16": jnp.bfloat16(1.5),
        "nested": {"none": None, "tuple": (1, np.float32(-math.inf))},
    }
    assert _strict(to_json_line(record)) == {
        "f32": 0.5,
        "nan": None,
        "i": 3,
        "b": True,
        "list": [1.0, None],
        "jax": 2.0,
        "bf16": 1.5,
        "nested": {"none": None, "tuple": [1, None]},
    }


def test_what_json_does_not_have_can_be_given_as_something_else():
    values = {"when": [Decimal("1.5"), {3}], "raw": b"x", "fine": 1}
    told = to_jsonable(values, other=str)
    assert told == {"when": ["1.5", "{3}"], "raw": "b'x'", "fine": 1}
    for value in values["when"], values["raw"]:
        with pytest.raises(TypeError, match="cannot write"):
            to_jsonable(value)


def test_json_line_refuses_what_is_no_number_or_text():
    with pytest.raises(TypeError, match="cannot write object"):
        to_json_line({"x": object()})


def test_completion_metrics_by_hand():
    lengths = np.array([[2, 8], [5, 8]])
    finished = np.array([[True, False], [True, True]])
    # all: (2 + 8 + 5 + 8) / 4 = 5.75; one of four cut; ended: 2, 5, 8 with mean 5
    assert metrics.completion_metrics(lengths, finished) == {
        "completions/mean_length": 5.75,
        "completions/min_length": 2,
        "completions/max_length": 8,
        "completions/clipped_ratio": 0.25,
        "completions/mean_terminated_length": 5,
        "completions/min_terminated_length": 2,
        "completions/max_terminated_length": 8,
    }


def test_terminated_lengths_are_zero_when_every_completion_was_cut():
    values = metrics.completion_metrics(np.full((1, 2), 8), np.zeros((1, 2), bool))
    assert values["completions/clipped_ratio"] == 1
    assert values["completions/mean_terminated_length"] == 0
    assert values["completions/max_terminated_length"] == 0


def test_reward_metrics_by_hand():
    rewards = np.array([[0.0, 2.0], [1.0, 1.0]])
    # mean 1; unbiased deviations sqrt((1 + 1) / 1) = sqrt(2) and 0; one of two flat
    values = metrics.reward_metrics(rewards)
    assert values["reward"] == 1
    assert values["reward_std"] == pytest.approx(math.sqrt(2) / 2)
    assert values["frac_reward_zero_std"] == 0.5


def test_completions_without_reward_leave_the_reward_metrics():
    nan = math.nan
    rewards = np.array(
        [[1.0, nan, 3.0], [nan, nan, 5.0], [nan, nan, nan], [4.0, 4.0, nan]]
    )
    values = metrics.reward_metrics(rewards)
    # mean of 1, 3, 5, 4, 4 is 3.4
    assert values["reward"] == pytest.approx(3.4)
    # sqrt(2) of the first group and 0 of the last; the others have no spread
    assert values["reward_std"] == pytest.approx(math.sqrt(2) / 2)
    # only the first group has rewards that differ
    assert values["frac_reward_zero_std"] == 0.75


def test_equal_rewards_are_flat_although_their_mean_rounds():
    # The standard deviation of three times 0.1 is not exactly 0 in floating point.
    assert np.full(3, 0.1).std() > 0
    values = metrics.reward_metrics(np.full((1, 3), 0.1))
    assert values["frac_reward_zero_std"] == 1


def test_no_reward_at_all_is_nan_and_written_as_null():
    values = metrics.reward_metrics(np.full((2, 2), math.nan))
    assert math.isnan(values["reward"]) and math.isnan(values["reward_std"])
    assert values["frac_reward_zero_std"] == 1
    assert _strict(to_json_line(values))["reward"] is None


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "rew', b'{"step": 3, "x": "\xe2', b"\x00"]
)
def test_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert metrics.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_damage_before_the_last_line_is_an_error_with_its_place(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        metrics.read_metrics(tmp_path)


def test_directory_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name} has no metrics.jsonl"):
        metrics.read_metrics(tmp_path)


def test_series_leaves_out_lines_without_a_number():
    history = [{"step": 0}, {"step": 1, "kl": None}, {"step": 2, "kl": 3}]
    assert _run_files.series(history, "kl") == ([2], [3.0])


def test_compile_counter_counts_new_programs_inside_its_block_only():
    x, y = np.ones(3, np.float32), np.ones(5, np.float32)

    def double(x):
        return x * 2.0

    with metrics.CompileCounter() as counter:
        jitted = jax.jit(double)
        jitted(x)
        assert counter.metrics()["compile/count"] == 1
        jitted(x)
        assert counter.metrics()["compile/count"] == 1
        jitted(y)
        assert counter.metrics()["compile/count"] == 2
    jitted(np.ones(7, np.float32))
    assert counter.metrics()["compile/count"] == 2
