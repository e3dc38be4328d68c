"""A policy comes back from a run or from files, wherever it is wanted."""

import dataclasses
import functools
import shutil
import types

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.config import CheckpointConfig, MeshConfig, TrainConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.resolve import device_memory, with_compute_dtype
from grpo_jax.training import _policy
from grpo_jax.training import _run_dir as directories
from grpo_jax.training._manifest import Origin, Record, read_manifest
from grpo_jax.training._policy import load_policy
from grpo_jax.training.restore import open_policy, restore
from grpo_jax.training.state import TrainState, state_items


def assert_same_bits(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def devices_of(tree):
    return {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}


def at_step(params, step):
    """Parameters that tell the step they were saved at."""
    return jax.tree.map(lambda leaf: leaf + jnp.float32(step / 64), params)


@pytest.fixture(scope="module")
def run(tiny_policy, tmp_path_factory):
    """A run with checkpoints at steps 5 and 10, saved from a mesh of 8 devices."""
    path = tmp_path_factory.mktemp("policy") / "run"
    path.mkdir()
    config = TrainConfig(
        model=str(tiny_policy.folder),
        mesh=MeshConfig(fsdp=4, tensor=2),
        checkpoint=CheckpointConfig(keep=9),
        seed=3,
    )
    directories.check_config(path, config)
    mesh, model = meshes.make_mesh(config.mesh), tiny_policy.model
    place = meshes.parameter_shardings(param_axes(model), abstract_params(model), mesh)
    checkpoints = Checkpoints(path / "checkpoints", config.checkpoint)
    for step in (5, 10):
        params = jax.device_put(at_step(tiny_policy.params, step), place)
        state = TrainState(step=jnp.int32(step), params=params, opt_state=(params,))
        checkpoints.save(step, state_items(state), {})
    checkpoints.close()
    return path


def test_the_newest_step_comes_back_on_the_default_device(run, tiny_policy):
    restored = restore(run)
    assert restored.step == 10
    assert_same_bits(restored.params, at_step(tiny_policy.params, 10))
    assert devices_of(restored.params) == {jax.devices()[0]}
    assert restored.config == directories.read_config(run)
    ids = restored.tokenizer.encode_prompt("1+1=")
    assert ids == tiny_policy.tokenizer.encode_prompt("1+1=")


@pytest.mark.parametrize("path", [str, lambda p: p])
def test_an_older_step_comes_back_by_its_number(run, tiny_policy, path):
    restored = restore(path(run), 5)
    assert restored.step == 5
    assert_same_bits(restored.params, at_step(tiny_policy.params, 5))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 1, 2), (1, 1, 1)])
def test_the_parameters_go_to_any_mesh(run, tiny_policy, meshes_of, sizes):
    mesh = meshes_of(*sizes)
    restored = restore(run, mesh=mesh)
    assert_same_bits(restored.params, at_step(tiny_policy.params, 10))
    assert devices_of(restored.params) == set(mesh.devices.flat)
    model = restored.model
    place = meshes.parameter_shardings(param_axes(model), abstract_params(model), mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored.params) == place
    # What lies on one device is its share: the embedding is split over fsdp, tensor.
    rows, width = restored.params["embed"]["embedding"].shape
    shard = restored.params["embed"]["embedding"].addressable_shards[0].data
    assert shard.shape == (rows // sizes[2], width // sizes[1])


def test_a_restored_model_computes_what_its_parameters_say(run, tiny_policy):
    restored = restore(run)
    tokens, lengths = jnp.arange(12).reshape(2, 6), jnp.array([6, 4])

    @functools.partial(jax.jit, static_argnums=0)
    def hidden(model, params):
        variables = {"params": params}
        return model.apply(variables, tokens, lengths, method=model.forward)

    expected = hidden(tiny_policy.model, at_step(tiny_policy.params, 10))
    np.testing.assert_array_equal(hidden(restored.model, restored.params), expected)


def test_the_optimizer_is_not_needed(run, tiny_policy, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "10" / "optimizer")
    restored = restore(copy)
    assert_same_bits(restored.params, at_step(tiny_policy.params, 10))


def test_a_step_that_does_not_exist_lists_those_that_do(run):
    with pytest.raises(ValueError, match=r"no checkpoint 7 in .* exist: \[5, 10\]"):
        restore(run, 7)


def test_a_folder_without_a_run_or_checkpoints_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no run"):
        restore(tmp_path)
    directories.check_config(tmp_path, TrainConfig())
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        restore(tmp_path)


def test_a_policy_is_opened_from_a_run_or_from_a_model(run, tiny_policy):
    opened = open_policy(run_dir=run, step=5)
    assert opened.step == 5
    assert_same_bits(opened.params, at_step(tiny_policy.params, 5))
    opened = open_policy(model=str(tiny_policy.folder))
    assert opened.step is None
    assert_same_bits(opened.params, tiny_policy.params)
    assert opened.config == TrainConfig(model=str(tiny_policy.folder))


def test_a_run_keeps_to_the_commit_of_the_hub_with_which_it_began(
    tiny_policy, tmp_path, meshes_of, monkeypatch
):
    hub, newest = tmp_path / "snapshots", ["first"]
    shutil.copytree(tiny_policy.folder, hub / "first")
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, *, revision, allow_patterns: hub / (revision or newest[-1]),
    )
    config, mesh = TrainConfig(model="someone/model"), meshes_of(1, 1, 1)
    policy = load_policy(config, mesh)
    assert policy.commit == "first"
    path = tmp_path / "run"
    path.mkdir()
    directories.check_config(path, config)
    checkpoints = Checkpoints(path / "checkpoints", config.checkpoint)
    state = TrainState(step=jnp.int32(1), params=policy.params, opt_state=())
    checkpoints.save(1, state_items(state), {}, wait=True)
    Record(path, config.seed, mesh, Origin(commit=policy.commit)).write("preempted")
    newest.append("second")  # pushed since then; no folder here
    with pytest.raises(ValueError, match="no config.json"):
        load_policy(config, mesh)
    origin = Origin.read(read_manifest(path))
    assert load_policy(config, mesh, origin).commit == "first"
    assert_same_bits(restore(path).params, tiny_policy.params)


