"""Loading and saving whole models."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.models.decoder import abstract_params
from grpo_jax.weights import _safetensors as our_safetensors
from grpo_jax.weights import load_pretrained, pretrained, save_pretrained
from grpo_jax.weights._names import parameter_table
from grpo_jax.weights.pretrained import read_model_config

REFERENCES = pathlib.Path(__file__).parents[1] / "models" / "references"
FAMILIES = sorted(path.stem for path in REFERENCES.glob("*.npz"))
MESSAGES = [{"role": "user", "content": "what is 12"}]


@pytest.fixture(params=["tied", "untied"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def folder(tmp_path, untied):
    save_pretrained(tmp_path / "model", untied)
    return tmp_path / "model"


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"))


@pytest.mark.parametrize("limit", [20_000, 10**9], ids=["sharded", "single"])
def test_what_was_saved_is_loaded_bit_for_bit(
    tmp_path, model, tools, monkeypatch, limit
):
    write = our_safetensors.write_folder
    monkeypatch.setattr(
        our_safetensors,
        "write_folder",
        lambda folder, tensors: write(folder, tensors, max_shard_bytes=limit),
    )
    save_pretrained(tmp_path / "model", model)
    assert (tmp_path / "model" / "model.safetensors").exists() == (limit == 10**9)
    loaded = load_pretrained(tmp_path / "model")
    tools.assert_same_bits(loaded.params, model.params)
    assert loaded.config == model.config
    assert loaded.config.to_hf() == model.config.to_hf()
    assert loaded.tokenizer.stop_ids == (1, 2)
    assert loaded.tokenizer.encode_prompt(MESSAGES) == model.tokenizer.encode_prompt(
        MESSAGES
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_of_half_precision_keep_their_bits(tmp_path, tools, dtype):
    model = tools.make_pretrained(dtype=jax.numpy.dtype(dtype))
    save_pretrained(tmp_path / "model", model)
    loaded = load_pretrained(tmp_path / "model", dtype=dtype)
    tools.assert_same_bits(loaded.params, model.params)
    wide = load_pretrained(tmp_path / "model")
    widened = jax.tree.map(lambda leaf: leaf.astype("float32"), model.params)
    tools.assert_same_bits(wide.params, widened)


def test_an_export_can_be_stored_in_bfloat16(tmp_path, untied, tools):
    save_pretrained(tmp_path / "model", untied, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), untied.params)
    loaded = load_pretrained(tmp_path / "model", dtype="bfloat16")
    tools.assert_same_bits(loaded.params, rounded)
    config = (tmp_path / "model" / "config.json").read_text()
    assert '"torch_dtype": "bfloat16"' in config


def test_a_quantized_dtype_for_all_parameters_is_refused_with_what_is_meant(folder):
    with pytest.raises(ValueError, match="'nf4'; only the kernels of layers"):
        load_pretrained(folder, dtype="nf4")


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_other_dtypes_are_refused(folder, untied, dtype):
    with pytest.raises(ValueError, match=f"dtype must be one of .*'{dtype}'"):
        load_pretrained(folder, dtype=dtype)
    with pytest.raises(ValueError, match=f"dtype must be one of .*'{dtype}'"):
        save_pretrained(folder, untied, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exported_as_transformers_stores_it(tmp_path, tools, family):
    # References hold float16 numbers, so a float16 export must give the same bits.
    _, weights = tools.write_reference(tmp_path, family)
    loaded = load_pretrained(tmp_path)
    save_pretrained(tmp_path / "out", loaded, dtype="float16")
    exported = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, values in weights.items():
        assert exported[name].tobytes() == values.tobytes(), name
    assert load_pretrained(tmp_path / "out").config == loaded.config


@pytest.mark.parametrize(
    ("text", "head", "images"),
    [
        ("language_model.model", "language_model.lm_head", ""),
        ("model.language_model", "lm_head", "model."),
    ],
    ids=["older", "newer"],
)
def test_the_text_model_is_read_from_a_multimodal_one(
    tmp_path, tools, text, head, images
):
    _, weights = tools.write_reference(tmp_path, "ministral3")
    alone = load_pretrained(tmp_path)
    whole = {
        name.replace("lm_head", head) if "lm_head" in name else text + name[5:]: values
        for name, values in weights.items()
    }
    whole[f"{images}vision_tower.patch_conv.weight"] = np.zeros(1, np.float32)
    whole[f"{images}multi_modal_projector.norm.weight"] = np.zeros(1, np.float32)
    whole[f"{images}visual.norm.weight"] = whole["mtp.fc.weight"] = np.zeros(
        1, np.float32
    )
    safetensors.numpy.save_file(whole, tmp_path / "model.safetensors")
    file = tmp_path / "config.json"
    wrapper = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": json.loads(file.read_text()),
        "vision_config": {"model_type": "pixtral"},
        "tie_word_embeddings": False,
    }
    file.write_text(json.dumps(wrapper))
    loaded = load_pretrained(tmp_path)
    assert loaded.config == alone.config
    assert read_model_config(tmp_path).architecture == "Ministral3ForCausalLM"
    tools.assert_same_bits(loaded.params, alone.params)
    # The export is the text model.
    save_pretrained(tmp_path / "out", loaded, dtype="float16")
    exported = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == weights.keys()
    whole["audio_tower.norm.weight"] = np.zeros(1, np.float32)
    safetensors.numpy.save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected \(audio_tower.norm.weight"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_loaded_models_give_the_logits_of_transformers(tmp_path, tools, family):
    content, _ = tools.write_reference(tmp_path, family)
    loaded = load_pretrained(tmp_path)
    tokens, lengths = content["tokens"], content["lengths"]

    def logits(params):
        variables, model = {"params": params}, loaded.model
        hidden = model.apply(variables, tokens, lengths, method=model.forward)
        return hidden @ model.apply(variables, method=model.head)

    ours = np.asarray(jax.jit(logits)(loaded.params))
    for row, length in enumerate(lengths):
        theirs = content["logits"][row, :length]
        assert np.abs(ours[row, :length] - theirs).max() < 1e-4 * theirs.std()


@pytest.mark.parity
def test_transformers_gives_the_same_logits_from_an_export(tmp_path, model, tools):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    save_pretrained(tmp_path / "model", model)
    theirs = AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "model"), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.arange(40).reshape(2, 20)).logits.numpy()
    np.testing.assert_allclose(tools.make_logits(model), expected, atol=2e-4)


def split_last_axis(mesh):
    """Shards the last axis of every parameter."""
    split = lambda leaf: NamedSharding(  # noqa: E731
        mesh, P(*[None] * (leaf.ndim - 1), "fsdp")
    )
    return lambda model: jax.tree.map(split, abstract_params(model))


def test_sharded_parameters_are_those_of_one_device(folder, untied, mesh, tools):
    place = split_last_axis(mesh)
    loaded = load_pretrained(folder, sharding=place)
    tools.assert_same_bits(loaded.params, untied.params)
    found = jax.tree.map(lambda leaf: leaf.sharding, loaded.params)
    assert found == place(untied.model)


@dataclasses.dataclass
class CountingTensor:
    """A tensor that notes how many elements each reading takes."""

    tensor: object
    readings: list

    @property
    def shape(self):
        return self.tensor.shape

    def read(self, index):
        values = self.tensor.read(index)
        self.readings.append(values.size)
        return values


def test_each_part_is_read_once_and_alone(folder, untied, mesh, monkeypatch, tools):
    # Kernels are split four ways over their outputs and copied twice: every element
    # is read once for all devices, and no reading takes more than a quarter.
    readings = {}

    def count(opened):
        tensors = our_open(opened)
        return {
            name: CountingTensor(tensor, readings.setdefault(name, []))
            for name, tensor in tensors.items()
        }

    our_open = our_safetensors.open_folder
    monkeypatch.setattr(our_safetensors, "open_folder", count)
    load_pretrained(folder, sharding=split_last_axis(mesh))
    for row in parameter_table(untied.config):
        size = int(np.prod(row.file_shape))
        for name in row.names:
            assert readings[name] == [size // 4] * 4, name


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        load_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="model.gguf: no such file or folder"):
        load_pretrained("model.gguf")


@pytest.mark.parametrize("name", ["./nope", "../nope", "~/nope", "/nope/x", "a/b/c"])
def test_a_path_that_is_not_there_does_not_ask_the_hub(name):
    with pytest.raises(ValueError, match=f"^{name}: no such file or folder$"):
        load_pretrained(name)


def test_a_hub_name_offline_says_what_to_do():
    with pytest.raises(ValueError, match="some-one/some-model.*HF_HUB_OFFLINE"):
        load_pretrained("some-one/some-model", revision="main")


def test_a_revision_of_a_local_folder_is_refused(folder):
    with pytest.raises(ValueError, match="revision='main' is for models on the hub"):
        load_pretrained(folder, revision="main")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        load_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_damaged_config_is_refused_by_name(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="cannot load .*config.json"):
        load_pretrained(folder)


def test_a_config_of_another_size_is_refused_with_the_file(folder, tools):
    tools.edit_json(folder / "config.json", intermediate_size=80)
    expected = (
        r"10 misshaped .*up_proj.weight: \[96, 64\] in .*model.safetensors.*\[80, "
    )
    with pytest.raises(ValueError, match=expected):
        load_pretrained(folder)


@pytest.mark.parametrize("limit", [1, 4096])
def test_a_head_beside_tied_embeddings_repeats_them(tmp_path, tied, monkeypatch, limit):
    monkeypatch.setattr(pretrained, "_ROWS", limit)
    save_pretrained(tmp_path, tied)
    file = tmp_path / "model.safetensors"
    stored = safetensors.numpy.load_file(file)
    head = stored["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(stored | {"lm_head.weight": head}, file)
    load_pretrained(tmp_path)
    head[-1, -1] += 1
    for other in (head, head[:-1]):
        safetensors.numpy.save_file(stored | {"lm_head.weight": other}, file)
        with pytest.raises(ValueError, match="tie_word_embeddings true.*safetensors"):
            load_pretrained(tmp_path)


def test_the_configuration_stops_where_the_tokenizer_does(folder, tools):
    tools.edit_json(folder / "generation_config.json", eos_token_id=[40, 2])
    tools.edit_json(folder / "config.json", eos_token_id=2)
    loaded = load_pretrained(folder)
    assert loaded.tokenizer.stop_ids == loaded.config.eos_token_ids == (40, 2, 1)
    assert loaded.model.config == loaded.config
    save_pretrained(folder, loaded)
    assert load_pretrained(folder).config.eos_token_ids == (40, 2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: _cut(folder / "model.safetensors"), "model.safetensors"),
        (lambda folder: _narrow(folder / "config.json"), "10 misshaped"),
    ],
)
def test_what_a_plan_accepts_can_be_loaded(folder, change, message):
    read_model_config(folder)
    change(folder)
    for read in (read_model_config, load_pretrained):
        with pytest.raises(ValueError, match=message):
            read(folder)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def _narrow(file):
    file.write_text(file.read_text().replace(": 96", ": 80"))


def test_a_folder_of_a_configuration_alone_can_be_planned(folder, untied):
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert read_model_config(folder) == untied.config


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder, tools):
    fast = tools.make_fast()
    fast.add_tokens([f"<extra-{i}>" for i in range(6)])  # 43 + 6 > 48
    fast.save_pretrained(folder)
    with pytest.raises(ValueError, match="has 49 tokens, the model has 48 embeddings"):
        load_pretrained(folder)


def test_a_tokenizer_may_be_smaller_than_the_embedding(folder):
    assert load_pretrained(folder).tokenizer.vocab_size == 43


def test_weights_of_pickles_only_are_refused(folder):
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        load_pretrained(folder)


def test_a_failed_export_keeps_the_earlier_one(folder, untied, tools):
    wrong = dataclasses.replace(untied, params={"embed": untied.params["embed"]})
    with pytest.raises(ValueError, match="do not fit the configuration"):
        save_pretrained(folder, wrong)
    tools.assert_same_bits(load_pretrained(folder).params, untied.params)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
