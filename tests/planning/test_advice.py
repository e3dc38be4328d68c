"""Plans from a config.json and the sizes of a mesh that is not here; memory savings."""

import dataclasses
import json
import shutil

import jax
import pytest

from grpo_jax import cli
from grpo_jax.config import MeshConfig, ObjectiveConfig, SamplingConfig, TrainConfig
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.advice import (
    _memory_savings,
    _refused,
    make_plan,
    memory_warning,
)
from grpo_jax.planning.memory import estimate
from grpo_jax.planning.resolve import GIB, USABLE
from grpo_jax.weights.pretrained import load_pretrained, read_model_config


@pytest.fixture(scope="module")
def folder(tiny_policy, tmp_path_factory):
    """A folder with nothing but the configuration of a model."""
    path = tmp_path_factory.mktemp("plan")
    shutil.copy(tiny_policy.folder / "config.json", path)
    return path


def planned(capsys, *arguments):
    cli._dispatch(["plan", *map(str, arguments)])
    return capsys.readouterr().out


def test_a_config_alone_is_planned_for_devices_that_are_not_here(
    capsys, folder, monkeypatch
):
    monkeypatch.setattr(jax, "device_count", lambda: pytest.fail("counted devices"))
    flags = ["--model", folder, "--prompts-per-step", 64, "--max-new-tokens", 64]
    flags += ["--mesh.data", 2, "--devices", 64, "--mesh.tensor", 2]
    made = json.loads(planned(capsys, *flags, "--device", "v5e", "--json"))
    assert made["mesh"] == {"data": 2, "fsdp": 16, "tensor": 2}
    assert made["compute_dtype"] == "bfloat16"
    assert made["usable"] == int(USABLE * 16 * GIB) and made["fits"] is True
    always = sum(made["always"].values())
    update = sum(made["phases"]["update"].values())
    assert made["totals"]["update"] == always + update <= made["peak"]


def test_sizes_that_are_given_count_the_devices(folder):
    base = {"model": str(folder), "prompts_per_step": 16}
    made = make_plan(TrainConfig(**base, mesh=MeshConfig(data=4, fsdp=4)))
    assert made["mesh"] == {"data": 4, "fsdp": 4, "tensor": 1}
    here = make_plan(TrainConfig(**base))
    assert here["mesh"]["fsdp"] == jax.device_count()
    assert (here["usable"], here["fits"], here["compute_dtype"]) == (
        None,
        None,
        "float32",
    )


def test_the_type_of_a_slice_says_how_many_devices(folder):
    mesh = MeshConfig(data=-1, fsdp=1)
    config = TrainConfig(model=str(folder), prompts_per_step=8, mesh=mesh)
    by_type = make_plan(config, device="v5p-16")
    assert by_type["mesh"]["data"] == 8
    assert by_type == make_plan(config, device="v5p", devices=8)


def test_the_table_shows_every_size_and_what_to_turn_where_it_does_not_fit(
    capsys, folder
):
    flags = ["--model", folder, "--mesh.fsdp", 1, "--max-new-tokens", 64]
    config = TrainConfig(model=str(folder), mesh=MeshConfig(fsdp=1), max_new_tokens=64)
    needed = make_plan(config)
    shown = planned(capsys, *flags)
    for name in [*needed["always"], *needed["phases"], *needed["phases"]["update"]]:
        assert name in shown
    assert f"{needed['totals']['update'] / GIB:.2f}" in shown
    assert "What would save" in shown and "fit" not in shown
    small = 0.5 * needed["peak"] / GIB / USABLE
    shown = planned(capsys, *flags, "--remat", "none", "--device-memory-gib", small)
    assert "does not fit" in shown and "--remat layer" in shown


