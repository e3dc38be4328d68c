"""GGUF files: tensors, configuration, and what is refused."""

import dataclasses
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import abstract_params
from grpo_jax.models.families import FAMILIES
from grpo_jax.models.rope import RopeConfig, inverse_frequencies
from grpo_jax.weights import load_pretrained, save_pretrained
from grpo_jax.weights._gguf_file import StoredTensor, read_file
from grpo_jax.weights.pretrained import read_model_config

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory, untied, tools):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return tools.write_gguf(path, untied)


def test_a_llama_file_gives_the_model_that_was_converted(gguf_path, untied, tools):
    loaded = load_pretrained(gguf_path)
    tools.assert_same_bits(loaded.params, untied.params)
    assert loaded.config == untied.config
    np.testing.assert_array_equal(tools.make_logits(loaded), tools.make_logits(untied))


def test_rows_in_the_order_of_the_file_would_be_another_model(untied, tools):
    # The test above cannot pass by chance: the reordering changes the logits.
    layers = untied.params["layers"]
    kernel = layers["attn"]["q"]["kernel"]
    rows = tools.gguf_pair_rows(np.asarray(kernel[0]).T, 4).T
    changed = jax.tree.map(lambda leaf: leaf, untied.params)
    changed["layers"]["attn"]["q"]["kernel"] = kernel.at[0].set(jnp.asarray(rows))
    other = tools.make_logits(type(untied)(untied.model, changed, None, None))
    assert np.abs(other - tools.make_logits(untied)).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_what_their_quantization_keeps(tmp_path, tied, tools, kind):
    import gguf

    quantized = lambda name: "F32" if "norm" in name else kind  # noqa: E731
    path = tools.write_gguf(tmp_path / "model.gguf", tied, kind=quantized)
    given = tools.flatten(load_pretrained(path).params)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, values in tools.flatten(tied.params).items():
        if "norm" in name:
            np.testing.assert_array_equal(given[name], values)
            continue
        stored = np.asarray(values)
        stored = stored.swapaxes(-1, -2) if name.endswith("kernel") else stored
        kept = gguf.dequantize(gguf.quantize(stored, quantization), quantization)
        kept = kept.swapaxes(-1, -2) if name.endswith("kernel") else kept
        np.testing.assert_array_equal(given[name], kept, err_msg=name)


@pytest.mark.parametrize("kind", [*KINDS, "Q4_K", "Q6_K"])
def test_any_bytes_are_dequantized_as_by_the_library(kind):
    import gguf

    named = gguf.GGMLQuantizationType[kind]
    size, width = gguf.GGML_QUANT_SIZES[named]
    # More blocks than are dequantized together.
    shape = 6, 400 * width
    raw = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    tensor = StoredTensor("x", kind, (6, 400 * size), raw)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, named)
        np.testing.assert_array_equal(tensor.values(), expected)
        np.testing.assert_array_equal(tensor.values(slice(1, 4)), expected[1:4])


