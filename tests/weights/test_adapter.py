"""Adapters in PEFT's own files: what it wrote we read, and what we write it reads."""

import dataclasses
import json
import pathlib
from importlib import resources

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.lora import init_lora, merge_lora
from grpo_jax.weights import load_pretrained
from grpo_jax.weights._names import parameter_table
from grpo_jax.weights.adapter import Adapter, load_adapter, save_adapter

REFERENCES = pathlib.Path(__file__).parent / "references"
REFERENCE = REFERENCES / "adapter.npz"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@dataclasses.dataclass(frozen=True)
class Reference:
    """A base model, and the folder in which PEFT saved adapters of it."""

    config: ModelConfig
    params: dict
    tokens: np.ndarray
    logits: np.ndarray
    folder: pathlib.Path
    weights: dict


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return read_reference(REFERENCE, tmp_path_factory.mktemp("peft"))


def read_reference(file, folder):
    with np.load(file) as data:
        config = ModelConfig.from_hf(json.loads(str(data["config"])))
        weights = {
            name.removeprefix("weights/"): data[name].astype(np.float32)
            for name in data.files
            if name.startswith("weights/")
        }
        (folder / "adapter_config.json").write_text(str(data["adapter_config"]))
        (folder / "adapter_model.safetensors").write_bytes(data["adapter_model"])
        tokens, logits = data["tokens"], data["logits"]
    flat = {}
    for row in parameter_table(config):
        parts = [weights[name] for name in row.names]
        parts = [part.T for part in parts] if row.transposed else parts
        flat[row.path] = np.stack(parts).reshape(row.shape)
    params = traverse_util.unflatten_dict(flat, sep="/")
    return Reference(config, params, tokens, logits, folder, weights)


@pytest.fixture
def adapter(reference):
    return load_adapter(reference.folder, reference.config)


def logits_with(reference, adapter):
    config = dataclasses.replace(reference.config, lora_scale=adapter.scale)
    model, lengths = Decoder(config), np.full(len(reference.tokens), 11)

    def logits(variables):
        hidden = model.apply(variables, reference.tokens, lengths, method=model.forward)
        return hidden @ model.apply(variables, method=model.head)

    return jax.jit(logits)({"params": reference.params, "lora": adapter.params})


def test_adapters_of_peft_give_its_logits(reference, adapter):
    assert (adapter.rank, adapter.alpha) == (3, 5.0)
    assert adapter.targets == ("q", "k", "v", "o", "gate", "up", "down")
    error = np.abs(logits_with(reference, adapter) - reference.logits).max()
    assert error < 1e-5 * reference.logits.std()


def test_adapters_of_experts_give_the_logits_of_peft(tmp_path):
    """One for each expert. PEFT joins them, as transformers 5 joins the experts."""
    reference = read_reference(REFERENCES / "adapter_experts.npz", tmp_path)
    adapter = load_adapter(tmp_path, reference.config)
    assert adapter.targets == ("q", "k", "v", "o", "gate", "up", "down")
    assert adapter.params["layers"]["mlp"]["down"]["a"].shape == (2, 3, 12, 3)
    error = np.abs(logits_with(reference, adapter) - reference.logits).max()
    assert error < 1e-5 * reference.logits.std()
    save_adapter(tmp_path / "out", adapter, reference.config)
    file = "adapter_model.safetensors"
    theirs = safetensors.numpy.load_file(tmp_path / file)
    ours = safetensors.numpy.load_file(tmp_path / "out" / file)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    options = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["target_modules"] == sorted(expected["target_modules"])
    # What PEFT writes for joined experts.
    copy_of(reference, tmp_path, options={"target_parameters": ["experts.down_proj"]})
    with pytest.raises(ValueError, match="not supported: target_parameters="):
        load_adapter(tmp_path, reference.config)


@pytest.mark.parametrize(
    ("targets", "told"),
    [("q", ""), ("down", ""), ("gate up down", ""), ("gate up", "down")]
    + [("gate down", "up"), ("q up", "gate, down")],
)
def test_adapters_of_experts_that_peft_loses_are_told(targets, told, tmp_path, caplog):
    """Those of gate and up without down: PEFT 0.21.2 leaves them 0, with a warning."""
    config = read_reference(REFERENCES / "adapter_experts.npz", tmp_path).config
    names = tuple(targets.split())
    params = init_lora(Decoder(config), jax.random.key(0), rank=2, targets=names)
    adapter = Adapter(params=params, alpha=4.0, base_name=None)
    save_adapter(tmp_path / "out", adapter, config)
    assert f"without those of {told};" in caplog.text if told else not caplog.messages


def test_what_is_written_is_what_peft_wrote(reference, adapter, tmp_path):
    save_adapter(tmp_path / "out", adapter, reference.config)
    theirs = safetensors.numpy.load_file(reference.folder / "adapter_model.safetensors")
    ours = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = json.loads((reference.folder / "adapter_config.json").read_text())
    # PEFT saves a set, in no order.
    for options in (written, expected):
        options["target_modules"] = sorted(options["target_modules"])
    assert written == {name: expected.get(name) for name in written}
    # What we leave out is off.
    rest = {name: expected[name] for name in expected.keys() - written.keys()}
    harmless = ("peft_version", "megatron_core", "qalora_group_size")
    assert not {n: v for n, v in rest.items() if v and n not in harmless}


