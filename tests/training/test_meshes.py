"""A run is the same on every mesh: its numbers, its tokens, its checkpoints."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from grpo_jax import CheckpointConfig, MeshConfig, OptimizerConfig, TrainConfig, train
from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.models.decoder import param_axes
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.mesh import named_leaves
from grpo_jax.reporting import _run_files
from grpo_jax.training._policy import load_policy
from grpo_jax.training.learner import Learner
from grpo_jax.training.state import state_items

pytestmark = pytest.mark.slow

MESHES = {
    "1x1x1": MeshConfig(fsdp=1),
    "8x1x1": MeshConfig(data=8),
    "1x8x1": MeshConfig(),
    "2x2x2": MeshConfig(data=2, tensor=2),
    "1x4x2": MeshConfig(tensor=2),
    "pmap": MeshConfig(mode="pmap"),
    "split": MeshConfig(sampler="split", offload=("reference", "optimizer")),
}
ROWS = [{"prompt": f"{a}+{b}="} for a, b in itertools.product(range(6), range(6))]
STEPS = 3


def letters(completions, **_):
    return [float(sum(map(ord, text)) % 7) for text in completions]


@pytest.fixture(scope="module")
def run(tiny_policy, tmp_path_factory):
    """A function that trains on a mesh; each mesh trains once."""
    root, results = tmp_path_factory.mktemp("meshes"), {}

    def once(name):
        if name not in results:
            with pytest.MonkeyPatch.context() as patch:
                use_devices_of(name, patch)
                config = make_config(tiny_policy, MESHES[name], root / name)
                results[name] = train(config, dataset=ROWS, rewards=letters)
        return results[name]

    return once


def make_config(tiny_policy, mesh, run_dir):
    return TrainConfig(
        model=str(tiny_policy.folder),
        run_dir=str(run_dir),
        steps=STEPS,
        prompts_per_step=8,
        group_size=4,
        max_new_tokens=6,
        max_prompt_tokens=16,
        eval_prompts=0,
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=1),
        report=dataclasses.replace(TrainConfig().report, completions_every=1),
        mesh=mesh,
    )


def use_devices_of(name, patch):
    """Let a run see one device where its mesh is of one."""
    if name == "1x1x1":
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: first)


def tokens(result):
    steps = _run_files.completion_steps(result.run_dir)
    read = [_run_files.read_completions(result.run_dir, step) for step in steps]
    return [[row["completion"] for row in rows] for rows in read]


@pytest.mark.parametrize("name", [name for name in MESHES if name != "1x8x1"])
def test_every_mesh_gives_the_same_run(run, name):
    expected, given = run("1x8x1"), run(name)
    assert tokens(given) == tokens(expected)
    assert len(expected.history) == STEPS
    for one, other in zip(expected.history, given.history, strict=True):
        for metric in ("grad_norm", "reward", "kl", "entropy"):
            # The KL of the first step is rounding alone.
            np.testing.assert_allclose(
                other[metric], one[metric], rtol=1e-4, atol=1e-7, err_msg=metric
            )
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-4, atol=1e-6)
    for path, leaf in named_leaves(expected.params).items():
        same = np.asarray(named_leaves(given.params)[path])
        np.testing.assert_allclose(same, leaf, rtol=1e-3, atol=1e-4, err_msg=path)


def test_minibatches_are_the_same_on_every_mesh(tiny_policy, tmp_path):
    results = []
    for name in ("1x8x1", "pmap"):
        config = make_config(tiny_policy, MESHES[name], tmp_path / name)
        config = dataclasses.replace(
            config, steps=1, prompts_per_step=16, minibatches=2
        )
        results.append(train(config, dataset=ROWS, rewards=letters))
    one, other = (result.history[0] for result in results)
    for metric in ("grad_norm", "kl", "loss", "importance_ratio/mean"):
        # The second update starts from parameters that differ by rounding.
        np.testing.assert_allclose(other[metric], one[metric], rtol=5e-4, atol=1e-6)


def make_learner(tiny_policy, name, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        use_devices_of(name, patch)
        config = make_config(tiny_policy, MESHES[name], tmp_path)
        mesh = meshes.make_mesh(config.mesh)
        policy = load_policy(config, mesh)
        with jax.set_mesh(mesh):
            return Learner(policy.model, policy.params, config, mesh)


def test_moments_lie_as_their_parameters_do(tiny_policy, tmp_path):
    state = make_learner(tiny_policy, "2x2x2", tmp_path).state_on_devices()
    moments = named_leaves(state.opt_state)
    for path, leaf in named_leaves(state.params).items():
        found = [m for name, m in moments.items() if name.endswith(f"/{path}")]
        assert len(found) == 2, path  # Adam's mu and nu
        for moment in found:
            assert moment.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), path
    kernel = state.params["layers"]["mlp"]["gate"]["kernel"]  # [2, 32, 48]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 24)


def test_the_sampler_reads_parameters_that_fsdp_does_not_split(tiny_policy, tmp_path):
    learner = make_learner(tiny_policy, "2x2x2", tmp_path)
    own = learner.variables["params"]["layers"]["mlp"]["gate"]["kernel"]
    copy = learner.sampler_variables()["params"]["layers"]["mlp"]["gate"]["kernel"]
    assert own.addressable_shards[0].data.shape == (2, 16, 24)
    assert copy.addressable_shards[0].data.shape == (2, 32, 24)
    np.testing.assert_array_equal(copy, own)
    learner = make_learner(tiny_policy, "split", tmp_path)
    for leaf, same in zip(
        jax.tree.leaves(learner.sampler_variables()),
        jax.tree.leaves(learner.variables),
        strict=True,
    ):
        assert leaf is same


def test_idle_state_lies_in_the_memory_of_the_host(tiny_policy, tmp_path):
    before = {id(array) for array in jax.live_arrays()}
    learner = make_learner(tiny_policy, "split", tmp_path)
    # Of gate and up, [2, 32, 48] each: Adam's two moments, the reference; parameters.
    there = [
        array.sharding.memory_kind
        for array in jax.live_arrays()
        if id(array) not in before and array.shape == (2, 32, 48)
    ]
    assert sorted(there) == 2 * ["device"] + 2 * 3 * ["pinned_host"]
    # What reads them sees the devices.
    for leaf in jax.tree.leaves(
        (learner.state_on_devices(), learner.reference_on_devices())
    ):
        assert leaf.sharding.memory_kind == "device"


def test_a_checkpoint_moves_between_any_two_meshes(run, tiny_policy, tmp_path):
    states = {
        n: make_learner(tiny_policy, n, tmp_path).state_on_devices() for n in MESHES
    }
    for saved_on, read_on in itertools.permutations(MESHES, 2):
        folder = run(saved_on).run_dir / "checkpoints"
        like = states[read_on]
        # Every array is compared with the digest it was saved with.
        found = Checkpoints(folder, CheckpointConfig()).restore(state_items(like))
        assert found is not None and found[0] == STEPS
        for path, leaf in named_leaves(found[1]["params"]).items():
            assert leaf.sharding == named_leaves(like.params)[path].sharding, path


def test_a_run_goes_on_where_another_mesh_left_it(run, tiny_policy, tmp_path):
    expected = run("1x8x1")
    calls = []

    def fails_in_step_3(completions, **columns):
        calls.append(None)
        if len(calls) == 3:
            raise OSError("the machine is gone")
        return letters(completions)

    config = make_config(tiny_policy, MESHES["1x4x2"], tmp_path / "run")
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(config, dataset=ROWS, rewards=fails_in_step_3)
    config = dataclasses.replace(config, mesh=MESHES["pmap"])
    resumed = train(config, dataset=ROWS, rewards=letters)
    assert [line["step"] for line in resumed.history] == [1, 2, 3]
    np.testing.assert_allclose(
        resumed.history[2]["loss"], expected.history[2]["loss"], rtol=1e-4
    )
    assert tokens(resumed)[2] == tokens(expected)[2]


def test_under_fsdp_no_device_holds_a_whole_parameter(tiny_policy, tmp_path):
    before = {id(array) for array in jax.live_arrays()}
    axes = named_leaves_of_axes(tiny_policy.model)
    sizes = {
        leaf.shape: leaf.size // 8
        for path, leaf in named_leaves(tiny_policy.params).items()
        if "embed" in axes[path]
    }
    found = []

    def looks(completions, **_):
        for array in jax.live_arrays():
            if id(array) not in before and array.shape in sizes:
                found.append((array.shape, array.addressable_shards[0].data.size))
        return letters(completions)

    config = make_config(tiny_policy, MESHES["1x8x1"], tmp_path / "run")
    train(config, dataset=ROWS, rewards=looks)
    assert {shape for shape, _ in found} == sizes.keys()
    assert all(size == sizes[shape] for shape, size in found)


def named_leaves_of_axes(model):
    is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            param_axes(model), is_leaf=is_names
        )
    }
