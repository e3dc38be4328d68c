"""What a run begins with has few digests, the same wherever it lies."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.config import TrainConfig
from grpo_jax.config.files import to_jsonable
from grpo_jax.rollout.encoding import prompts_sha256
from grpo_jax.training._fingerprint import describe_architecture, describe_weights
from grpo_jax.training._policy import load_policy


def test_weights_have_the_same_digests_wherever_they_lie_and_others_differ(
    tiny_policy, meshes_of
):
    params = tiny_policy.params
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    spread = load_policy(
        TrainConfig(model=str(tiny_policy.folder)), meshes_of(1, 4, 2)
    ).params
    whole = describe_weights(params, frozen=False)
    assert describe_weights(spread, frozen=False) == whole
    # A base is held in the number type of the machine: both give the same.
    assert describe_weights(half, frozen=True) == describe_weights(params, frozen=True)
    for frozen, factor in ((False, 1 + 2**-20), (True, 1 + 2**-6)):
        norm = params["final_norm"]["scale"]
        other = params | {"final_norm": {"scale": norm.at[3].multiply(factor)}}
        before = describe_weights(params, frozen=frozen)
        after = describe_weights(other, frozen=frozen)
        assert [n for n in after if after[n] != before[n]] == ["final_norm/scale"]


def test_an_architecture_is_what_is_not_at_its_default_and_no_way_to_run_it(
    tiny_policy,
):
    config = tiny_policy.model.config
    told = describe_architecture(config)
    assert told["hidden_size"] == 32 and json.dumps(to_jsonable(told))
    ways = {"dtype": "bfloat16", "remat": "layer", "lora_scale": 2.0}
    assert describe_architecture(dataclasses.replace(config, **ways)) == told
    other = dataclasses.replace(config, norm_eps=1e-3)
    assert describe_architecture(other) == told | {"norm_eps": 1e-3}


_PROMPTS = st.lists(st.lists(st.integers(0, 300), max_size=4), max_size=4)


@given(one=_PROMPTS, other=_PROMPTS)
def test_prompts_have_the_same_digest_only_if_they_are_the_same(one, other):
    assert (prompts_sha256(one) == prompts_sha256(other)) == (one == other)
