"""Loads and saves models with their parameters and tokenizer.

Files are those of Hugging Face: config.json, safetensors, tokenizer.json and a chat
template. A GGUF file can be loaded, too. Parameters are read one tensor at a time. With
shardings, each process reads only the parts of its own devices.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from grpo_jax.config import EMBEDDED, SamplingConfig
from grpo_jax.config.files import write_json
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.quantized import KINDS
from grpo_jax.parallel.mesh import named_leaves
from grpo_jax.weights import _safetensors
from grpo_jax.weights._arrays import load_parameter, load_quantized
from grpo_jax.weights._gguf import GgufModel, open_gguf
from grpo_jax.weights._gguf_tokenizer import (
    build_tokenizer,
    check_tokenizer,
    names_pre_tokenizer,
)
from grpo_jax.weights._names import (
    Tensor,
    check_tensors,
    parameter_table,
    parameter_tensors,
)
from grpo_jax.weights._text_tensors import text_tensors
from grpo_jax.weights.folder import replaced_folder
from grpo_jax.weights.tokenizer import Tokenizer

# A model -> the tree of its parameters' shardings.
_Placement = Callable[[Decoder], PyTree]
# The path of a parameter, as in "layers/attn/q/kernel" -> the name of its dtype.
_DtypeOf = Callable[[str], str]

# A name that begins with a dot, as in ./model, is a path.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
_DTYPES = ("float32", "bfloat16", "float16")
_ROWS = 4096  # rows of a matrix that are compared at a time


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A language model: module, parameters, tokenizer and configuration.

    `commit` is the commit of a model from the hub.
    """

    model: Decoder
    params: PyTree
    tokenizer: Tokenizer
    config: ModelConfig
    commit: str | None = None


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | _DtypeOf = "float32",
    sharding: _Placement | None = None,
) -> Pretrained:
    """The model in a folder, a GGUF file, on the Hugging Face hub, or "embedded".

    "embedded" is the small arithmetic model that comes with the package.

    Args:
        revision: branch, tag or commit on the hub.
        dtype: of the parameters, one for all or by path. The configuration has the
            compute dtype. By path, the kernels of layers may also be "int8" or "nf4":
            see `models.quantized`.
        sharding: returns the sharding of each parameter, as a tree like the parameters.
            Only the parts of this process's devices are read, and all inputs of a
            kernel that is quantized. None is the default device.

    Raises:
        ValueError: naming the file or name. It was not found, is incomplete, damaged,
            of a kind that is not supported, or its parts do not fit each other.
    """
    if isinstance(dtype, str) and dtype not in _DTYPES:
        by_path = "; only the kernels of layers can be so, by a function of the path"
        raise ValueError(
            f"dtype must be one of {_DTYPES}, got {dtype!r}"
            + (by_path if dtype in KINDS else "")
        )
    source = _open(str(name_or_path), revision)
    model = Decoder(source.config)
    shardings = {} if sharding is None else named_leaves(sharding(model))
    params = {}
    for row in parameter_table(source.config):
        name = dtype if isinstance(dtype, str) else dtype(row.path)
        if name in KINDS:
            params |= load_quantized(row, source.tensors, name, shardings)
            continue
        params[row.path] = load_parameter(
            row, source.tensors, np.dtype(jnp.dtype(name)), shardings.get(row.path)
        )
    return Pretrained(
        model,
        traverse_util.unflatten_dict(params, sep="/"),
        source.tokenizer,
        source.config,
        commit=source.commit,
    )


def load_without_weights(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None
) -> tuple[ModelConfig, Tokenizer]:
    """The configuration and the tokenizer of a model.

    Its files are checked as `load_pretrained` checks them.

    Raises:
        ValueError: as `load_pretrained`.
    """
    source = _open(str(name_or_path), revision)
    return source.config, source.tokenizer


