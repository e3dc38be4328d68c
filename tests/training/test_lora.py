"""Adapters in training: one frozen base, and all that is saved or exported of them."""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from grpo_jax import cli, train
from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.checkpointing.checksum import params_sha256
from grpo_jax.config import (
    CheckpointConfig,
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReportConfig,
    SamplingConfig,
    TrainConfig,
)
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.lora import lora_axes
from grpo_jax.parallel import mesh as meshes
from grpo_jax.training import _run_dir as directories
from grpo_jax.training._policy import load_policy
from grpo_jax.training._reference import References
from grpo_jax.training.learner import Learner
from grpo_jax.training.restore import restore, restore_adapter
from grpo_jax.training.state import TrainState, state_items
from grpo_jax.weights.adapter import load_adapter
from grpo_jax.weights.pretrained import load_pretrained

ROWS = [{"prompt": f"say {i}", "wanted": "aeiou"[i % 5]} for i in range(8)]
TARGETS = ("q", "v", "down")
LORA = LoraConfig(rank=2, alpha=6.0, targets=TARGETS)


def share(completions, wanted, **_):
    """The share of letters that sort below the wanted one."""
    return [
        sum(c <= w for c in text) / max(len(text), 1)
        for text, w in zip(completions, wanted, strict=True)
    ]


def stopping(completions, wanted, trainer_state, **_):
    if trainer_state.global_step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return share(completions, wanted)


stopping.__name__ = "share"


@pytest.fixture(scope="module")
def run(tiny_policy, tmp_path_factory):
    """The configuration and the result of a run of three steps on eight devices."""
    config = TrainConfig(
        model=str(tiny_policy.folder),
        run_dir=str(tmp_path_factory.mktemp("lora") / "run"),
        steps=3,
        prompts_per_step=8,
        group_size=2,
        max_prompt_tokens=16,
        max_new_tokens=4,
        eval_prompts=0,
        lora=LORA,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        sampling=SamplingConfig(stop_ids=tuple(range(0, 264, 5))),
        optimizer=OptimizerConfig(learning_rate=3e-2),
        checkpoint=CheckpointConfig(every=1, keep=3),
        report=ReportConfig(completions_every=9),
    )
    return config, train(config, dataset=ROWS, rewards=[share])


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def assert_same_bits(one, two):
    one, two = flat(one), flat(two)
    assert one.keys() == two.keys()
    for path, values in one.items():
        assert values.dtype == two[path].dtype, path
        assert np.asarray(values).tobytes() == np.asarray(two[path]).tobytes(), path


def test_a_run_moves_the_adapted_kernels_and_nothing_else(run, tiny_policy):
    _, result = run
    base, merged = flat(tiny_policy.params), flat(result.params)
    moved = {path for path in base if (np.asarray(merged[path]) != base[path]).any()}
    assert moved == {
        "layers/attn/q/kernel",
        "layers/attn/v/kernel",
        "layers/mlp/down/kernel",
    }


def test_the_sampler_has_the_adapters_and_the_reference_has_none(run):
    _, result = run
    kl = [line["kl"] for line in result.history]
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[2] > kl[1] > 1e-6
    assert max(line["sampler_logp_diff/max"] for line in result.history) < 1e-4


def test_checkpoints_hold_adapters_alone(run):
    _, result = run
    folder = result.run_dir / "checkpoints" / "3"
    listed = ocp.load_checkpointables(str(folder), {"meta": None})["meta"]["arrays"]
    factors = {
        f"layers/{place}/{factor}"
        for place in ("attn/q", "attn/v", "mlp/down")
        for factor in "ab"
    }
    arrays = {path: tuple(one["shape"]) for path, one in listed.items()}
    assert {p for p in arrays if p.startswith("params/")} == {
        f"params/{path}" for path in factors
    }
    # Each factor with its two moments; the rest are counters.
    assert len([shape for shape in arrays.values() if shape]) == 3 * len(factors)
    # The list is what is there: no folder of Orbax is named after the base.
    names = [path.name for path in folder.rglob("*")]
    assert not [name for name in names if "kernel" in name or "embed" in name]


def test_what_is_exported_restored_and_returned_is_the_merged_model(
    run, meshes_of, tiny_policy
):
    config, result = run
    exported = load_pretrained(result.run_dir / "export")
    assert_same_bits(exported.params, result.params)
    assert params_sha256(result.params) == result.summary["params_sha256"]
    for mesh in (None, meshes_of(1, 4, 2)):
        restored = restore(result.run_dir, mesh=mesh)
        assert_same_bits(restored.params, result.params)
        assert restored.model.config == tiny_policy.model.config
    # The export's texts end where the run let them end, too.
    ends = exported.config.eos_token_ids
    assert ends == exported.tokenizer.stop_ids
    assert {*config.sampling.stop_ids} < {*ends}
    plain = dataclasses.replace(exported.config, eos_token_ids=ends[-1:])
    assert restored.model == Decoder(plain)