def test_fields_are_those_that_the_library_reads(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    numbers = {"uint8": 200, "int8": -3, "uint16": 60_000, "int16": -300}
    numbers |= {"uint32": 1 << 31, "int32": -(1 << 30), "float32": 0.1}
    numbers |= {"uint64": 1 << 63, "int64": -(1 << 62), "float64": 0.1, "bool": True}
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(f"llama.{kind}", value)
    writer.add_string("general.name", "caf\u00e9")
    for name, values in {
        "words": ["a", "", "\u4e2d"],
        "floats": [0.1, -2.5],
        "whole": [-1, 5],
        "flags": [True, False],
    }.items():
        writer.add_array(f"llama.{name}", values)
    writer.add_custom_alignment(64)
    content = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("first", content)
    writer.add_tensor("second", content + 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields, tensors = read_file(tmp_path / "x.gguf")
    library = gguf.GGUFReader(tmp_path / "x.gguf").fields.items()
    assert fields == {k: f.contents() for k, f in library if k[:5] != "GGUF."}
    np.testing.assert_array_equal(tensors["first"].values(), content)
    np.testing.assert_array_equal(tensors["second"].values(), content + 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b"blk.1.attn_q.weight",
            b"blk.0.attn_q.weight",
            "has blk.0.attn_q.weight twice",
        ),
        (b"GGUF\x03", b"GGUF\x09", "version 9"),
        (b"GGUF\x03\x00\x00\x00", b"GGUF\x00\x00\x00\x03", "little-endian"),
    ],
)
def test_damaged_records_are_refused_with_the_reason(
    tmp_path, gguf_path, old, new, message
):
    content = gguf_path.read_bytes()
    assert old in content and len(old) == len(new)
    path = tmp_path / "m.gguf"
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"m\.gguf.*{message}"):
        load_pretrained(path)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwen_files_are_not_reordered(tmp_path, tools, kind):
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
    model = tools.make_pretrained(architectures=[architecture], model_type=kind)
    path = tools.write_gguf(tmp_path / "model.gguf", model, arch=kind)
    loaded = load_pretrained(path)
    tools.assert_same_bits(loaded.params, model.params)
    assert loaded.config == model.config


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
YARN_FIELDS = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
# Name -> options of config.json, architecture of the file, and its fields.
NEWER = {
    "SmolLM3": ({"num_hidden_layers": 4}, "smollm3", {}),
    "Olmo2": ({}, "olmo2", {}),
    "Olmo3": (
        {
            "rope_theta": None,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1000.0, **YARN},
                "sliding_attention": {"rope_theta": 1000.0, "rope_type": "default"},
            },
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "olmo2",
        {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, False],
            "rope.scaling.yarn_attn_factor": 1.138629,  # 1 + 0.1 log 4
            "rope.scaling.yarn_ext_factor": 1.0,
            **{f"rope.scaling.{key}": value for key, value in YARN_FIELDS.items()},
        },
    ),
    "Phi3": (
        {
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 64,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.5],
                "attention_factor": 1.19,
            },
        },
        "phi3",
        {
            "context_length": 128,
            "rope.dimension_count": 8,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": 1.19,
            "attention.sliding_window": 0,
        },
    ),
    "Granite": (
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        "granite",
        {
            "attention.scale": 0.2,
            "embedding_scale": 12.0,
            "residual_scale": 0.22,
            "logit_scale": 8.0,
        },
    ),
    "Exaone4": (
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "exaone4",
        {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, False],
        },
    ),
    "SeedOss": ({"attention_out_bias": False}, "seed_oss", {}),
    "Glm4": ({"attention_bias": True}, "glm4", {"rope.dimension_count": 8}),
    "HunYuanDenseV1": (
        {"rope_scaling": {"rope_type": "dynamic", "alpha": 7.0}},
        "hunyuan-dense",
        # 1000 * 7 ** (16 / 14), which is all that such a file says.
        {"rope.freq_base": 9243.285, "rope.scaling.type": "none"},
    ),
}
# As llama.cpp names tensors whose names differ from those of the other families.
NAMED = {
    "SeedOss": "blk.0.post_attention_norm.weight",
    "Phi3": "blk.0.attn_qkv.weight",
    "Glm4": "blk.1.post_ffw_norm.weight",
    "Olmo2": "blk.1.post_attention_norm.weight",
}


