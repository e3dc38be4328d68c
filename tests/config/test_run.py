"""A run's configuration: what it refuses, what it fills in, what papers say."""

import dataclasses
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.config import (
    EMBEDDED,
    PRESETS,
    CheckpointConfig,
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReportConfig,
    RewardsConfig,
    SamplingConfig,
    TrainConfig,
)
from grpo_jax.config.trl_names import TRL_NAMES
from grpo_jax.config.validation import Section, differences, from_dict, to_dict
from grpo_jax.flags import base_config

NAN, INF = math.nan, math.inf

# Section, wrong arguments, words that the message must have: field, value, remedy.
REFUSED = [
    (TrainConfig, {"group_size": 1}, "group_size must be at least 2, got 1|8 is usual"),
    (TrainConfig, {"group_size": 0}, "group_size must be an integer from 1 on, got 0"),
    (TrainConfig, {"group_size": True}, "group_size|got True"),
    (TrainConfig, {"group_size": 8.0}, "group_size|integer|got 8.0"),
    (TrainConfig, {"prompts_per_step": 0}, "prompts_per_step|from 1 on, got 0"),
    (TrainConfig, {"steps": 0}, "steps|from 1 on, got 0"),
    (TrainConfig, {"steps": "100"}, "steps|got '100'"),
    (TrainConfig, {"seed": -1}, "seed|[0, 2**32), got -1"),
    (TrainConfig, {"seed": 2**32}, "seed|[0, 2**32)"),
    (TrainConfig, {"model": ""}, "model must be a text that is not empty"),
    (TrainConfig, {"task": ""}, "task must be a text that is not empty"),
    (TrainConfig, {"max_new_tokens": 0}, "max_new_tokens|from 1 on"),
    (TrainConfig, {"max_prompt_tokens": -5}, "max_prompt_tokens|got -5"),
    (TrainConfig, {"eval_every": -1}, "eval_every|from 0 on"),
    (TrainConfig, {"eval_prompts": -1}, "eval_prompts|from 0 on"),
    (TrainConfig, {"updates_per_rollout": 0}, "updates_per_rollout|from 1 on"),
    (TrainConfig, {"compute_dtype": "float16"}, "compute_dtype|'bfloat16'|'float16'"),
    (TrainConfig, {"remat": "full"}, "remat|'layer'|'full'"),
    (
        TrainConfig,
        {"prompts_per_step": 10, "minibatches": 4},
        "minibatches 4 must divide prompts_per_step 10",
    ),
    (
        TrainConfig,
        {"prompts_per_step": 4, "group_size": 8, "microbatch_size": 12},
        "microbatch_size 12|groups of 8|the 32 sequences|8 always does",
    ),
    (
        TrainConfig,  # whole groups, but 24 does not divide 32
        {"prompts_per_step": 4, "group_size": 8, "microbatch_size": 24},
        "microbatch_size 24|the 32 sequences",
    ),
    (
        TrainConfig,  # 8 divides the 24 sequences, but holds no whole groups of 6
        {"prompts_per_step": 4, "group_size": 6, "microbatch_size": 8},
        "microbatch_size 8|groups of 6",
    ),
    (
        TrainConfig,  # neither holds a group of 8 nor divides it
        {"prompts_per_step": 4, "group_size": 8, "microbatch_size": 3},
        "microbatch_size 3|divide a group",
    ),
    (
        TrainConfig,  # an update has 16 / 4 * 8 = 32 sequences, not 128
        {
            "prompts_per_step": 16,
            "group_size": 8,
            "minibatches": 4,
            "microbatch_size": 64,
        },
        "microbatch_size 64|the 32 sequences of an update",
    ),
    (
        TrainConfig,
        {"sampling": SamplingConfig(temperature=0)},
        "sampling.temperature must be above 0 in training|1.0 is usual",
    ),
    (ObjectiveConfig, {"clip_low": 0}, "objective.clip_low|positive number, got 0"),
    (ObjectiveConfig, {"clip_low": NAN}, "objective.clip_low|got nan"),
    (ObjectiveConfig, {"clip_low": 1, "clip_high": 2}, "clip_low must be below 1"),
    (
        ObjectiveConfig,
        {"clip_low": 0.3, "clip_high": 0.2},
        "objective.clip_low 0.3 must not exceed clip_high 0.2|raise clip_high",
    ),
    (ObjectiveConfig, {"clip_high": INF}, "objective.clip_high|got inf"),
    (ObjectiveConfig, {"dual_clip": 1.0}, "objective.dual_clip|above 1 or None"),
    (ObjectiveConfig, {"kl_coef": -0.1}, "objective.kl_coef|not below 0, got -0.1"),
    (ObjectiveConfig, {"kl_coef": NAN}, "objective.kl_coef|got nan"),
    (ObjectiveConfig, {"kl_estimator": "k1"}, "objective.kl_estimator|'k2', 'k3'"),
    (ObjectiveConfig, {"softmax_temperature": 0}, "objective.softmax_temperature"),
    (ObjectiveConfig, {"advantage": "gae"}, "objective.advantage|'centered'|'gae'"),
    (ObjectiveConfig, {"aggregation": "mean"}, "objective.aggregation|'token_mean'"),
    (ObjectiveConfig, {"surrogate": "ppo"}, "objective.surrogate|'clip'|'ppo'"),
    (ObjectiveConfig, {"ratio_level": "group"}, "objective.ratio_level|'sequence'"),
    (ObjectiveConfig, {"std_over": "run"}, "objective.std_over|'batch'|'run'"),
    (
        ObjectiveConfig,
        {"surrogate": "cispo"},
        "objective.cispo_max_weight is needed|5.0 is usual",
    ),
    (
        ObjectiveConfig,
        {"sampler_correction_cap": 0},
        "objective.sampler_correction_cap",
    ),
    (ObjectiveConfig, {"entropy_coef": -1}, "objective.entropy_coef"),
    (ObjectiveConfig, {"overlong_share": 0}, "objective.overlong_share"),
    (ObjectiveConfig, {"resample_limit": -1}, "objective.resample_limit"),
    (ObjectiveConfig, {"mask_truncated": 1}, "objective.mask_truncated must be a bool"),
    (
        ObjectiveConfig,
        {"reference_every": 5, "kl_coef": 0.0},
        "objective.reference_every has no effect while kl_coef is 0",
    ),
    (SamplingConfig, {"temperature": -1}, "sampling.temperature|not below 0"),
    (SamplingConfig, {"temperature": NAN}, "sampling.temperature|got nan"),
    (SamplingConfig, {"top_k": 0}, "sampling.top_k|from 1 on or None"),
    (SamplingConfig, {"top_p": 0}, "sampling.top_p|(0, 1]"),
    (SamplingConfig, {"top_p": 1.5}, "sampling.top_p|(0, 1]|1.5"),
    (SamplingConfig, {"min_p": -0.1}, "sampling.min_p|(0, 1]"),
    (SamplingConfig, {"stop_ids": (-1,)}, "sampling.stop_ids|from 0 on"),
    (SamplingConfig, {"stop_ids": [1]}, "sampling.stop_ids must be a tuple|got [1]"),
    (OptimizerConfig, {"learning_rate": 0}, "optimizer.learning_rate|positive"),
    (OptimizerConfig, {"learning_rate": INF}, "optimizer.learning_rate|got inf"),
    (OptimizerConfig, {"learning_rate": "1e-6"}, "optimizer.learning_rate|'1e-6'"),
    (OptimizerConfig, {"schedule": "step"}, "optimizer.schedule|'cosine'"),
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps"),
    (OptimizerConfig, {"b1": 1.0}, "optimizer.b1|[0, 1)"),
    (OptimizerConfig, {"b2": -0.1}, "optimizer.b2|[0, 1)"),
    (OptimizerConfig, {"weight_decay": -1e-3}, "optimizer.weight_decay"),
    (OptimizerConfig, {"max_grad_norm": 0}, "optimizer.max_grad_norm|or None, got 0"),
    (RewardsConfig, {"weights": (1.0, NAN)}, "rewards.weights|finite number"),
    (RewardsConfig, {"timeout_seconds": 0}, "rewards.timeout_seconds|positive"),
    (RewardsConfig, {"on_error": "ignore"}, "rewards.on_error|'raise', 'drop'"),
    (RewardsConfig, {"isolate": "yes"}, "rewards.isolate must be a bool, got 'yes'"),
    (LoraConfig, {"rank": 0}, "lora.rank|from 1 on or None"),
    (LoraConfig, {"base_dtype": "nf4"}, "lora.base_dtype 'nf4'|set lora.rank"),
    (LoraConfig, {"alpha": 0}, "lora.alpha|positive"),
    (LoraConfig, {"targets": ("q_proj",)}, "lora.targets|'gate'|('q_proj',)"),
    (CheckpointConfig, {"every": 0}, "checkpoint.every|from 1 on"),
    (CheckpointConfig, {"keep": 0}, "checkpoint.keep|from 1 on"),
    (CheckpointConfig, {"keep_every": 0}, "checkpoint.keep_every"),
    (CheckpointConfig, {"grace_seconds": 0}, "checkpoint.grace_seconds|positive"),
    (MeshConfig, {"fsdp": 0}, "mesh.fsdp|number of devices, or -1, got 0"),
    (MeshConfig, {"data": -1}, "mesh.data, fsdp and tensor: only one"),
    (MeshConfig, {"mode": "xmap"}, "mesh.mode|'jit', 'pmap'"),
    (
        MeshConfig,
        {"mode": "pmap", "tensor": 2},
        "mesh.mode 'pmap' splits data only|tensor must be 1, got 2",
    ),
    (MeshConfig, {"sampler": "whole"}, "mesh.sampler|'gathered', 'split'"),
    (MeshConfig, {"offload": ("params",)}, "mesh.offload|'reference', 'optimizer'"),
    (
        MeshConfig,
        {"mode": "pmap", "offload": ("optimizer",)},
        "mesh.offload needs mode 'jit'|with data -1",
    ),
    (
        TrainConfig,
        {
            "mesh": MeshConfig(offload=("reference",)),
            "objective": ObjectiveConfig(kl_coef=0.0),
        },
        "mesh.offload 'reference' has nothing to move",
    ),
    (
        TrainConfig,
        {"mesh": MeshConfig(offload=("reference",)), "lora": LoraConfig(rank=4)},
        "mesh.offload 'reference' has nothing to move|adapters",
    ),
    (MeshConfig, {"num_processes": 0}, "mesh.num_processes"),
    (MeshConfig, {"process_id": -1}, "mesh.process_id"),
    (ReportConfig, {"log_every": 0}, "report.log_every"),
    (ReportConfig, {"wandb": "my-project"}, "report.wandb must be a bool"),
]


