"""Published config.json files, and keys that are ignored, honored or refused."""

import itertools
import json
import math
import pathlib

import pytest
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st

from grpo_jax.models import families
from grpo_jax.models._hf_checks import foreign_keys
from grpo_jax.models._hf_wrappers import text_of
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.families import FAMILIES
from grpo_jax.weights._names import parameter_table

# The fields of one published file per family, by its name on the hub.
PUBLISHED = json.loads(
    (pathlib.Path(__file__).parent / "published_configs.json").read_text()
)
# How many parameters the publishers, or the files of the weights, say there are; of
# those that also see, what transformers' class of the text model has.
SIZES = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-3-270m-it": 268_098_176,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "allenai/OLMo-2-0425-1B-Instruct": 1_484_916_736,
    "allenai/Olmo-3-7B-Instruct": 7_298_011_136,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "ibm-granite/granite-3.1-2b-instruct": 2_533_531_648,
    "mistralai/Ministral-3-3B-Instruct-2512-BF16": 3_429_006_336,
    "google/gemma-3-4b-it": 3_880_263_168,
    "LGAI-EXAONE/EXAONE-4.0-1.2B": 1_279_391_488,
    "ByteDance-Seed/Seed-OSS-36B-Instruct": 36_151_104_512,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "tencent/HunyuanImage-2.1/reprompt": 7_504_568_320,
    "Qwen/Qwen3.5-0.8B-Base": 752_393_024,
    "FlameF0X/LFM2.5-1.2B-Distilled-Claude-4.6": 1_170_340_608,
}
TEXTS = [text_of(hf) for hf in PUBLISHED.values()]
BY_FAMILY = {hf["architectures"][0]: hf for hf in TEXTS}

# Seen in published files of these families; no implementation computes by them.
BOOKKEEPING = {
    "max_sequence_length": 16384,
    "_flash_attn_2_enabled": True,
    "use_flash_attention_2": True,
    "use_flash_attention": True,
    "_attn_implementation_internal": "sdpa",
    "gradient_checkpointing": True,
    "model_max_length": 4096,
    "seq_length": 2048,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
    "neftune_noise_alpha": 5,
    "pad_token": "<pad>",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_that_model(name, caplog):
    config = ModelConfig.from_hf(PUBLISHED[name])
    counts = (math.prod(row.shape) for row in parameter_table(config))
    assert sum(counts) == SIZES[name]
    assert not caplog.messages
    # As the class of transformers understands the file, with all that it assumes.
    theirs = transformers.CONFIG_MAPPING[PUBLISHED[name]["model_type"]]
    assert ModelConfig.from_hf(theirs.from_dict(PUBLISHED[name]).to_dict()) == config


def test_every_family_has_a_published_file():
    assert BY_FAMILY.keys() == FAMILIES.keys()
    assert PUBLISHED.keys() == SIZES.keys()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_field_of_the_class_is_read_fixed_or_ignored(architecture):
    """By what transformers knows for the model type, not by what files happen to say.

    What is in none of the lists is refused if it is in use, as is FIXED_KEYS.
    """
    family = FAMILIES[architecture]
    ours = transformers.CONFIG_MAPPING[family.model_type]
    plain = transformers.PretrainedConfig().to_dict()
    listed = {*families.REQUIRED_KEYS, *families.ROPE_KEYS, *families.IGNORED_KEYS}
    listed |= {*family.defaults, *family.ignored, *family.fixed, *family.aliases}
    listed |= {*families.FIXED_KEYS}
    fields = {key for key in ours().to_dict() if key not in plain}
    refused = fields - listed
    assert refused <= foreign_keys() | {"attn_logit_softcapping"}, refused
    # A key of Llama's class is of no meaning in the others. Two have it, and never read
    # it.
    unread = family.model_type in ("seed_oss", "hunyuan_v1_dense")
    in_class = "pretraining_tp" in fields and not unread
    assert ("pretraining_tp" in family.fixed) == in_class


@given(st.sampled_from([*BY_FAMILY]), st.sampled_from([*BOOKKEEPING.items()]))
def test_bookkeeping_changes_nothing(architecture, item):
    hf = BY_FAMILY[architecture]
    assert ModelConfig.from_hf({**hf, item[0]: item[1]}) == ModelConfig.from_hf(hf)


@given(st.sampled_from([*BY_FAMILY]), st.sampled_from(sorted(foreign_keys())))
def test_a_key_by_which_another_architecture_changes_is_refused(architecture, key):
    hf, family = BY_FAMILY[architecture], FAMILIES[architecture]
    assume(key not in {*family.ignored, *family.fixed})
    with pytest.raises(ValueError, match=f"{key}=0.5 is not supported"):
        ModelConfig.from_hf({**hf, key: 0.5})
    assert ModelConfig.from_hf({**hf, key: False}) == ModelConfig.from_hf(hf)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_key_of_another_family_that_is_not_in_use_changes_nothing(architecture):
    hf, family = BY_FAMILY[architecture], FAMILIES[architecture]
    others = {key for other in FAMILIES.values() for key in other.defaults}
    others -= family.defaults.keys() | {*families.REQUIRED_KEYS, *families.ROPE_KEYS}
    others -= family.ignored | family.fixed.keys() | family.aliases.keys()
    others -= families.FIXED_KEYS.keys()  # refused at any other value
    plain = ModelConfig.from_hf(hf)
    for value in (None, False, 0, []):
        assert ModelConfig.from_hf({**hf, **dict.fromkeys(others, value)}) == plain
    nulls = dict.fromkeys(families.FIXED_KEYS.keys() - family.defaults.keys())
    assert ModelConfig.from_hf({**hf, **nulls}) == plain


def test_the_list_of_other_architectures_is_that_of_transformers():
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as LANGUAGE_MODELS,
    )

    if transformers.__version__ != "5.24.0":
        pytest.skip("the list was made from transformers 5.24.0")
    plain = transformers.PretrainedConfig.__dataclass_fields__
    known = {*families.REQUIRED_KEYS, *families.ROPE_KEYS, *families.IGNORED_KEYS}
    known |= families.FIXED_KEYS.keys() | plain.keys()
    for family in FAMILIES.values():
        known |= family.defaults.keys() | family.ignored
    for model_type in LANGUAGE_MODELS:
        fields = transformers.CONFIG_MAPPING[model_type].__dataclass_fields__
        assert fields.keys() <= known | foreign_keys(), model_type