def test_another_base_than_the_adapters_were_trained_on_is_refused(run, tmp_path):
    _, result = run
    copy = shutil.copytree(result.run_dir, tmp_path / "run")
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["data"]["weights"]["final_norm/scale"] = "0"
    file.write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"(?s)another model.*weights.final_norm/scale"
    ):
        restore(copy)


def test_base_and_exported_adapters_compute_what_the_merged_model_does(
    run, tiny_policy, capsys
):
    _, result = run
    cli._export(run_dir=result.run_dir, adapter=True)
    folder = result.run_dir / "adapter"
    assert f"adapters of step 3 written to {folder}" in capsys.readouterr().out
    adapter = load_adapter(folder, tiny_policy.model.config)
    assert (adapter.rank, adapter.alpha, adapter.targets) == (2, 6.0, TARGETS)
    assert adapter.base_name == str(tiny_policy.folder)
    config = dataclasses.replace(tiny_policy.model.config, lora_scale=adapter.scale)
    model, tokens = Decoder(config), np.arange(24, dtype=np.int32).reshape(2, 12)

    @jax.jit
    def hidden(variables):
        return model.apply(variables, tokens, np.array([12, 12]), method=model.forward)

    base = hidden({"params": tiny_policy.params})
    merged = hidden({"params": jax.tree.map(np.asarray, result.params)})
    both = hidden({"params": tiny_policy.params, "lora": adapter.params})
    np.testing.assert_allclose(both, merged, atol=1e-5)
    assert jnp.abs(merged - base).max() > 1e-2


def test_a_stopped_run_ends_in_the_same_bits(run, tmp_path):
    config, result = run
    config = dataclasses.replace(config, run_dir=str(tmp_path / "other"))
    halted = train(config, dataset=ROWS, rewards=[stopping])
    assert (halted.summary["status"], halted.summary["steps"]) == ("preempted", 1)
    resumed = train(config, dataset=ROWS, rewards=[share])
    assert resumed.summary["params_sha256"] == result.summary["params_sha256"]
    one, two = (
        Checkpoints(p / "checkpoints", CheckpointConfig()).restore_params()[1]
        for p in (resumed.run_dir, result.run_dir)
    )
    assert_same_bits(one, two)


def test_a_run_that_trained_all_weights_has_no_adapters_to_export(tmp_path):
    config = TrainConfig()
    directories.check_config(tmp_path, config)
    checkpoints = Checkpoints(tmp_path / "checkpoints", config.checkpoint)
    params = {"embed": {"embedding": jnp.ones(2)}}
    state = TrainState(step=jnp.int32(1), params=params, opt_state=())
    checkpoints.save(1, state_items(state), {}, wait=True)
    with pytest.raises(ValueError, match="has no adapters: it trained all weights"):
        restore_adapter(tmp_path)


# From here on: the parts of a run by themselves.


def make_learner(tools, policy, place, **changes):
    config = tools.make_config(
        model=str(policy.folder),
        lora=LORA,
        objective=ObjectiveConfig(kl_coef=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        **changes,
    )
    loaded = load_policy(config, place)
    learner = Learner(loaded.model, loaded.params, config, place, base=loaded.base)
    return loaded, learner


@contextlib.contextmanager
def on(mesh):
    with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
        yield


def live_buffers():
    """Bytes and shape of what lies on the devices, by its address."""
    gc.collect()
    return {
        shard.data.unsafe_buffer_pointer(): (shard.data.nbytes, shard.data.shape)
        for array in jax.live_arrays()
        if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        for shard in array.addressable_shards
    }


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_the_base_is_in_memory_once(mode, tiny_policy, tools, meshes_of):
    batch = tools.make_batch(vocab=256)
    mesh = meshes_of(1, 1, 1)
    before = live_buffers()
    with on(mesh):
        policy, learner = make_learner(
            tools, tiny_policy, mesh, mesh=MeshConfig(fsdp=1, mode=mode)
        )
        for _ in range(2):
            learner.update(batch)
        after = {p: v for p, v in live_buffers().items() if p not in before}
    assert learner.has_reference
    embeddings = [shape for _, shape in after.values() if shape == (264, 32)]
    assert len(embeddings) == 1
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(policy.base))
    adapters = sum(leaf.nbytes for leaf in jax.tree.leaves(learner.params))
    total = sum(size for size, _ in after.values())
    # The adapters with two moments, and a few counters and constants.
    assert base + 3 * adapters <= total < base + 3 * adapters + 4096
    # Policy, state and reference speak of the same arrays, and none was given away.
    for leaf, other, third in zip(
        *map(jax.tree.leaves, (policy.base, learner.base)),
        jax.tree.leaves(learner.reference_on_devices()["params"]),
        strict=True,
    ):
        assert leaf is other is third and not leaf.is_deleted()


def test_the_optimizer_knows_adapters_alone(tiny_policy, tools, meshes_of):
    mesh = meshes_of(1, 1, 1)
    with on(mesh):
        _, learner = make_learner(tools, tiny_policy, mesh)
    adapters = [leaf.shape for leaf in jax.tree.leaves(learner.params)]
    moments = [
        leaf.shape for leaf in jax.tree.leaves(learner.state_on_devices().opt_state)
    ]
    assert len(adapters) == 2 * len(TARGETS)
    assert sorted(s for s in moments if s) == sorted(2 * adapters)


