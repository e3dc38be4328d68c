"""The estimate of memory is exact where it can be."""

import dataclasses

import jax
import pytest

from grpo_jax.config import LoraConfig, MeshConfig, ObjectiveConfig, TrainConfig
from grpo_jax.models.decoder import abstract_params, param_axes
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.memory import activation_bytes, estimate


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


def on_one_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_state_takes_what_its_arrays_take(tiny_policy, meshes_of, sizes):
    model, mesh = tiny_policy.model, meshes_of(*sizes)
    place = meshes.parameter_shardings(param_axes(model), abstract_params(model), mesh)
    held = on_one_device(jax.device_put(tiny_policy.params, place))
    always = made(model.config, sizes).always
    assert always == {
        "parameters": held,
        "optimizer moments": 2 * held,
        "reference": held,
    }
    # In bfloat16 the reference is half as large, but for the scales of five norms.
    narrow = dataclasses.replace(model.config, dtype="bfloat16")
    assert made(narrow, sizes).always["reference"] == held // 2


def test_a_cache_takes_what_its_arrays_take(tiny_policy):
    model = tiny_policy.model
    # Four prompts of a mesh of two, their completions, one of two heads.
    cache = jax.eval_shape(lambda: model.init_cache(4, 4, 32))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))
    rollout = made(model.config, (1, 2, 2)).phases["rollout"]
    assert rollout["own keys and values"] == size // 2
    # A prompt of 16 tokens is stored once, not with each of 4 completions of 32.
    assert rollout["prompts' keys and values"] == size // 2 // 8


def test_the_backward_pass_keeps_what_remat_leaves_it(model):
    # Of 8 prompts rows of 16 + 4 * 31 tokens, float32.
    one = 4 * 8 * (16 + 4 * 31)
    deeper = dataclasses.replace(
        model,
        num_layers=4,
        layer_rope=2 * model.layer_rope,
        layer_window=2 * model.layer_window,
    )

    def kept(remat, **changes):
        """By one layer; what is kept of the rest is in both models."""
        config, mesh = make_config(**changes), imagined(1, 1, 1)
        with_two, with_four = (
            activation_bytes(dataclasses.replace(m, remat=remat), config, mesh)
            for m in (model, deeper)
        )
        return (with_four - with_two) // 2

    # Its input; and of products the results of q (32), k and v (16 each), o (32), gate
    # and up (48 each). That of down is not needed: it is only added.
    assert kept("layer") == one * 32
    assert kept("dots") == kept("layer") + one * (32 + 2 * 16 + 32 + 2 * 48)
    assert kept("none") > 2 * kept("dots")
    # One group at a time is an eighth.
    assert kept("dots", microbatch_size=4) * 8 == kept("dots")


def test_adapters_leave_little_to_train(model):
    lora = LoraConfig(rank=2, targets=("q",))
    found = made(model, lora=lora)
    # a [2, 32, 2] and b [2, 2, 32] on a frozen base, which is the reference too.
    adapters, base = 4 * 2 * (32 * 2 + 2 * 32), made(model).always["parameters"]
    assert found.always == {
        "parameters": base + adapters,
        "optimizer moments": 2 * adapters,
    }
    assert found.phases["update"]["gradients"] == adapters


def test_what_is_offloaded_counts_where_it_is_used(model):
    kept = made(model)
    offload = MeshConfig(offload=("reference", "optimizer"))
    moved = made(model, mesh=offload)
    moments, reference = kept.always["optimizer moments"], kept.always["reference"]
    assert moved.total("rollout") == kept.total("rollout") - moments - reference
    assert moved.total("score") == kept.total("score") - moments
    assert moved.total("update") == kept.total("update") - reference
    bare = made(model, objective=ObjectiveConfig(kl_coef=0.0))
    assert "reference" not in bare.always
