"""Folders of safetensors files: reading, writing, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from grpo_jax.weights._safetensors import INDEX, SINGLE, open_folder, write_folder

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "b": (np.arange(6, dtype=np.float32) / 7).astype(np.float16),
    "c": (np.arange(8, dtype=np.float32).reshape(4, 2) / 7).astype(ml_dtypes.bfloat16),
}


def whole(tensor):
    return tensor.read(tuple(slice(0, size) for size in tensor.shape))


def write_shards(folder):
    # 48, 12 and 16 bytes: the first alone, the other two together.
    write_folder(folder, ARRAYS.items(), max_shard_bytes=48)


@pytest.mark.parametrize("limit", [48, 1000], ids=["sharded", "single"])
def test_what_was_written_is_read_bit_for_bit(tmp_path, limit):
    write_folder(tmp_path, ARRAYS.items(), max_shard_bytes=limit)
    tensors = open_folder(tmp_path)
    assert tensors.keys() == ARRAYS.keys()
    for name, values in ARRAYS.items():
        given = whole(tensors[name])
        assert given.dtype == values.dtype
        assert given.tobytes() == values.tobytes()


def test_shards_are_named_and_indexed_as_transformers_does(tmp_path):
    write_shards(tmp_path)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert {path.name for path in tmp_path.iterdir()} == {first, second, INDEX}
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {"a": first, "b": second, "c": second}
    assert index["metadata"]["total_size"] == 48 + 12 + 16
    with safetensors.safe_open(tmp_path / first, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_single_file_is_as_readable_as_its_folder(tmp_path):
    write_folder(tmp_path, ARRAYS.items())
    mode = (tmp_path / SINGLE).stat().st_mode & 0o777
    assert mode == tmp_path.stat().st_mode & 0o666


def test_a_part_is_read_without_the_rest(tmp_path):
    write_folder(tmp_path, ARRAYS.items())
    part = open_folder(tmp_path)["a"].read((slice(1, 3), slice(2, 4)))
    np.testing.assert_array_equal(part, ARRAYS["a"][1:3, 2:4])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_a_folder_of_pickles_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=f"{name}.*save_pretrained"):
        open_folder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has neither model.safetensors nor"):
        open_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, keep):
    write_folder(tmp_path, ARRAYS.items())
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is not a complete"):
        open_folder(tmp_path)


def test_a_truncated_shard_is_refused_by_name(tmp_path):
    write_shards(tmp_path)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is not"):
        open_folder(tmp_path)


def test_a_lost_shard_is_refused_by_name(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="missing.*model-00001-of-00002.safetensors"):
        open_folder(tmp_path)


def test_shards_and_index_must_agree(tmp_path):
    write_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    safetensors.numpy.save_file({"b": ARRAYS["b"], "d": ARRAYS["b"]}, shard)
    with pytest.raises(ValueError, match=r"model-00002.*disagree.*\['c', 'd'\]"):
        open_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused_by_name(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match="index.json is not an index"):
        open_folder(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ValueError, match="points outside its folder"):
        open_folder(tmp_path)


def test_quantized_storage_is_refused_with_its_type(tmp_path):
    safetensors.numpy.save_file({"q": np.zeros(4, np.int8)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="q in .*model.safetensors is stored as I8"):
        open_folder(tmp_path)