@pytest.mark.parametrize("name", NEWER)
def test_files_of_newer_families_give_the_model_that_was_converted(
    tmp_path, tools, name
):
    options, arch, fields = NEWER[name]
    architecture = f"{name}ForCausalLM"
    kind = FAMILIES[architecture].model_type
    model = tools.make_pretrained(
        architectures=[architecture], model_type=kind, **options
    )
    scaling = options.get("rope_scaling") or {}
    factors = {
        f"rope_factors_{length}__weight": np.float32(scaling[f"{length}_factor"])
        for length in ("short", "long")
        if f"{length}_factor" in scaling
    }
    fields = {f"{arch}.{key}": value for key, value in fields.items()}
    path = tools.write_gguf(
        tmp_path / "m.gguf", model, arch=arch, fields=fields, **factors
    )
    loaded = load_pretrained(path)
    tools.assert_same_bits(loaded.params, model.params)
    thetas = [rope.theta for rope in model.config.rope]
    assert [rope.theta for rope in loaded.config.rope] == pytest.approx(thetas)
    kept = dataclasses.replace(
        loaded.config,
        rope=tuple(
            dataclasses.replace(rope, theta=theta)
            for rope, theta in zip(loaded.config.rope, thetas, strict=True)
        ),
    )
    assert kept == model.config
    assert NAMED.get(name, "token_embd.weight").encode() in path.read_bytes()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize(
    ("name", "arch", "options"),
    [
        ("Mixtral", "llama", {"num_local_experts": 3}),
        ("Qwen3Moe", "qwen3moe", {"num_experts": 3, "moe_intermediate_size": 32}),
    ],
)
def test_the_experts_of_a_layer_are_one_tensor_of_a_file(
    tmp_path, tools, kind, name, arch, options
):
    architecture = f"{name}ForCausalLM"
    fields = {"expert_count": 3, "expert_used_count": 2}
    if arch == "qwen3moe":
        options = options | {"norm_topk_prob": True}
        fields["expert_feed_forward_length"] = 32
    model = tools.make_pretrained(
        architectures=[architecture],
        model_type=FAMILIES[architecture].model_type,
        num_experts_per_tok=2,
        **options,
    )
    path = tools.write_gguf(
        tmp_path / "m.gguf",
        model,
        arch=arch,
        kind=lambda name: kind if "experts" in name else "F32",
        fields={f"{arch}.{key}": value for key, value in fields.items()},
    )
    assert b"blk.1.ffn_down_exps.weight" in path.read_bytes()
    loaded = load_pretrained(path)
    assert loaded.config == model.config
    if kind == "F32":
        tools.assert_same_bits(loaded.params, model.params)
    given, expected = tools.flatten(loaded.params), tools.flatten(model.params)
    for part in ("gate", "up", "down"):
        name = f"layers/mlp/{part}"
        # Half a step of 1 / 127 of the largest of 32.
        error = np.abs(given[name] - expected[name]).max()
        assert error < 0.005 * np.abs(expected[name]).max()


def test_granite_without_rotation_is_refused(tmp_path, tools):
    options, arch, fields = NEWER["Granite"]
    model = tools.make_pretrained(
        architectures=["GraniteForCausalLM"], model_type="granite", **options
    )
    fields = fields | {"rope.scaling.finetuned": False}
    fields = {f"granite.{key}": value for key, value in fields.items()}
    path = tools.write_gguf(tmp_path / "m.gguf", model, arch=arch, fields=fields)
    with pytest.raises(ValueError, match="finetuned=False is not supported"):
        read_model_config(path)


def test_granite_without_multipliers_is_scaled_as_usual(tmp_path, tools):
    model = tools.make_pretrained(
        architectures=["GraniteForCausalLM"],
        model_type="granite",
        attention_multiplier=0.25,  # 16 ** -0.5
    )
    path = tools.write_gguf(tmp_path / "m.gguf", model, arch="granite")
    assert read_model_config(path) == model.config


def test_exaone_4_without_windows_rotates_in_all_layers(tmp_path, tools):
    model = tools.make_pretrained(
        architectures=["Exaone4ForCausalLM"],
        model_type="exaone4",
        sliding_window=None,
        layer_types=["full_attention"] * 2,
        rope_theta=500_000.0,
    )
    rope, factors = llama3_factors(16.0)
    path = tools.write_gguf(
        tmp_path / "m.gguf", model, arch="exaone4", rope_freqs__weight=factors
    )
    config = read_model_config(path)
    assert (config.rope, config.layer_rope) == ((rope,), (0, 0))
    assert config.layer_window == (None, None)