@pytest.mark.parametrize(
    ("section", "wrong", "words"),
    REFUSED,
    ids=[f"{cls.section}-{'-'.join(map(str, wrong))}" for cls, wrong, _ in REFUSED],
)
def test_a_wrong_value_is_refused_with_field_value_and_remedy(section, wrong, words):
    with pytest.raises(ValueError) as caught:
        section(**wrong)
    message = str(caught.value)
    assert all(part in message for part in words.split("|")), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "fits",
    [
        {"prompts_per_step": 4, "group_size": 8, "microbatch_size": 1},
        {"prompts_per_step": 4, "group_size": 8, "microbatch_size": 4},
        {"prompts_per_step": 4, "group_size": 8, "microbatch_size": 8},
        {"prompts_per_step": 4, "group_size": 8, "microbatch_size": 16},
        {"prompts_per_step": 4, "group_size": 8, "microbatch_size": 32},
        {"prompts_per_step": 6, "minibatches": 3, "microbatch_size": 16},
        {"sampling": SamplingConfig(temperature=1e-3)},
    ],
)
def test_what_fits_together_is_taken(fits):
    config = TrainConfig(**fits)
    assert all(vars(config)[name] == value for name, value in fits.items())


def test_problems_of_a_run_are_told_at_once():
    with pytest.raises(ValueError) as caught:
        TrainConfig(group_size=1, prompts_per_step=9, minibatches=2)
    assert "group_size" in str(caught.value) and "minibatches" in str(caught.value)