def test_an_adapter_comes_back_with_its_bits(reference, adapter, tmp_path):
    kept = {name: adapter.params["layers"]["attn"][name] for name in ("v", "q")}
    fewer = Adapter(params={"layers": {"attn": kept}}, alpha=1.5, base_name="some/base")
    save_adapter(tmp_path / "out", fewer, reference.config)
    again = load_adapter(tmp_path / "out", reference.config)
    assert (again.alpha, again.base_name) == (1.5, "some/base")
    assert again.targets == ("q", "v") and again.scale == 0.5
    for name, factors in kept.items():
        for factor, values in factors.items():
            np.testing.assert_array_equal(
                again.params["layers"]["attn"][name][factor], values
            )


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("some/base", "some/base"),
        ("embedded", str(resources.files("grpo_jax") / "assets" / "arithmetic-1m")),
        (".", str(pathlib.Path.cwd())),
        (None, None),
    ],
)
def test_the_base_is_named_so_that_others_find_it(
    reference, adapter, tmp_path, name, written
):
    named = dataclasses.replace(adapter, base_name=name)
    save_adapter(tmp_path, named, reference.config)
    assert load_adapter(tmp_path, reference.config).base_name == written


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "LOHA"),
        ("some_new_option", 1),
        ("r", 0),
    ],
)
def test_options_that_change_the_adapters_are_refused(
    reference, tmp_path, option, value
):
    copy_of(reference, tmp_path, options={option: value})
    with pytest.raises(ValueError, match=f"not supported: {option}="):
        load_adapter(tmp_path, reference.config)


def copy_of(reference, folder, *, options=None, tensors=None):
    file = "adapter_config.json"
    known = json.loads((reference.folder / file).read_text())
    (folder / file).write_text(json.dumps(known | (options or {})))
    arrays = safetensors.numpy.load_file(reference.folder / "adapter_model.safetensors")
    arrays |= tensors or {}
    arrays = {name: values for name, values in arrays.items() if values is not None}
    safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({FIRST: None}, f"1 missing \\({FIRST}\\)"),
        ({FIRST: np.zeros((2, 16), "float32")}, r"1 misshaped .*\[2, 16\].*\[3, 16\]"),
        ({"base_model.model.lm_head.lora_A.weight": np.zeros(1, "float32")}, "lm_head"),
    ],
)
def test_tensors_that_do_not_fit_are_named(reference, tmp_path, tensors, message):
    copy_of(reference, tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, reference.config)


QKV = "base_model.model.model.layers.{}.self_attn.qkv_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def fused(tools):
    """A model whose files join projections, its parameters, and adapters of some."""
    with np.load(tools.REFERENCES / "phi3.npz") as data:
        config = ModelConfig.from_hf(json.loads(str(data["config"])))
    model, targets = Decoder(config), ("q", "v", "down")
    adapters = init_lora(model, jax.random.key(0), rank=2, targets=targets)
    random = np.random.default_rng(0)
    draw = lambda leaf: random.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    return config, Adapter(
        params=jax.tree.map(draw, adapters), alpha=3.0, base_name=None
    )


def test_projections_of_one_tensor_have_one_adapter_in_files(fused, tmp_path):
    config, adapter = fused
    save_adapter(tmp_path, adapter, config)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    # As q, k and v of rank 2 each: the scale 3 / 2 is also 9 / 6.
    assert (options["r"], options["rank_pattern"]) == (2, {"qkv_proj": 6})
    assert (options["lora_alpha"], options["alpha_pattern"]) == (3, {"qkv_proj": 9})
    assert options["target_modules"] == ["down_proj", "qkv_proj"]
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    # What the file's adapter adds to the joined kernel is what ours add to the parts.
    a, b = (tensors[QKV.format(1, factor)] for factor in "AB")
    assert a.shape == (6, 32) and b.shape == (64, 6)
    added, own = b @ a, adapter.params["layers"]["attn"]
    parts = {"q": added[:32], "v": added[48:]}
    for name, part in parts.items():
        np.testing.assert_allclose(
            part.T, own[name]["a"][1] @ own[name]["b"][1], atol=1e-6
        )
    assert not added[32:48].any()
    again = load_adapter(tmp_path, config)
    assert again.targets == ("q", "v", "down")
    assert (again.rank, again.alpha) == (2, 3.0)
    jax.tree.map(np.testing.assert_array_equal, again.params, adapter.params)
    # An adapter that mixes them is none of ours.
    b[0, 5] = 1.0
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="qkv_proj.lora_B.weight .* mixes projections"):
        load_adapter(tmp_path, config)