def test_yarn_is_read(tmp_path, untied, tools):
    fields = {f"llama.rope.scaling.{key}": value for key, value in YARN_FIELDS.items()}
    fields |= {"llama.rope.scaling.yarn_beta_fast": 16.0}
    path = tools.write_gguf(tmp_path / "m.gguf", untied, fields=fields)
    hf = {**tools.HF, "attention_bias": True, "mlp_bias": True}
    hf["rope_scaling"] = YARN | {"beta_fast": 16.0}
    assert read_model_config(path) == ModelConfig.from_hf(hf)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, untied, tools):
    """The folder of a model in three files."""
    folder = tmp_path_factory.mktemp("parts")
    tools.write_gguf(folder / "m.gguf", untied, per_part=12)
    return folder


def test_a_model_in_parts_is_the_model_in_one_file(parts, untied, tools):
    assert len(list(parts.iterdir())) == 3
    loaded = load_pretrained(parts / "m-00001-of-00003.gguf")
    tools.assert_same_bits(loaded.params, untied.params)
    assert loaded.config == untied.config


def test_another_part_than_the_first_is_refused_with_its_name(parts):
    with pytest.raises(ValueError, match=r"-00002.* load .*m-00001-of-00003\.gguf"):
        load_pretrained(parts / "m-00002-of-00003.gguf")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda part, third: part.unlink(), r"missing: m-00002-of-00003\.gguf"),
        (lambda part, third: part.write_bytes(third), "00002.* is not part 2 of 3"),
        (lambda part, third: part.write_bytes(b"GGUF"), "00002.* not a complete GGUF"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    parts, tmp_path, change, problem
):
    for part in parts.iterdir():
        shutil.copy(part, tmp_path)
    second, third = (tmp_path / f"m-0000{i}-of-00003.gguf" for i in (2, 3))
    change(second, third.read_bytes())
    with pytest.raises(ValueError, match=problem):
        read_model_config(tmp_path / "m-00001-of-00003.gguf")


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_gemma_norms_are_stored_with_one_added(tmp_path, tools, kind):
    gemma3 = kind == "gemma3"
    model = tools.make_pretrained(
        architectures=["Gemma3ForCausalLM" if gemma3 else "Gemma2ForCausalLM"],
        model_type="gemma3_text" if gemma3 else "gemma2",
        tie_word_embeddings=True,
        query_pre_attn_scalar=16,
        sliding_window=8,
        num_hidden_layers=7,
        **({} if gemma3 else {"attn_logit_softcapping": 20.0}),
    )
    fields = {f"{kind}.attention.sliding_window": 8}
    if not gemma3:
        fields |= {
            "gemma2.attn_logit_softcapping": 20.0,
            "gemma2.final_logit_softcapping": 30.0,
        }
    path = tools.write_gguf(tmp_path / "m.gguf", model, arch=kind, fields=fields)
    loaded = load_pretrained(path)
    assert loaded.config == model.config
    for name, values in tools.flatten(model.params).items():
        given = tools.flatten(loaded.params)[name]
        # 1 + w and back loses the last bits of w.
        np.testing.assert_allclose(given, values, atol=2e-7, err_msg=name)


def test_windows_and_the_second_rotary_base_of_gemma_3_are_read(tmp_path, tools):
    model = tools.make_pretrained(
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        tie_word_embeddings=True,
        query_pre_attn_scalar=16,
        sliding_window=8,
        num_hidden_layers=3,
        rope_local_base_freq=500.0,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    fields = {
        "gemma3.attention.sliding_window": 8,
        "gemma3.attention.sliding_window_pattern": [False, True, False],
        "gemma3.rope.freq_base_swa": 500.0,
    }
    path = tools.write_gguf(tmp_path / "m.gguf", model, arch="gemma3", fields=fields)
    assert read_model_config(path) == model.config


def llama3_factors(factor, high=4.0):
    settings = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": 8192,
    }
    scaled = RopeConfig(theta=500_000.0, kind="llama3", **settings)
    plain = inverse_frequencies(RopeConfig(theta=500_000.0), head_dim=16)
    return scaled, plain / inverse_frequencies(scaled, head_dim=16)


def test_llama3_scaling_is_recovered_from_the_divisors(tmp_path, tools):
    model = tools.make_pretrained(rope_theta=500_000.0)
    rope, factors = llama3_factors(32.0)
    path = tools.write_gguf(tmp_path / "m.gguf", model, rope_freqs__weight=factors)
    assert load_pretrained(path).config.rope == (rope,)