def test_a_plan_says_what_a_run_would_refuse(capsys, folder):
    told = "would be refused: max_new_tokens 128 leaves no room"
    flags = ["--model", folder, "--mesh.fsdp", 1, "--max-new-tokens"]
    config = TrainConfig(model="tiny", sampling=SamplingConfig(stop_ids=(263, 264)))
    assert "stop_ids 264: the model's" in _refused(read_model_config(folder), config)
    objective = ObjectiveConfig(router_aux_loss_coef=0.1)
    balanced = TrainConfig(model="tiny", max_new_tokens=8, objective=objective)
    refused = _refused(read_model_config(folder), balanced)
    assert "needs a model with experts" in refused
    with pytest.raises(SystemExit, match="2"):
        planned(capsys, *flags, 128)
    assert told in " ".join(capsys.readouterr().out.split())
    assert json.loads(planned(capsys, *flags, 127, "--json"))["refused"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "v99"], "'v99' is not known; use one of v4, v5e"),
        (["--device", "v99-8"], "'v99-8' is not known; .* such as v5p-16"),
        (["--device", "h100-8"], "'h100-8' is not known"),
        (["--device", "v5p-7"], "counts cores, 2 to a device.*; v5p-8 is the next"),
        (["--device", "v5p-16", "--devices", "16"], "a v5p-16 has 8 devices, got 16"),
        (["--devices", "12", "--mesh.data", "8"], "does not fit 12 devices"),
        (["--mesh.fsdp", "64"], "cannot be split over fsdp = 64 devices; 32 would"),
        (["--mesh.fsdp", "3"], "16 prompts per update cannot .* use 15"),
    ],
)
def test_what_cannot_be_planned_is_told(capsys, folder, flags, message):
    prompts = ["--prompts-per-step", "64"] if "64" in flags else []
    with pytest.raises(ValueError, match=message):
        planned(capsys, "--model", folder, *prompts, *flags)


def edited(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a damaged tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "a layer too many": lambda folder: edited(
        folder / "config.json", num_hidden_layers=3
    ),
    "another vocabulary": lambda folder: edited(folder / "config.json", vocab_size=99),
    "ends that are no ids": lambda folder: edited(
        folder / "generation_config.json", eos_token_id=["<end>"]
    ),
    "no option that is known": lambda folder: edited(
        folder / "config.json", hidden_act="tanh"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_plan_refuses_what_loading_refuses_in_the_same_words(
    tiny_policy, tmp_path, damage
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy.folder, folder)
    damage(folder)
    with pytest.raises(ValueError) as loading:
        load_pretrained(folder)
    with pytest.raises(ValueError) as planning:
        make_plan(TrainConfig(model=str(folder), mesh=MeshConfig(fsdp=1)))
    assert str(planning.value) == str(loading.value)


CONFIG = TrainConfig(
    model="tiny",
    prompts_per_step=8,
    group_size=4,
    max_prompt_tokens=16,
    max_new_tokens=32,
)


def imagined(data, fsdp, tensor):
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return meshes.abstract_mesh(config, data * fsdp * tensor)


def test_flags_save_what_they_say_and_the_best_comes_first(tiny_policy):
    model = tiny_policy.model.config
    config, mesh = CONFIG, imagined(1, 2, 1)
    found = _memory_savings(model, config, mesh)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    before = estimate(model, config, mesh).peak
    layer = dataclasses.replace(model, remat="layer")
    assert found["--remat layer"] == before - estimate(layer, config, mesh).peak
    small = dataclasses.replace(config, microbatch_size=8)
    assert found["--microbatch-size 8"] == before - estimate(model, small, mesh).peak
    more = estimate(model, config, imagined(1, 4, 1)).peak
    name = "--mesh.data 1 --mesh.fsdp 4 --mesh.tensor 1 on 4 devices"
    assert found[name] == before - more
    # Nine columns of key heads cannot be split over tensor 4; 8 prompts not over 16.
    assert not any(
        "fsdp 16" in name for name in _memory_savings(model, config, imagined(1, 8, 1))
    )


def test_a_run_that_does_not_fit_gets_the_flags_that_save_most(tiny_policy):
    model = tiny_policy.model.config
    config, mesh = CONFIG, imagined(1, 1, 1)
    needed = estimate(model, config, mesh).peak
    assert memory_warning(model, config, mesh, limit=needed) is None
    assert memory_warning(model, config, mesh, limit=None) is None
    first = next(iter(_memory_savings(model, config, mesh)))
    assert first in memory_warning(model, config, mesh, limit=needed - 1)
