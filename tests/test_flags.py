"""Flags describe a configuration: any one can be written as flags and read again."""

import dataclasses
import functools
import re
import types
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import cli
from grpo_jax.config import ObjectiveConfig, SamplingConfig, TrainConfig
from grpo_jax.config.validation import to_dict
from grpo_jax.flags import TRL_NAMES, base_config


def parsed(command, *arguments):
    """The arguments with which the program would call the command."""
    given = {}
    function = vars(cli)[f"_{command}"]
    spy = functools.wraps(function)(lambda **named: given.update(named))
    with mock.patch.object(cli, f"_{command}", spy):
        cli._dispatch([command, *arguments])
    return types.SimpleNamespace(**given)


def flat(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def as_flags(config):
    """The flags of the fields in which a configuration differs from the default."""
    default = dict(flat(to_dict(TrainConfig())))
    for name, value in flat(to_dict(config)):
        if value != default[name]:
            items = value if isinstance(value, list) else [value]
            yield from (f"--{name.replace('_', '-')}", *map(str, items))


@settings(max_examples=15)
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "task": st.sampled_from(["rows.jsonl", "reasoning_gym:countdown", "1e5"]),
            "run_dir": st.sampled_from(["runs/a b", "1e-5", "null", "-"]),
            "steps": st.integers(1, 10**6),
            "seed": st.integers(0, 2**32 - 1),
            "eval_every": st.integers(1, 50),
        },
    ),
    temperature=st.floats(0.1, 2.0),
    stops=st.none() | st.lists(st.integers(0, 100), min_size=1, max_size=3),
)
def test_a_configuration_written_as_flags_is_read_again(values, temperature, stops):
    stop_ids = None if stops is None else tuple(stops)
    sampling = SamplingConfig(temperature=temperature, stop_ids=stop_ids)
    config = TrainConfig(sampling=sampling, **values)
    assert parsed("train", *as_flags(config)).run == config


def test_names_of_trl_are_no_flags_of_ours_and_their_answers_are():
    ours = {name for name, _ in flat(to_dict(TrainConfig()))}
    assert not set(TRL_NAMES) & ours
    assert set(TRL_NAMES.values()) <= ours


def test_names_of_trl_are_answered_as_the_page_says():
    page = (Path(__file__).parents[1] / "docs/trl.md").read_text(encoding="utf-8")
    table = page[page.index("## Options") : page.index("Not offered")]
    said = {}
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE):
        for name in re.findall(r"`(\w+)", row[0]):
            said.setdefault(name, []).append(row[1])
    for name, ours in TRL_NAMES.items():
        if name in said:  # `loss_type` has a row for each value, with the value alone
            assert any(f"`{ours}`" in fields for fields in said[name]), name
    # Where ours has the same name, the parser of flags finds it by itself.
    same = {name.rpartition(".")[2] for name, _ in flat(to_dict(TrainConfig()))}
    plain = {name for name in said if f"`{name}`" in table}
    others = {"run_name", "token_truncate"}  # a variable of W&B, and a value
    assert plain - set(TRL_NAMES) - same == others


@pytest.mark.parametrize("name", TRL_NAMES)
@pytest.mark.parametrize("form", ["--{}", "--{}=8"])
def test_a_flag_of_trl_is_answered_with_ours(name, form):
    ours = TRL_NAMES[name].replace("_", "-")
    for spelled in (name, name.replace("_", "-")):
        with pytest.raises(ValueError, match=f"{name} is --{ours} here"):
            base_config([form.format(spelled), "8"], prog="grpo-jax train")


def test_a_preset_replaces_the_objective_of_the_file_and_nothing_else(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\nobjective: {kl_coef: 0.5}\n")
    flags = ("--config", str(path), "--objective.preset", "dapo")
    chosen = parsed("train", *flags).run
    assert chosen.objective == ObjectiveConfig.preset("dapo")
    assert dataclasses.replace(chosen, objective=ObjectiveConfig()) == TrainConfig(
        steps=7
    )


def test_the_flags_of_plan_are_its_own_and_those_of_train():
    given = parsed("plan", *"--device h100 --steps 7 --devices 4".split())
    assert (given.device, given.devices, given.as_json) == ("h100", 4, False)
    assert given.run == TrainConfig(steps=7)
    assert parsed("plan", "--json").as_json