def test_other_divisors_are_refused(tmp_path, tools):
    model = tools.make_pretrained(rope_theta=500_000.0)
    _, factors = llama3_factors(32.0, high=16.0)
    path = tools.write_gguf(tmp_path / "m.gguf", model, rope_freqs__weight=factors)
    with pytest.raises(ValueError, match="m.gguf: rope_freqs.weight are not those"):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"split.count": 3}, "is one part of 3.*such as model-00001-of-00003.gguf"),
        ({"llama.expert_count": 8}, "it has no 'expert_used_count'"),
        ({"llama.rope.dimension_count": 8}, "rotary embeddings of 8 of 16"),
        (
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0},
            "rotary scaling 'longrope'",
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_attn_factor": 1.0,
            },
            "yarn_attn_factor=1.0 is not supported; only 1.1386 is",
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_log_multiplier": 0.1,
            },
            "not supported: llama.rope.scaling.yarn_log_multiplier=0.1",
        ),
        ({"llama.rope.freq_base_swa": 5.0}, "llama.rope.freq_base_swa=5.0"),
        ({"llama.rope.dimension_sections": [2, 2]}, "rope.dimension_sections=2"),
        ({"llama.residual_scale": 0.5}, "not supported: llama.residual_scale=0.5"),
        ({"llama.attention.causal": False}, "llama.attention.causal=False"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length=8"),
        ({"llama.attention.sliding_window": 8}, "llama.attention.sliding_window=8"),
        ({"llama.nobody_knows": [1, 1]}, "llama.nobody_knows=1"),
        ({"llama.feed_forward_length": [96, 64]}, "feed_forward_length differs"),
        ({"llama.context_length": "long"}, "max_position_embeddings must be"),
    ],
)
def test_unsupported_models_are_refused_by_file(
    tmp_path, untied, tools, fields, problem
):
    path = tools.write_gguf(tmp_path / "m.gguf", untied, fields=fields)
    with pytest.raises(ValueError, match=rf"m\.gguf.*{problem}"):
        load_pretrained(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0},  # llama.cpp takes it as linear
        {"llama.rope.scale_linear": 4.0},  # the name of files before 2023-11
    ],
)
def test_linear_scaling_is_read(tmp_path, untied, tools, fields):
    path = tools.write_gguf(tmp_path / "m.gguf", untied, fields=fields)
    (rope,) = load_pretrained(path).config.rope
    assert (rope.kind, rope.factor) == ("linear", 4.0)


def test_fields_that_change_nothing_are_accepted(tmp_path, untied, tools):
    fields = {
        "llama.vocab_size": 48,
        "llama.tensor_data_layout": "Meta AI original pth",
        "llama.attention.value_length": 16,
        "llama.attention.causal": True,
        "llama.use_parallel_residual": False,
        "llama.attention.head_count_kv": [2, 2],  # the same in each layer
        "training.epochs": 3,
    }
    path = tools.write_gguf(tmp_path / "m.gguf", untied, fields=fields)
    assert read_model_config(path) == untied.config


def test_a_file_without_a_size_is_refused_by_its_key(tmp_path, untied, tools):
    path = tools.write_gguf(tmp_path / "m.gguf", untied, arch="qwen2")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"qwen2.block_count", b"qwen2.block_kount"))
    with pytest.raises(ValueError, match=r"m\.gguf: it has no 'block_count'"):
        read_model_config(path)


def test_an_unknown_architecture_is_refused_by_name(tmp_path, untied, tools):
    path = tools.write_gguf(tmp_path / "m.gguf", untied, arch="mamba")
    with pytest.raises(ValueError, match=r"m\.gguf: architecture 'mamba'"):
        load_pretrained(path)


