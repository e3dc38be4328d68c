"""Adapters merged into their base, one parameter at a time."""

import dataclasses
import weakref

import jax
import numpy as np
import pytest

from grpo_jax.checkpointing.checksum import params_sha256
from grpo_jax.config import LoraConfig, TrainConfig
from grpo_jax.models.decoder import abstract_params
from grpo_jax.models.lora import merge_lora
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.mesh import named_leaves
from grpo_jax.training._merging import Merged, computed
from grpo_jax.training._policy import load_policy
from grpo_jax.training.loop import run_to_end
from grpo_jax.weights.pretrained import load_pretrained, save_pretrained

KINDS = "auto", "int8", "nf4"


@pytest.fixture(params=KINDS)
def config(request, tiny_policy, tmp_path):
    """A run of one step with adapters on a base of one kind."""
    return TrainConfig(
        model=str(tiny_policy.folder),
        run_dir=str(tmp_path / "run"),
        steps=1,
        prompts_per_step=8,
        group_size=2,
        max_prompt_tokens=16,
        max_new_tokens=4,
        eval_prompts=0,
        lora=LoraConfig(rank=2, targets=("q", "down"), base_dtype=request.param),
    )


@pytest.fixture
def policy(config):
    """Its policy, with adapters that add something."""
    loaded = load_policy(config, meshes.make_mesh(config.mesh))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, loaded.params)
    return dataclasses.replace(loaded, params=moved)


@pytest.fixture
def watched(monkeypatch):
    """How many merged parameters were in memory whenever one more was computed."""
    counts, made = [], []
    compute = Merged.computed

    def watch(merged):
        counts.append(sum(one() is not None for one in made))
        array = compute(merged)
        made.append(weakref.ref(array))
        return array

    monkeypatch.setattr(Merged, "computed", watch)
    return counts


def test_each_is_what_the_whole_tree_has(policy):
    lazy = policy.merged(policy.params)
    whole = merge_lora(policy.base, policy.params, policy.model.config)
    shapes = named_leaves(abstract_params(policy.model))
    for path, leaf in named_leaves(lazy).items():
        assert (leaf.shape, leaf.dtype) == (shapes[path].shape, np.float32), path
        np.testing.assert_array_equal(np.asarray(leaf), leaf.computed())
        np.testing.assert_allclose(
            np.asarray(leaf), named_leaves(whole)[path], rtol=1e-5, atol=1e-6
        )
    assert params_sha256(lazy) == params_sha256(computed(lazy))


def test_a_file_and_a_checksum_hold_few_at_once(policy, watched, tmp_path):
    lazy = policy.merged(policy.params)
    save_pretrained(tmp_path / "model", policy.pretrained(lazy))
    params_sha256(lazy)
    parameters = len(named_leaves(lazy))
    assert len(watched) == 2 * parameters and parameters > 6
    assert max(watched) <= 2
    found = load_pretrained(tmp_path / "model").params
    assert params_sha256(found) == params_sha256(lazy)


@pytest.mark.parametrize("with_params", [False, True])
def test_a_run_merges_for_its_checksum_its_export_and_who_reads(
    config, policy, watched, with_params
):
    inputs = {"dataset": [{"prompt": "a"}] * 8, "rewards": [lengths]}
    result = run_to_end(config, with_params=with_params, **inputs)
    parameters = len(named_leaves(policy.merged(policy.params)))
    assert len(watched) == (3 if with_params else 2) * parameters
    digest = result.summary["params_sha256"]
    exported = load_pretrained(result.run_dir / "export")
    assert params_sha256(exported.params) == digest
    if with_params:
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(result.params))
        assert params_sha256(result.params) == digest
    else:
        assert result.params is None


def test_a_copy_is_one_and_no_view_is_promised(policy):
    leaf = jax.tree.leaves(policy.merged(policy.params))[0]
    assert np.array(leaf, dtype=np.float16).dtype == np.float16
    assert np.array(leaf).flags.writeable
    with pytest.raises(ValueError, match="computed"):
        np.asarray(leaf, copy=False)


def lengths(completions, **_):
    """The number of characters."""
    return [float(len(text)) for text in completions]
