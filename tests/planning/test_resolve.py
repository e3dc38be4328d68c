"""Each "auto" is resolved by what fits into the memory of a device."""

import dataclasses

import pytest

from grpo_jax.config import MeshConfig, TrainConfig
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning import resolve as resolve_module
from grpo_jax.planning.memory import activation_bytes, estimate
from grpo_jax.planning.resolve import GIB, resolve_auto


@pytest.fixture
def model(tiny_policy):
    return tiny_policy.model.config


def make_config(**changes):
    values = {
        "model": "tiny",
        "prompts_per_step": 8,
        "group_size": 4,
        "max_prompt_tokens": 16,
        "max_new_tokens": 32,
    }
    return TrainConfig(**(values | changes))


def made(model, sizes=(1, 1, 1), **changes):
    config = make_config(**changes)
    return estimate(model, config, imagined(*sizes))


def imagined(data, fsdp, tensor):
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return meshes.abstract_mesh(config, data * fsdp * tensor)


def resolve(model, limit, sizes=(1, 8, 1), **changes):
    config = make_config(**changes)
    return resolve_auto(model, config, imagined(*sizes), limit=limit)


def test_as_little_is_computed_again_as_the_memory_allows(model):
    def needs(remat):
        return made(dataclasses.replace(model, remat=remat), (1, 8, 1)).total("update")

    for limit, remat in [
        (needs("none"), "none"),
        (needs("none") - 1, "dots"),
        (needs("dots") - 1, "layer"),
        (1, "layer"),
        (None, "dots"),  # of 2 GiB
    ]:
        chosen, config = resolve(model, limit)
        assert chosen.remat == config.remat == remat
    # What is asked for is taken.
    assert resolve(model, 1, remat="none")[0].remat == "none"


def test_without_a_known_memory_two_gib_of_activations_may_be_kept(model):
    config = make_config(max_new_tokens=2000, prompts_per_step=64)
    mesh = imagined(1, 1, 1)
    none = dataclasses.replace(model, remat="none")
    dots = dataclasses.replace(model, remat="dots")
    assert activation_bytes(none, config, mesh) > 2 * GIB
    assert activation_bytes(dots, config, mesh) < 2 * GIB
    assert resolve_auto(model, config, mesh, limit=None)[0].remat == "dots"


def test_the_sampler_gathers_its_parameters_if_they_fit(model):
    room = made(model, (1, 8, 1)).total("rollout")
    for limit, sampler in [(room, "gathered"), (room - 1, "split"), (None, "gathered")]:
        assert resolve(model, limit)[1].mesh.sampler == sampler
    asked = MeshConfig(sampler="gathered")
    assert resolve(model, 1, mesh=asked)[1].mesh.sampler == "gathered"


@pytest.mark.parametrize(
    ("fast", "large", "devices", "asked", "expected"),
    [
        (True, 0, 1, "auto", "bfloat16"),
        (False, 0, 1, "auto", "float32"),
        (True, 10**9, 1, "auto", "float32"),
        (True, 0, 2, "auto", "float32"),
        (True, 0, 1, "float32", "float32"),
    ],
)
def test_a_cpu_with_fast_bfloat16_updates_large_models_in_it(
    fast, large, devices, asked, expected, model, monkeypatch
):
    monkeypatch.setattr(resolve_module, "has_bfloat16_products", lambda: fast)
    monkeypatch.setattr(resolve_module, "_LARGE", large)
    mesh = imagined(devices, 1, 1)
    config = make_config(compute_dtype=asked)
    assert resolve_module.for_updates(model, config, mesh).dtype == expected
    assert resolve_module.compute_dtype(config) == "float32"
