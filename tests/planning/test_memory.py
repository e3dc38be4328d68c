"""The estimate of memory is exact where it can be."""

import dataclasses
import functools

import jax
import pytest

from grpo_jax.config import (
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    RolloutConfig,
    TrainConfig,
)
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
    # The ring of 32 columns grows to 64 and then to 100, when there are both.
    longer = made(model.config, (1, 2, 2), max_new_tokens=100).phases["rollout"]
    assert longer["own keys and values"] == size // 2 * 100 // 32
    assert longer["a ring that grows"] == size // 2 * 64 // 32
    # For nine prompts on each device the block has ten rows.
    more = made(model.config, (1, 2, 2), prompts_per_step=18).phases["rollout"]
    assert more["prompts' keys and values"] == size // 2 // 8 * 10 // 4


@pytest.mark.parametrize("kind", ["hybrid_policy", "conv_policy"])
def test_states_take_what_their_arrays_take(kind, request):
    model = request.getfixturevalue(kind).model
    cache = jax.eval_shape(lambda: model.init_cache(4, 4, 32))
    sizes = (leaf.size * 4 for leaf in jax.tree.leaves(cache.state))
    rollout = made(model.config, (1, 2, 2)).phases["rollout"]
    # Of 16 sequences on a device, and of its four prompts; of half of the heads.
    assert rollout["states"] == sum(sizes) // 2 * 5 // 4
    keys = 2 * cache.keys.size * 4
    assert rollout["own keys and values"] == keys // 2
    narrow = dataclasses.replace(model.config, dtype="bfloat16")
    # Memories stay float32.
    memory = cache.state.memory.size * 4 // 2 * 5 // 4
    half = made(narrow, (1, 2, 2)).phases["rollout"]["states"]
    assert half == memory + (rollout["states"] - memory) // 2


@pytest.mark.parametrize("kind", ["hybrid_policy", "conv_policy"])
def test_halves_of_layers_keep_less(kind, request):
    """Of two devices with half of the heads and channels each."""
    model = request.getfixturevalue(kind).model.config
    kept = [
        activation_bytes(model, make_config(), imagined(1, 4 // parts, parts))
        for parts in (1, 2)
    ]
    assert 0.5 < kept[1] / 2 / kept[0] < 1  # each has twice as many rows


def test_scores_are_kept_where_no_kernel_serves(tiny_policy):
    model = dataclasses.replace(
        tiny_policy.model.config, head_dim=16, dtype="bfloat16", attention="auto"
    )
    sizes = {"max_prompt_tokens": 128, "max_new_tokens": 129}
    of = functools.partial(meshes.abstract_mesh, MeshConfig(), 1)
    tpu = of(jax.sharding.AbstractDevice("TPU v5 lite", None, "tpu"))

    def kept(mesh, **changes):
        own = dataclasses.replace(model, remat="none", **changes)
        return activation_bytes(own, make_config(**sizes), mesh)

    # 8 prompts with 4 completions; two layers, four heads, float32.
    scores = 2 * 4 * 4 * 8 * (128**2 + 4 * 128 * (128 + 128))
    assert kept(of()) - kept(tpu) > scores
    assert kept(of(), attention="xla") == kept(tpu, attention="xla") == kept(of())


# Keys and values of a token: two layers, two heads of width 8, float32.
TOKEN = 2 * 2 * 2 * 8 * 4


def test_fewer_slots_hold_less_at_a_time(model):
    # Of 8 groups of 4: 8 slots, and prompts of 12 completions.
    rollout = made(model, rollout=RolloutConfig(slots=8)).phases["rollout"]
    assert rollout["own keys and values"] == 8 * 32 * TOKEN
    assert rollout["prompts' keys and values"] == 3 * 16 * TOKEN
    # No more than there are.
    for slots in (None, 32, 99):
        rollout = made(model, rollout=RolloutConfig(slots=slots)).phases["rollout"]
        assert rollout["own keys and values"] == 32 * 32 * TOKEN
        assert rollout["prompts' keys and values"] == 8 * 16 * TOKEN


def test_what_is_carried_over_is_held_all_the_time(model):
    plain, carrying = (
        made(model, rollout=RolloutConfig(slots=8, carry_over=carry_over))
        for carry_over in (False, True)
    )
    names = ["own keys and values", "prompts' keys and values"]
    carried = {name: plain.phases["rollout"][name] for name in names}
    assert carrying.always == plain.always | carried
    assert carrying.total("rollout") == plain.total("rollout")
    assert carrying.total("update") == plain.total("update") + sum(carried.values())
    # By default half a step waits behind one in the slots.
    ahead = made(model, rollout=RolloutConfig(carry_over=True)).always
    assert ahead["prompts' keys and values"] == 12 * 16 * TOKEN


def test_what_decoding_reads_is_rounded_once(tiny_policy):
    narrow = dataclasses.replace(tiny_policy.model.config, dtype="bfloat16")
    params = tiny_policy.params
    for sizes, copied in [((1, 1, 1), params), ((1, 2, 1), params["layers"])]:
        # Where fsdp splits them, the gathered ones are rounded already.
        rollout = made(narrow, sizes).phases["rollout"]
        size = sum(2 * leaf.size for leaf in jax.tree.leaves(copied))
        assert rollout["kernels"] == pytest.approx(size, rel=0.01)


def test_an_evaluation_computes_prompts_ahead_of_its_slots(model):
    options = {"max_new_tokens": 16, "eval_batch_size": 8}

    def prompts(count):
        sizes = made(model, eval_prompts=count, **options).phases["evaluation"]
        assert sizes["own keys and values"] == 8 * 16 * TOKEN
        return sizes["prompts' keys and values"] / (16 * TOKEN)

    # At most half as many as there are slots.
    assert [prompts(count) for count in (8, 9, 12, 300)] == [8, 10, 12, 12]


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


def test_an_update_holds_what_was_found_as_compiled_for_tpus(tiny_policy):
    narrow = dataclasses.replace(
        tiny_policy.model.config, dtype="bfloat16", remat="layer"
    )
    of = functools.partial(meshes.abstract_mesh, MeshConfig(), 1)
    tpu = of(jax.sharding.AbstractDevice("TPU v5 lite", None, "tpu"))
    count = sum(leaf.size for leaf in jax.tree.leaves(tiny_policy.params))

    def held(mesh, **changes):
        config = make_config(**changes)
        found = estimate(narrow, config, mesh).phases["update"]["gradients"]
        return found, activation_bytes(narrow, config, mesh)

    # A sum, the gradient of a microbatch, and as much again that the compiler reserves.
    assert [held(tpu)[0], held(of())[0]] == [4 * count] * 2
    several = [held(mesh, microbatch_size=8)[0] for mesh in (tpu, of())]
    assert several == [3 * 4 * count, 2 * 4 * count]
    # All weights, rounded before the loop over layers.
    assert held(tpu)[1] - held(of())[1] == 2 * count


def test_a_scoring_pass_holds_its_layers_or_its_head(model):
    score = made(model, (1, 8, 1)).phases["score"]
    assert ("activations" in score) != ("log-prob chunks" in score)


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
