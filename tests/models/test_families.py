"""The rows of the table against themselves and against transformers' own classes."""

import itertools

import pytest

from grpo_jax.models.families import (
    FAMILIES,
    FIXED_KEYS,
    IGNORED_KEYS,
    REQUIRED_KEYS,
    ROPE_KEYS,
)

# What these families keep otherwise than transformers' classes do, and why.
OWN = {
    "head_dim",  # None: width / heads
    "num_key_value_heads",  # None: as many as heads
    "layer_types",  # None: made from the other keys
    "no_rope_layers",
    "use_sliding_window",  # turned on below: transformers forgets a window that is off
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_key_has_one_meaning_in_a_family(name):
    family = FAMILIES[name]
    kinds = {
        "read": set(family.defaults) | set(REQUIRED_KEYS) | set(ROPE_KEYS),
        "ignored": set(IGNORED_KEYS | family.ignored),
        "another name": set(family.aliases),
    }
    for (one, left), (other, right) in itertools.combinations(kinds.items(), 2):
        assert not left & right, f"{one} and {other}"
    assert set(family.aliases.values()) <= set(family.defaults)


def test_keys_of_all_families_are_ignored_or_fixed_and_not_both():
    assert not IGNORED_KEYS & set(FIXED_KEYS)
    types = [family.model_type for family in FAMILIES.values()]
    assert len(set(types)) == len(types)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_absence_means_is_what_transformers_assumes(name):
    transformers = pytest.importorskip("transformers")
    family = FAMILIES[name]
    on = {"use_sliding_window": True} if "use_sliding_window" in family.defaults else {}
    if "rope_parameters" in family.required:
        on["rope_parameters"] = {"rope_type": "default"}
    theirs = transformers.AutoConfig.for_model(family.model_type, **on).to_dict()
    differing = {
        key: (value, theirs[key])
        for key, value in family.defaults.items()
        if key in theirs and key not in OWN and value is not None
        if theirs[key] != value
    }
    assert not differing
    thetas = theirs.get("rope_parameters") or {}
    assert family.default_theta in (
        theirs.get("rope_theta"),
        thetas.get("rope_theta"),
        thetas.get("full_attention", {}).get("rope_theta"),
    )