def test_a_type_that_cannot_be_dequantized_is_refused_by_name(tmp_path, untied, tools):
    path = tools.write_gguf(tmp_path / "m.gguf", untied)
    import gguf

    tensor = next(
        t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight"
    )
    content = bytearray(path.read_bytes())
    # The type is the 32-bit number before the last field of the tensor's record.
    at = tensor.field.offset + sum(part.nbytes for part in tensor.field.parts[:4])
    content[at : at + 4] = int(gguf.GGMLQuantizationType.I32).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"blk.0.ffn_up.weight in .*m\.gguf has type I32"
    ):
        load_pretrained(path)


def test_unknown_tensors_are_refused_with_the_file(tmp_path, untied, tools):
    path = tools.write_gguf(
        tmp_path / "m.gguf", untied, blk__0__extra=np.zeros(3, np.float32)
    )
    with pytest.raises(ValueError, match=r"1 unexpected \(blk.0.extra in .*m\.gguf\)"):
        load_pretrained(path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path, gguf_path, part):
    content = gguf_path.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"cut\.gguf is not a complete GGUF file"):
        load_pretrained(path)


def test_a_file_of_another_format_is_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ValueError, match=r"model\.gguf is not a complete GGUF file"):
        load_pretrained(path)


def test_a_sharded_load_is_the_same(gguf_path, untied, tools):
    mesh = jax.make_mesh((8,), ("fsdp",))
    split = lambda leaf: jax.NamedSharding(  # noqa: E731
        mesh, jax.P(*[None] * (leaf.ndim - 1), "fsdp")
    )
    place = lambda model: jax.tree.map(split, abstract_params(model))  # noqa: E731
    loaded = load_pretrained(gguf_path, sharding=place)
    tools.assert_same_bits(loaded.params, untied.params)


def test_an_export_of_a_gguf_model_is_the_same_model(gguf_path, tmp_path, tools):
    loaded = load_pretrained(gguf_path)
    save_pretrained(tmp_path / "hf", loaded)
    again = load_pretrained(tmp_path / "hf")
    tools.assert_same_bits(again.params, loaded.params)
    assert again.config == loaded.config
    messages = [{"role": "user", "content": "the 12 cats"}]
    ids = loaded.tokenizer.encode_prompt(messages)
    assert again.tokenizer.encode_prompt(messages) == ids
    assert again.tokenizer.stop_ids == loaded.tokenizer.stop_ids


def greedy(loaded, ids, *, length=64):
    """The ids of a text and of its likeliest continuation, up to a stop token."""
    model = loaded.model

    @jax.jit
    def next_token(params, tokens, count):
        variables = {"params": params}
        hidden = model.apply(variables, tokens, count, method=model.forward)
        head = model.apply(variables, method=model.head)
        return (hidden[0, count[0] - 1] @ head).argmax()

    tokens, count = np.zeros((1, length), np.int32), len(ids)
    tokens[0, :count] = ids
    while count < length:
        token = int(next_token(loaded.params, tokens, np.array([count])))
        if token in loaded.tokenizer.stop_ids:
            break
        tokens[0, count] = token
        count += 1
    return loaded.tokenizer.decode(tokens[0, len(ids) : count])


def from_file(variable, model):
    return [
        pytest.mark.slow,
        pytest.mark.skipif(
            variable not in os.environ, reason=f"{variable} names no {model} file"
        ),
    ]


@pytest.mark.parametrize(
    ("variable", "prompt", "length", "answer"),
    [
        pytest.param(
            "GRPO_JAX_GGUF",
            [{"role": "user", "content": "What is the capital of France?"}],
            64,
            "The capital of France is Paris.",
            marks=from_file("GRPO_JAX_GGUF", "SmolLM2-135M-Instruct"),
        ),
        pytest.param(
            "GRPO_JAX_GEMMA_GGUF",
            "The capital of France is",
            14,
            " the capital of the country of France.",
            marks=from_file("GRPO_JAX_GEMMA_GGUF", "gemma-3-270m (Q4_K_M)"),
        ),
    ],
)
def test_a_published_file_knows_the_capital_of_france(variable, prompt, length, answer):
    loaded = load_pretrained(os.environ[variable])
    ids = loaded.tokenizer.encode_prompt(prompt)
    assert greedy(loaded, ids, length=length) == answer