def test_exactly_one_of_run_and_model_is_needed(run, tiny_policy):
    for arguments in ({}, {"run_dir": run, "model": str(tiny_policy.folder)}):
        with pytest.raises(ValueError, match="give either --run-dir or --model"):
            open_policy(**arguments)


def test_a_model_is_loaded_onto_the_mesh(tiny_policy, meshes_of):
    mesh = meshes_of(1, 4, 2)
    policy = load_policy(TrainConfig(model=str(tiny_policy.folder)), mesh)
    assert_same_bits(policy.params, tiny_policy.params)
    model = policy.model
    place = meshes.parameter_shardings(param_axes(model), abstract_params(model), mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, policy.params) == place
    assert policy.base is None
    # No choice is left open.
    assert (policy.config.remat, policy.config.mesh.sampler) == ("dots", "gathered")
    assert policy.model.config.remat == "dots" and policy.warning is None


def test_a_model_that_the_mesh_does_not_divide_is_refused(tiny_policy, meshes_of):
    # Two key/value heads of 8 numbers are 16 columns: 3 devices cannot share them.
    with pytest.raises(ValueError, match="cannot be split over tensor = 3 devices"):
        load_policy(TrainConfig(model=str(tiny_policy.folder)), meshes_of(1, 1, 3))


def test_a_model_that_will_not_fit_comes_with_advice(
    tiny_policy, meshes_of, monkeypatch
):
    mesh = meshes_of(1, 1, 1)
    monkeypatch.setattr(_policy, "device_memory", lambda mesh: 2**20)
    policy = load_policy(TrainConfig(model=str(tiny_policy.folder)), mesh)
    assert "but only 0.0 are usable" in policy.warning
    assert "--microbatch-size 8" in policy.warning
    assert policy.model.config.remat == "layer"


def test_the_memory_of_the_smallest_device_counts(meshes_of):
    def device(limit):
        return types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit})

    gib = 2**30
    mesh = types.SimpleNamespace(local_devices=[device(20 * gib), device(15 * gib)])
    assert device_memory(mesh) == 13 * gib  # whole ones of 0.92 x 15
    assert device_memory(meshes_of(1, 1, 1)) is None


def test_the_trained_policy_is_ready_for_export(tiny_policy, meshes_of):
    config = TrainConfig(model=str(tiny_policy.folder))
    policy = load_policy(config, meshes_of(1, 1, 1))
    exported = policy.pretrained(policy.params)
    assert_same_bits(exported.params, tiny_policy.params)
    assert exported.tokenizer is policy.tokenizer


@pytest.mark.parametrize(
    ("backend", "asked", "dtype"),
    [
        ("cpu", "auto", "float32"),
        ("gpu", "auto", "bfloat16"),
        ("tpu", "auto", "bfloat16"),
        ("tpu", "float32", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
    ],
)
def test_accelerators_compute_in_bfloat16_unless_told_otherwise(
    tiny_policy, monkeypatch, backend, asked, dtype
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = TrainConfig(compute_dtype=asked)
    chosen = with_compute_dtype(tiny_policy.model.config, config)
    assert chosen.dtype == dtype


def test_a_run_changes_nothing_else_of_a_model(tiny_policy):
    before = tiny_policy.model.config
    after = with_compute_dtype(before, TrainConfig(compute_dtype="bfloat16"))
    assert after == dataclasses.replace(before, dtype="bfloat16")
    assert Decoder(after).config == after