def read_model_config(name_or_path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a model alone; a folder needs no other file for it.

    The other files of a local model are checked as `load_pretrained` checks them, as
    far as that needs neither values of tensors nor a tokenizer. A run can therefore
    load what a plan accepts.

    Raises:
        ValueError: as `load_pretrained`.
    """
    path = _find(str(name_or_path), None, files=("config.json",))
    if path.is_file():
        model = open_gguf(path)
        config, tensors = model.config, model.tensors
        _describes_tokenizer(path, model)
    else:
        config, tensors = _read_config(path), None
        # A snapshot of the hub may lack files that nobody asked for yet.
        if path == _local(str(name_or_path)) and any(path.glob("*.safetensors")):
            tensors = text_tensors(_safetensors.open_folder(path))
    if tensors is not None:
        check_tensors(parameter_table(config), tensors, source=str(path))
    return config


def check_name(name_or_path: str) -> None:
    """Raises ValueError unless this is a local model or a possible name on the hub."""
    path = _local(name_or_path)
    named = path.suffix != ".gguf" and _HUB_NAME.fullmatch(name_or_path)
    if not path.exists() and not named:
        raise ValueError(f"{name_or_path}: no such file or folder")


def find_base(name_or_path: str) -> str:
    """The name by which other programs, in any folder, find this model.

    It is the absolute path of a local model (for "embedded" that of its folder), and
    the same name for a model on the hub.
    """
    path = _local(name_or_path)
    return str(path.absolute()) if path.exists() else name_or_path


def save_pretrained(
    folder: str | os.PathLike[str],
    pretrained: Pretrained,
    *,
    dtype: str | None = None,
    sampling: SamplingConfig | None = None,
) -> None:
    """Writes a Hugging Face folder, whole or not at all.

    The files are written to a folder beside `folder`, which is renamed when complete.
    It replaces an earlier export. Parameters must be addressable by this process.

    Args:
        dtype: of the stored weights; None keeps that of the parameters.
        sampling: written to generation_config.json, with the stop tokens. None writes
            only the stop tokens of the tokenizer.

    Raises:
        ValueError: the folder has other files, or params do not fit the config.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {_DTYPES} or None, got {dtype!r}")
    config, tokenizer = pretrained.config, pretrained.tokenizer
    stored = None if dtype is None else jnp.dtype(dtype)
    first = jax.tree.leaves(pretrained.params)[0]
    hf = {**config.to_hf(), "torch_dtype": dtype or first.dtype.name}
    with replaced_folder(pathlib.Path(folder)) as place:
        tensors = parameter_tensors(config, pretrained.params, dtype=stored)
        _safetensors.write_folder(place, tensors)
        tokenizer.save(place)
        write_json(place / "config.json", hf)
        generation = _generation(config, tokenizer, sampling)
        write_json(place / "generation_config.json", generation)


@dataclasses.dataclass(frozen=True)
class _Source:
    """The files of a model, open and checked, with its weights unread."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer
    commit: str | None


def _open(name: str, revision: str | None) -> _Source:
    path = _find(name, revision)
    if path.is_file():
        model = open_gguf(path)
        config, tensors = model.config, model.tensors
        if _describes_tokenizer(path, model):
            tokenizer = build_tokenizer(model.fields, file=str(path))
        else:
            tokenizer = Tokenizer.from_folder(path.parent, config)
    else:
        config = _read_config(path)
        tensors = text_tensors(_safetensors.open_folder(path))
        tokenizer = Tokenizer.from_folder(path, config)
    check_tensors(parameter_table(config), tensors, source=str(path))
    _check_head(config, tensors, source=str(path))
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {path} has {tokenizer.vocab_size} tokens, the model has "
            f"{config.vocab_size} embeddings; they are not from the same model, or the "
            "model was not resized after tokens were added"
        )
    # Code that samples with the configuration alone stops at the same tokens.
    config = dataclasses.replace(config, eos_token_ids=tokenizer.stop_ids)
    # The cache of the hub has a folder for each commit.
    commit = path.name if path.parent.name == "snapshots" else None
    return _Source(config, tensors, tokenizer, commit)


def _check_head(
    config: ModelConfig, tensors: Mapping[str, Tensor], *, source: str
) -> None:
    """Refuses a head that differs from the embeddings of a model that ties them."""
    head = tensors.get("lm_head.weight")
    if head is None or not config.tie_embeddings:
        return
    embedding = tensors["model.embed_tokens.weight"]
    rows, width = embedding.shape
    if head.shape != embedding.shape or any(
        not np.array_equal(head.read(part), embedding.read(part))
        for start in range(0, rows, _ROWS)
        for part in [(slice(start, min(start + _ROWS, rows)), slice(0, width))]
    ):
        raise ValueError(
            f"{source} has tie_word_embeddings true, and in {head.file} an "
            "lm_head.weight that differs from model.embed_tokens.weight. To use that "
            "head, as transformers 5 does, set tie_word_embeddings to false; to use "
            "the embeddings, as transformers 4 does, remove lm_head.weight"
        )


def _find(
    name: str, revision: str | None, *, files: tuple[str, ...] = _HUB_FILES
) -> pathlib.Path:
    path = _local(name)
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for models on the hub; {path} is local"
            )
        return path
    check_name(name)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(files)
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ValueError(
            f"{name} is no local folder, and the download from the Hugging Face hub"
            f"{at} failed: {error}. Check the name and the network; with "
            "HF_HUB_OFFLINE=1 only models that were downloaded before can be loaded"
        ) from error
    return pathlib.Path(folder)


def _local(name: str) -> pathlib.Path:
    """The path of a model that is a local file or folder."""
    if name == EMBEDDED:
        name = str(resources.files("grpo_jax") / "assets" / "arithmetic-1m")
    return pathlib.Path(name).expanduser()


def _read_config(folder: pathlib.Path) -> ModelConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no config.json, so it is not a Hugging Face model folder"
        )
    try:
        hf = json.loads(path.read_text())
        if not isinstance(hf, Mapping):
            raise ValueError("it is not a JSON object")
        return ModelConfig.from_hf(hf)
    except ValueError as error:
        raise ValueError(f"cannot load {path}: {error}") from error


def _describes_tokenizer(path: pathlib.Path, model: GgufModel) -> bool:
    """Whether the GGUF file has the tokenizer, and not the files beside it.

    Raises:
        ValueError: neither has it.
    """
    beside = (path.parent / "tokenizer.json").is_file()
    try:
        check_tokenizer(model.fields, file=str(path))
    except ValueError:
        if not beside:
            raise
        return False
    return names_pre_tokenizer(model.fields) or not beside


def _generation(
    config: ModelConfig, tokenizer: Tokenizer, sampling: SamplingConfig | None
) -> dict[str, Any]:
    """The generation_config.json.

    Readers such as transformers have defaults for cuts: top_k 0 and top_p 1.0 switch
    them off.
    """
    ends = tokenizer.stop_ids
    if sampling is not None and sampling.stop_ids is not None:
        ends = sampling.stop_ids
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(ends) or None,
        "pad_token_id": tokenizer.pad_id,
    }
    if sampling is None:
        return ids
    if not sampling.temperature:
        return ids | {"do_sample": False}
    cut = {} if sampling.min_p is None else {"min_p": sampling.min_p}
    return ids | {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p or 1.0,
        **cut,
    }
