"""Runs with adapters on a quantized base: one base for all that is done with it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import train
from grpo_jax.config import (
    CheckpointConfig,
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from grpo_jax.models.lora import merge_lora
from grpo_jax.models.quantized import QUANTIZED, abstract_quantized
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.mesh import named_leaves
from grpo_jax.planning.memory import estimate
from grpo_jax.training._lowered import _Run, bytes_on_a_device
from grpo_jax.training._policy import load_policy
from grpo_jax.training.restore import restore
from grpo_jax.weights.pretrained import load_pretrained

ROWS = [{"prompt": f"say {i}", "wanted": "aeiou"[i % 5]} for i in range(8)]
LORA = LoraConfig(rank=2, alpha=6.0, targets=("q", "down"), base_dtype="int8")


def share(completions, wanted, **_):
    """The share of letters that sort below the wanted one."""
    return [
        sum(c <= w for c in text) / max(len(text), 1)
        for text, w in zip(completions, wanted, strict=True)
    ]


@pytest.fixture(scope="module")
def run(tiny_policy, tmp_path_factory):
    """The configuration and the result of a run of two steps on eight devices."""
    config = TrainConfig(
        model=str(tiny_policy.folder),
        run_dir=str(tmp_path_factory.mktemp("quantized") / "run"),
        steps=2,
        prompts_per_step=8,
        group_size=2,
        max_prompt_tokens=16,
        max_new_tokens=4,
        eval_prompts=0,
        objective=ObjectiveConfig(kl_coef=0.1),
        lora=LORA,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        optimizer=OptimizerConfig(learning_rate=3e-2),
        checkpoint=CheckpointConfig(every=1),
    )
    return config, train(config, dataset=ROWS, rewards=[share])


def assert_same_bits(one, two):
    one, two = named_leaves(one), named_leaves(two)
    assert one.keys() == two.keys()
    for path, values in one.items():
        assert values.dtype == two[path].dtype, path
        assert np.asarray(values).tobytes() == np.asarray(two[path]).tobytes(), path


def test_the_sampler_and_the_learner_have_the_same_base(run):
    _, result = run
    kl = [line["kl"] for line in result.history]
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[1] > 1e-6
    assert max(line["sampler_logp_diff/max"] for line in result.history) < 1e-4


def test_the_export_is_what_was_trained(run, tiny_policy):
    """The dequantized base, and the adapters; only what has adapters was moved."""
    config, result = run
    exported = load_pretrained(result.run_dir / "export")
    assert_same_bits(exported.params, result.params)
    assert_same_bits(restore(result.run_dir).params, result.params)
    policy = load_policy(config, meshes.make_mesh(config.mesh))
    merged = merge_lora(policy.base, {}, policy.model.config)
    plain, made = named_leaves(merged), exported.params
    for path, leaf in named_leaves(made).items():
        moved = (np.asarray(leaf) != np.asarray(plain[path])).any()
        assert moved == (path in ("layers/attn/q/kernel", "layers/mlp/down/kernel"))
    given = tiny_policy.params["layers"]["attn"]["k"]["kernel"]
    off = np.abs(made["layers"]["attn"]["k"]["kernel"] - given)
    assert 0 < off.max() <= np.abs(given).max() / 254 * 1.001


def test_a_resumed_run_ends_in_the_same_bits(run, tmp_path):
    config, result = run
    copy = shutil.copytree(result.run_dir, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "2")
    config = dataclasses.replace(config, run_dir=str(copy))
    again = train(config, dataset=ROWS, rewards=[share])
    assert len(again.history) == 2
    assert_same_bits(again.params, result.params)


def test_another_base_is_refused(run, tmp_path):
    config, result = run
    copy = shutil.copytree(result.run_dir, tmp_path / "run")
    for kind in ("auto", "nf4"):
        lora = dataclasses.replace(LORA, base_dtype=kind)
        other = dataclasses.replace(config, run_dir=str(copy), lora=lora)
        with pytest.raises(ValueError, match=f"lora.base_dtype: 'int8' and '{kind}'"):
            train(other, dataset=ROWS, rewards=[share])
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["data"]["weights"]["layers/attn/k/codes"] = "0"
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"(?s)another model.*layers/attn/k/codes"):
        restore(copy)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_has_the_bytes_of_the_loaded_base(kind, dtype, tiny_policy, meshes_of):
    lora = dataclasses.replace(LORA, base_dtype=kind)
    config = TrainConfig(model=str(tiny_policy.folder), lora=lora, compute_dtype=dtype)
    whole = None
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = meshes_of(*shape)
        policy = load_policy(config, mesh)
        model = policy.model.config
        made = estimate(model, config, mesh).always["parameters"]
        assert made == bytes_on_a_device((policy.base, policy.params))
        # So is what compiles for devices that are only described.
        described = named_leaves(_Run(model, config, mesh).base)
        loaded = named_leaves(policy.base)
        assert described.keys() == loaded.keys()
        for path, leaf in loaded.items():
            other = described[path]
            assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype), path
            assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim), path
        whole = whole or policy.base
        assert_same_bits(policy.base, whole)
    # Half of the inputs are on each device, half of the outputs too.
    codes = policy.base["layers"]["attn"]["q"]["codes"]
    assert codes.addressable_shards[0].data.size * 4 == codes.size


def test_only_kernels_of_layers_are_quantized(tiny_policy, meshes_of):
    config = TrainConfig(model=str(tiny_policy.folder), lora=LORA)
    base = named_leaves(load_policy(config, meshes_of(1, 1, 1)).base)
    plain = named_leaves(tiny_policy.params)
    made = {path.removesuffix("codes") for path in base if path.endswith("codes")}
    assert made == {
        path.removesuffix("kernel") for path in filter(QUANTIZED.fullmatch, plain)
    }
    kept = [path for path in plain if not QUANTIZED.fullmatch(path)]
    assert "embed/embedding" in kept
    for path in kept:
        assert (jnp.asarray(base[path]) == plain[path]).all()


def test_experts_are_refused_before_a_weight_is_read():
    leaf = jax.ShapeDtypeStruct((2, 4, 4), jnp.float32)
    tree = {"layers": {"mlp": {"router": leaf}}}
    place = jax.tree.map(lambda _: None, tree)
    with pytest.raises(ValueError, match="'int8' does not serve models with experts"):
        abstract_quantized(tree, place, "int8")