def test_problems_of_a_file_are_told_at_once_whatever_their_section():
    values = {
        "stepz": 3,
        "group_size": 0,
        "optimizer": {"learning_rate": -1.0, "b1": 2.0},
        "sampling": {"top_pp": 0.5, "temperature": -1.0},
        "mesh": 7,
    }
    with pytest.raises(ValueError) as caught:
        from_dict(TrainConfig, values)
    message = str(caught.value)
    for problem in (
        "did you mean 'steps'",
        "group_size must be an integer from 1 on, got 0",
        "optimizer.learning_rate must be a positive number, got -1.0",
        "optimizer.b1 must be in [0, 1)",
        "sampling.top_pp is not a field",
        "sampling.temperature must be a number not below 0",
        "mesh must be a mapping",
    ):
        assert problem in message, problem
    assert "\n" not in message


# What differs from DeepSeekMath's clip 0.2, KL 0.04 (k3), mean over sequences.
PAPERS = {
    "softmax": {},
    "likelihood": {
        "surrogate": "likelihood",
        "aggregation": "sequence_sum",
        "kl_coef": 0.0,
    },
    # DeepSeekMath, section 4.2: a KL coefficient of 0.04; outcome supervision: rewards
    # normalized by their group's mean and deviation.
    "grpo": {"advantage": "standardized"},
    # Dr. GRPO, figure 1: no division by the deviation, none by the response length.
    "dr_grpo": {"advantage": "centered", "aggregation": "fixed_length", "kl_coef": 0.0},
    # DAPO, section 4.1: clip 0.2 below and 0.28 above, token-level loss, no KL,
    # dynamic sampling.
    "dapo": {
        "advantage": "standardized",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "aggregation": "token_mean",
        "kl_coef": 0.0,
        "overlong_share": 0.2,
        "resample_limit": 4,
    },
    # GSPO, section 5.1: clipping ranges 3e-4 and 4e-4 of the sequence's ratio.
    "gspo": {
        "advantage": "standardized",
        "ratio_level": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "kl_coef": 0.0,
    },
    # MiniMax-M1, eq. 4: token-level, no KL; the cap of the weight was tuned.
    "cispo": {
        "advantage": "standardized",
        "surrogate": "cispo",
        "cispo_max_weight": 5.0,
        "aggregation": "token_mean",
        "kl_coef": 0.0,
    },
    # RLOO, eq. 8: REINFORCE on the sequence's log-probability.
    "rloo": {
        "advantage": "leave_one_out",
        "surrogate": "likelihood",
        "aggregation": "sequence_sum",
        "kl_in": "reward",
    },
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_numbers_of_its_paper(name):
    deepseek = {
        "advantage": "softmax",
        "softmax_temperature": 1.0,
        "surrogate": "clip",
        "ratio_level": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "cispo_max_weight": None,
        "kl_coef": 0.04,
        "kl_in": "loss",
        "kl_estimator": "k3",
        "entropy_coef": 0.0,
        "router_aux_loss_coef": 0.0,
        "sampler_correction_cap": None,
        "aggregation": "sequence_mean",
        "mask_truncated": False,
        "overlong_share": None,
        "std_over": "group",
        "resample_limit": 0,
        "reference_every": None,
    }
    assert to_dict(ObjectiveConfig.preset(name)) == deepseek | PAPERS[name]


def test_the_default_objective_is_the_softmax_preset():
    assert ObjectiveConfig() == ObjectiveConfig.preset("softmax")
    assert TrainConfig().objective == ObjectiveConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_every_setting_that_it_changes(name):
    assert list(ObjectiveConfig.preset(name).without_effect()) == []


@pytest.mark.parametrize(
    ("changed", "ignored"),
    [
        ({"cispo_max_weight": 5.0}, ["cispo_max_weight 5.0"]),
        ({"surrogate": "cispo", "cispo_max_weight": 5.0}, []),
        (
            {"surrogate": "cispo", "cispo_max_weight": 5.0, "dual_clip": 3.0},
            ["dual_clip 3.0"],
        ),
        (
            {"surrogate": "likelihood", "clip_low": 0.1, "clip_high": 0.3},
            ["clip_low 0.1", "clip_high 0.3"],
        ),
        ({"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0}, []),
        (
            {"advantage": "centered", "softmax_temperature": 2.0},
            ["softmax_temperature"],
        ),
        ({"std_over": "batch"}, ["std_over 'batch'"]),
        ({"advantage": "standardized", "std_over": "batch"}, []),
        ({"kl_coef": 0.0, "kl_estimator": "k2"}, ["kl_estimator 'k2'"]),
        ({"kl_in": "reward", "kl_estimator": "k2"}, []),
    ],
)
def test_changed_settings_that_an_objective_ignores_are_named(changed, ignored):
    lines = list(ObjectiveConfig(**changed).without_effect())
    assert len(lines) == len(ignored)
    for line, words in zip(lines, ignored, strict=True):
        assert line.startswith(f"objective.{words}") and " has no effect: " in line


def test_an_unknown_preset_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'ppo' is unknown; use one of softmax, like"):
        ObjectiveConfig.preset("ppo")


def test_the_docstring_tells_every_preset():
    text = ObjectiveConfig.preset.__doc__
    assert [name for name in PRESETS if f"``{name}``" not in text] == []


def test_what_is_left_out_suits_the_model():
    embedded, other = TrainConfig(), TrainConfig(model="Qwen/Qwen2.5-0.5B-Instruct")
    assert embedded.model == EMBEDDED
    # Eight tokens hold any answer of the arithmetic task; a chat model thinks aloud.
    assert (embedded.max_new_tokens, other.max_new_tokens) == (8, 256)
    # A small model moves by 2e-4; a pretrained one is broken by it.
    assert embedded.optimizer.learning_rate == 2e-4
    assert other.optimizer.learning_rate == 1e-6
    resolved = {"steps", "prompts_per_step", "max_new_tokens", "eval_every"}
    resolved |= {"eval_prompts", "optimizer"}
    for config in (embedded, other):
        assert all(vars(config)[name] is not None for name in resolved)
    changed = {line.partition(":")[0] for line in differences(embedded, other)}
    assert {name.partition(".")[0] for name in changed} <= resolved | {"model"}


@pytest.mark.parametrize("model", [EMBEDDED, "some/model"])
def test_what_is_given_is_kept(model):
    given_values = {
        "steps": 5,
        "max_new_tokens": 6,
        "eval_every": 0,
        "eval_prompts": 0,
        "optimizer": OptimizerConfig(learning_rate=3e-5),
    }
    config = TrainConfig(model=model, **given_values)
    assert {name: vars(config)[name] for name in given_values} == given_values


def test_another_model_in_a_resolved_config_keeps_all_its_values():
    base = TrainConfig(steps=5)
    other = dataclasses.replace(base, model="some/model")
    assert differences(base, other) == ["model: 'embedded' and 'some/model'"]


def test_updates_per_step_counts_passes_and_minibatches():
    config = TrainConfig(prompts_per_step=12, updates_per_rollout=2, minibatches=3)
    assert config.updates_per_step == 6  # 2 passes over 3 minibatches


def test_configs_are_frozen_and_hashable():
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3
    assert hash(config) == hash(TrainConfig())
    assert len({config, TrainConfig(), TrainConfig(seed=1)}) == 2


def test_fields_are_given_by_name_only():
    with pytest.raises(TypeError):
        TrainConfig("some/model")


OBJECTIVES = st.builds(
    ObjectiveConfig,
    advantage=st.sampled_from(["softmax", "standardized", "centered"]),
    clip_high=st.floats(0.2, 10),
    kl_coef=st.floats(1e-12, 1e3) | st.integers(1, 3),
    dual_clip=st.none() | st.floats(1, 5, exclude_min=True),
    mask_truncated=st.booleans(),
)
CONFIGS = st.builds(
    TrainConfig,
    model=st.sampled_from([EMBEDDED, "some/model", "./a folder/ü.gguf", "1e3", "no"]),
    run_dir=st.none() | st.sampled_from(["runs/x", "null", "yes", "3"]),
    seed=st.integers(0, 2**32 - 1),
    prompts_per_step=st.just(16),
    objective=OBJECTIVES,
    sampling=st.builds(
        SamplingConfig,
        top_p=st.none() | st.floats(0, 1, exclude_min=True),
        stop_ids=st.none() | st.lists(st.integers(0, 2**31)).map(tuple),
    ),
    optimizer=st.builds(
        OptimizerConfig, learning_rate=st.floats(0, 1, exclude_min=True)
    ),
    rewards=st.builds(
        RewardsConfig,
        weights=st.none() | st.lists(st.floats(-9, 9), max_size=3).map(tuple),
    ),
)


@given(CONFIGS)
def test_a_config_comes_back_from_yaml(config):
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    again = from_dict(TrainConfig, yaml.safe_load(text))
    assert again == config
    assert differences(again, config) == []


def test_whole_numbers_stand_for_floats_in_yaml():
    values = yaml.safe_load("{objective: {kl_coef: 0, clip_high: 1}, seed: 3}")
    config = from_dict(TrainConfig, values)
    assert config.objective == ObjectiveConfig(kl_coef=0.0, clip_high=1.0)
    assert differences(config, from_dict(TrainConfig, to_dict(config))) == []


def test_not_a_number_in_yaml_is_refused():
    with pytest.raises(ValueError, match=r"objective\.kl_coef .* got nan"):
        from_dict(TrainConfig, yaml.safe_load("objective: {kl_coef: .nan}"))


def test_a_misspelled_key_of_a_nested_section_is_named_with_its_path():
    with pytest.raises(ValueError, match=r"objective\.kl_coeff is not .* 'kl_coef'"):
        from_dict(TrainConfig, {"objective": {"kl_coeff": 0.1}})
    with pytest.raises(ValueError, match="groupsize is not .* 'group_size'"):
        from_dict(TrainConfig, {"groupsize": 4})


# In the order of the fields: every process must collect the same tests.
SECTIONS = [
    TrainConfig,
    *(
        type(value)
        for value in vars(TrainConfig()).values()
        if isinstance(value, Section)
    ),
]


@pytest.mark.parametrize("name", TRL_NAMES)
def test_a_name_of_trl_is_answered_alike_in_python_yaml_and_flags(name):
    config, here = TrainConfig(), TRL_NAMES[name]
    assert here in dotted(to_dict(config))
    for refused in (
        lambda: TrainConfig(**{name: 1}),
        lambda: dataclasses.replace(config, **{name: 1}),
        lambda: from_dict(TrainConfig, {name: 1}),
    ):
        with pytest.raises(
            ValueError, match=f"^{name} is not .* '{here}' here .*trl.md"
        ):
            refused()
    flag = here.replace("_", "-")
    with pytest.raises(ValueError, match=f"^{name} is --{flag} here.*trl.md"):
        base_config([f"--{name}", "1"], prog="grpo-jax train")


def dotted(values, prefix=""):
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_what_is_no_field_is_answered_by_the_nearest_one(cls):
    for one in dataclasses.fields(cls):
        with pytest.raises(ValueError, match=f"{cls.__name__}; did .*{one.name}'"):
            cls(**{one.name + "z": 1})
    with pytest.raises(ValueError, match=f"{cls.__name__}; fields: "):
        cls(qqqq=1)


def test_a_field_of_a_section_is_found_from_outside():
    with pytest.raises(ValueError, match="did you mean 'optimizer.learning_rate'"):
        TrainConfig(learning_rate=1e-5)