def updated(tools, policy, place, batch, **changes):
    with on(place):
        loaded, learner = make_learner(tools, policy, place, **changes)
        fresh = jax.tree.map(np.asarray, learner.params)
        metrics = learner.update(batch(place))
        trained = learner.params
        return fresh, trained, loaded.merged(trained), metrics, loaded.model


def test_meshes_and_pmap_change_nothing(tiny_policy, tools, meshes_of, assert_close):
    plain = tools.make_batch(prompts=8, vocab=256)
    spread = lambda mesh: meshes.to_mesh(mesh, jax.tree.map(np.asarray, plain))  # noqa: E731
    one = updated(tools, tiny_policy, meshes_of(1, 1, 1), spread, prompts_per_step=8)
    for shape, mode in (((2, 2, 2), "jit"), ((8, 1, 1), "pmap")):
        config = MeshConfig(data=8 if mode == "pmap" else 2, fsdp=-1, mode=mode)
        mesh = meshes_of(*shape)
        other = updated(
            tools, tiny_policy, mesh, spread, prompts_per_step=8, mesh=config
        )
        fresh, trained, merged, metrics, model = other
        assert_same_bits(fresh, one[0])
        # Adam's first update is the sign of the gradient, whatever its size.
        assert metrics["grad_norm"] == pytest.approx(one[3]["grad_norm"], rel=1e-4)
        assert metrics["loss"] == pytest.approx(one[3]["loss"], rel=1e-4)
        assert_close(trained, one[1], rtol=1e-3)
        assert_close(merged, one[2], rtol=1e-3)
        if mode == "jit":
            places = meshes.parameter_shardings(
                lora_axes(model, trained), trained, mesh
            )
            for leaf, place in zip(
                *map(jax.tree.leaves, (trained, places)), strict=True
            ):
                assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
            # [L, embed, rank]: the width is split over fsdp.
            a = trained["layers"]["attn"]["q"]["a"]
            assert a.addressable_shards[0].data.shape == (2, 16, 2)


def test_a_frozen_base_is_kept_in_the_compute_dtype(tiny_policy, tools, meshes_of):
    mesh = meshes_of(1, 1, 1)
    config = tools.make_config(
        model=str(tiny_policy.folder), lora=LORA, compute_dtype="bfloat16"
    )
    policy = load_policy(config, mesh)
    for path, leaf in flat(policy.base).items():
        # Norms multiply in float32.
        assert leaf.dtype == ("float32" if path.endswith("scale") else "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(policy.params)} == {"float32"}
    merged = flat(policy.merged(policy.params))
    assert {leaf.dtype.name for leaf in merged.values()} == {"float32"}
    for path, leaf in flat(tiny_policy.params).items():
        rounded = leaf if path.endswith("scale") else leaf.astype(jnp.bfloat16)
        np.testing.assert_array_equal(merged[path], rounded.astype(jnp.float32))


def test_adapters_that_do_not_fit_the_model_are_refused(tiny_policy, tools, meshes_of):
    wide = dataclasses.replace(LORA, rank=17)
    config = tools.make_config(model=str(tiny_policy.folder), lora=wide)
    with pytest.raises(ValueError, match=r"at most 16, got 17: .* 'v' is 32 x 16"):
        load_policy(config, meshes_of(1, 1, 1))
    with pytest.raises(ValueError, match="targets"):
        LoraConfig(rank=2, targets=("q", "embed"))


def test_a_renewed_reference_is_base_with_adapters_of_then(
    tiny_policy, tools, meshes_of, tmp_path
):
    mesh = meshes_of(1, 1, 1)
    objective = ObjectiveConfig(kl_coef=0.1, reference_every=2)
    config = tools.make_config(objective=objective, lora=LORA)
    references = References(tmp_path, config, report=pytest.fail)
    with on(mesh):
        policy, learner = make_learner(tools, tiny_policy, mesh)
        assert learner.reference_on_devices().keys() == {"params"}
        moved = jax.tree.map(lambda leaf: leaf + 0.5, learner.params)
        learner.set_state(learner.state_on_devices().replace(params=moved))
        references.refresh_after(1, learner)
        assert learner.reference_on_devices().keys() == {"params"}  # not due
        references.refresh_after(2, learner)
        assert_same_bits(learner.reference_on_devices()["lora"], moved)
        # A copy: the state's own arrays are donated to the next update.
        one, two = learner.reference_on_devices()["lora"], learner.params
        for kept, own in zip(*map(jax.tree.leaves, (one, two)), strict=True):
            assert kept is not own
        _, another = make_learner(tools, tiny_policy, mesh)
        references.restore_at(3, another)
    assert_same_bits(another.reference_on_devices()["lora"], moved)
    assert another.reference_on_devices()["params"] is another.base
    names = [path.name for path in tmp_path.rglob("*")]
    assert not [name for name in names if "kernel" in name or "embed" in name]