def test_an_adapter_of_a_joined_tensor_is_read_as_one_of_each_part(fused, tmp_path):
    """As PEFT makes it: one first factor, of which each part has a copy."""
    config, _ = fused
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    tensors = {}
    for layer in range(2):
        tensors[QKV.format(layer, "A")] = draw(3, 32)
        tensors[QKV.format(layer, "B")] = draw(64, 3)
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 3, "lora_alpha": 5}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    adapter = load_adapter(tmp_path, config)
    assert adapter.targets == ("q", "k", "v") and adapter.rank == 3
    added = tensors[QKV.format(1, "B")] @ tensors[QKV.format(1, "A")]
    own = adapter.params["layers"]["attn"]
    ours = [np.asarray(own[n]["a"][1] @ own[n]["b"][1]).T for n in "qkv"]
    np.testing.assert_allclose(np.concatenate(ours), added, atol=1e-5)
    for wrong in (
        {"rank_pattern": {"qkv_proj": 6}, "alpha_pattern": {"qkv_proj": 10}},
        {"rank_pattern": {"qkv_proj": 9}},
        {"alpha_pattern": {"qkv_proj": 15}},
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(options | wrong))
        with pytest.raises(ValueError, match="not supported: (rank|alpha)_pattern="):
            load_adapter(tmp_path, config)


@pytest.fixture
def conv(tmp_path, tools):
    """LFM2, of which both kinds of layers have an `out_proj`, and a function."""
    tools.write_reference(tmp_path, "lfm2")
    config = load_pretrained(tmp_path).model.config
    random = np.random.default_rng(0)
    draw = lambda leaf: random.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731

    def adapter(*targets):
        drawn = init_lora(Decoder(config), jax.random.key(0), rank=2, targets=targets)
        return Adapter(params=jax.tree.map(draw, drawn), alpha=3.0, base_name=None)

    return config, adapter


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (("q", "o"), ["q_proj", "self_attn.out_proj"]),
        (("conv_bcx", "conv_o"), ["conv.out_proj", "in_proj"]),
        (("o", "down", "conv_o"), ["out_proj", "w2"]),
    ],
)
def test_modules_of_files_are_those_with_adapters(targets, modules, conv, tmp_path):
    config, adapter = conv
    made = adapter(*targets)
    save_adapter(tmp_path / "out", made, config)
    options = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert options["target_modules"] == modules
    again = load_adapter(tmp_path / "out", config)
    assert (again.targets, again.alpha) == (targets, 3.0)
    jax.tree.map(np.testing.assert_array_equal, again.params, made.params)


@pytest.mark.parity
@pytest.mark.filterwarnings("default::FutureWarning")  # between the two libraries
@pytest.mark.parametrize("family", ["phi3", "lfm2"])
def test_peft_loads_adapters_of_other_names(family, request, tmp_path, tools):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    tools.write_reference(tmp_path, family)
    if family == "phi3":
        config, adapter = request.getfixturevalue("fused")
    else:
        config, make = request.getfixturevalue("conv")
        adapter = make("q", "conv_bcx", "conv_o", "down")
    loaded = load_pretrained(tmp_path)
    save_adapter(tmp_path / "out", adapter, config)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base.eval(), tmp_path / "out")
    factors = {name for name in theirs.state_dict() if ".lora_" in name}
    file = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in factors} == file.keys()
    tokens = np.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    merged = dataclasses.replace(config, lora_scale=adapter.scale)
    params = merge_lora(loaded.params, adapter.params, merged)
    ours = tools.make_logits(dataclasses.replace(loaded, params=params))
    np.testing.assert_allclose(ours, expected, atol=1e-4 * expected.std())


def test_a_folder_without_adapters_says_what_is_missing(reference, tmp_path):
    with pytest.raises(ValueError, match=r"it has no adapter_config\.json"):
        load_adapter(tmp_path, reference.config)
    copy_of(reference, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors; pickled"):
        load_adapter(tmp_path, reference.config)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_adapter(tmp_path, reference.config)


def test_adapters_of_another_model_are_not_written(reference, adapter, tmp_path):
    other = dataclasses.replace(reference.config, intermediate_size=32)
    with pytest.raises(ValueError, match=r"layers/mlp/down/a: given \(2, 24, 3\)"):
        save_adapter(tmp_path / "out", adapter, other)
    assert not (tmp_path / "out").exists()
    empty = Adapter(params={}, alpha=1.0, base_name=None)
    with pytest.raises(ValueError, match="adapters of none of"):
        save_adapter(tmp_path / "out", empty, reference.config)


@pytest.mark.parity
@pytest.mark.filterwarnings("default::FutureWarning")  # between the two libraries
def test_peft_loads_what_is_written(reference, adapter, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    save_adapter(tmp_path / "out", adapter, reference.config)
    with np.load(REFERENCE) as data:
        hf = transformers.LlamaConfig(**json.loads(str(data["config"])))
    base = transformers.LlamaForCausalLM(hf).eval().float()
    state = {name: torch.from_numpy(v) for name, v in reference.weights.items()}
    base.load_state_dict(state)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        theirs = model(torch.from_numpy(reference.tokens).long()).logits.numpy()
    np.testing.assert_allclose(
        logits_with(reference, adapter), theirs, atol=1e-5 * theirs.std()
    )