def test_a_key_that_no_architecture_has_is_ignored_and_told(caplog):
    hf = BY_FAMILY["LlamaForCausalLM"]
    assert ModelConfig.from_hf({**hf, "my_note": "x"}) == ModelConfig.from_hf(hf)
    assert "no architecture reads it: my_note='x'" in caplog.text
    # Code that comes with the files may read it.
    with pytest.raises(ValueError, match="my_note='x' is not supported"):
        code = {"AutoModelForCausalLM": "modeling_mine.Mine"}
        ModelConfig.from_hf({**hf, "my_note": "x", "auto_map": code})


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("architecture", [a for a in FAMILIES if "Llama" not in a])
def test_pretraining_tp_is_of_llama_alone(architecture, tp):
    hf = BY_FAMILY[architecture]
    with_key = ModelConfig.from_hf({**hf, "pretraining_tp": tp})
    assert with_key == ModelConfig.from_hf(hf)


@pytest.mark.parametrize("key", FAMILIES["Qwen3MoeForCausalLM"].required)
def test_a_mixture_that_does_not_say_its_sizes_is_refused_by_key(key):
    hf = dict(BY_FAMILY["Qwen3MoeForCausalLM"])
    del hf[key]
    with pytest.raises(ValueError, match=f"config.json: missing {key}"):
        ModelConfig.from_hf(hf)
    with pytest.raises(ValueError, match=f"config.json: {key} must be a positive"):
        ModelConfig.from_hf({**hf, key: None})


def test_two_names_of_one_key_must_agree():
    hf = BY_FAMILY["MixtralForCausalLM"]
    both = ModelConfig.from_hf({**hf, "num_experts": 8})
    assert both == ModelConfig.from_hf(hf)
    with pytest.raises(ValueError, match="num_experts=4 and num_local_experts=8"):
        ModelConfig.from_hf({**hf, "num_experts": 4})


@pytest.mark.parametrize("given", ["num_experts", "num_local_experts"])
def test_of_two_names_of_one_key_the_one_that_is_not_null_counts(given):
    names = dict.fromkeys(("num_experts", "num_local_experts")) | {given: 8}
    config = ModelConfig.from_hf(BY_FAMILY["MixtralForCausalLM"] | names)
    assert config.experts.count == 8


def test_more_experts_per_token_than_there_are_is_refused_by_key():
    hf = BY_FAMILY["Qwen3MoeForCausalLM"] | {"num_experts": 4}
    with pytest.raises(ValueError, match="num_experts, num_experts_per_tok.*count=4"):
        ModelConfig.from_hf(hf)


@given(
    st.sampled_from([*families.REQUIRED_KEYS, "max_position_embeddings"]),
    st.sampled_from([None, 0, -1, 1.5, 48.0, "48", [48], True]),
)
def test_a_size_that_is_none_is_refused_by_key(key, value):
    hf = BY_FAMILY["LlamaForCausalLM"]
    with pytest.raises(ValueError, match=f"{key} must be a positive whole number"):
        ModelConfig.from_hf({**hf, key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number, got None"),
        ({"rope_theta": "1e4"}, "rope_theta must be a number, got '1e4'"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id, got '</s>'"),
        ({"eos_token_id": [2, 1.5]}, "eos_token_id must be a token id"),
        ({"head_dim": 0}, "head_dim must be a positive whole number, got 0"),
        ({"hidden_act": ["silu"]}, r"hidden_act must be a name, got \['silu'\]"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_scaling must be an object"),
    ],
)
def test_other_values_of_the_wrong_kind_are_refused_by_key(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(BY_FAMILY["LlamaForCausalLM"] | change)


def test_more_heads_than_hidden_units_are_refused():
    hf = BY_FAMILY["LlamaForCausalLM"] | {"hidden_size": 2, "head_dim": None}
    with pytest.raises(
        ValueError, match="hidden_size 2 is less than num_attention_hea"
    ):
        ModelConfig.from_hf(hf)


NONSENSE = (None, "x", "", -1, 0, 1.5, math.nan, True, [], ["x"], [[]], {"x": [[]]})
NONSENSE += (
    {"rope_type": []},
    {"full_attention": 3},
    {"alpha": -1.0, "type": "dynamic"},
)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_nonsense_in_any_key_is_refused_in_words_or_means_something(architecture):
    hf = BY_FAMILY[architecture]
    keys = {*hf, *FAMILIES[architecture].defaults, *families.ROPE_KEYS}
    for key, value in itertools.product(sorted(keys), NONSENSE):
        try:
            ModelConfig.from_hf({**hf, key: value})
        except ValueError as error:
            assert str(error), (key, value)
        except Exception as error:
            raise AssertionError(f"{key}={value!r}: {error!r}") from error
