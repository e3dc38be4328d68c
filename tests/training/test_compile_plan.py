"""A run compiled from its configuration: what it needs, and what is refused."""

import io
import json
import pathlib

import pytest
import rich.console

from grpo_jax.config import MeshConfig, TrainConfig
from grpo_jax.planning.table import print_plan
from grpo_jax.rollout import _programs as programs
from grpo_jax.training.compile_plan import compile_plan


def run_of(folder, **changes):
    values = {
        "prompts_per_step": 4,
        "group_size": 2,
        "max_prompt_tokens": 16,
        "max_new_tokens": 40,
        "eval_every": 0,
        "mesh": MeshConfig(data=1, fsdp=2),
    }
    return TrainConfig(model=str(folder), **values | changes)


@pytest.fixture(scope="module")
def plan(tiny_policy):
    said = []
    made = compile_plan(run_of(tiny_policy.folder), "cpu", announce=said.append)
    return made | {"said": said}


def test_every_program_of_a_step_is_compiled(plan):
    rows = plan["compiled"]["programs"]
    names = [(row["phase"], row["program"]) for row in rows]
    sampling = ["gather", "prepare", "prefill", "widen", "decode"]
    learning = [("score", "score"), ("update", "update")]
    assert names == [("rollout", name) for name in sampling] + learning
    assert plan["said"] == [f"compiling {phase}: {name}" for phase, name in names]
    assert list(plan["compiled"]["phases"]) == list(plan["phases"])


def test_the_peak_is_that_of_the_estimate_up_to_a_factor(plan):
    for name, sizes in plan["compiled"]["phases"].items():
        assert 0.4 < sizes["ratio"] < 2.5, (name, sizes)
    assert plan["compiled"]["fits"] is None  # the memory of a CPU is not known
    assert plan["compiled"]["floor"] is None


def test_the_loop_over_tokens_counts_for_all_tokens(plan):
    rows = {row["program"]: row for row in plan["compiled"]["programs"]}
    # The head for each of 40 tokens of 8 sequences on two devices, and the layers.
    config = json.loads(pathlib.Path(plan["model"], "config.json").read_text())
    head = 2 * 40 * 8 // 2 * config["hidden_size"] * config["vocab_size"]
    assert head < rows["decode"]["flops"] < 40 * head
    assert rows["gather"]["received"] > 0 and rows["update"]["received"] > 0


def test_a_plan_with_compiled_programs_is_shown_and_is_json(plan):
    out = io.StringIO()
    print_plan(plan, console=rich.console.Console(file=out, width=200))
    text = out.getvalue()
    assert "compiled for cpu" in text and "rollout: decode" in text
    assert "all-reduce" in text or "reduce-scatter" in text
    assert json.loads(json.dumps(plan)) == plan


def test_weights_that_cannot_be_prepared_end_the_sampler_and_no_more(
    tiny_policy, monkeypatch
):
    def refuse(*given, **options):
        raise RuntimeError("17 of 16 GiB")

    monkeypatch.setattr(programs.changed, "lower", refuse, raising=False)
    run = run_of(tiny_policy.folder, remat="none")
    rows = compile_plan(run, "cpu")["compiled"]["programs"]
    names = [row["program"] for row in rows]
    assert names == ["gather", "prepare", "score", "update"]
    assert [row.get("error") for row in rows] == [None, "17 of 16 GiB", None, None]


def test_a_slice_has_the_devices_of_its_name(tiny_policy):
    with pytest.raises(ValueError, match="has 8 devices, got 4; leave --devices out"):
        compile_plan(run_of(tiny_policy.folder), "v5e:2x4", devices=4)


def test_what_plan_refuses_is_not_compiled(tiny_policy):
    run = run_of(tiny_policy.folder, max_new_tokens=10**6)
    with pytest.raises(ValueError, match="no room for a prompt"):
        compile_plan(run, "cpu")


def test_pmap_is_refused_with_what_is_the_same(tiny_policy):
    run = run_of(tiny_policy.folder, mesh=MeshConfig(data=2, fsdp=1, mode="pmap"))
    with pytest.raises(ValueError, match="'jit' with data -1 and fsdp 1"):
        compile_plan(run, "cpu")
