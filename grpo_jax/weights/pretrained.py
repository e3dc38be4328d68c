"""Models with their parameters and tokenizer, from files or the hub and back.

Files are Hugging Face's: config.json, safetensors, tokenizer.json, a chat template. A
GGUF file is read too. Parameters are read tensor by tensor into their places, and where
shardings are given, each device's part by itself.
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

from grpo_jax.config import SamplingConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.weights import safetensors
from grpo_jax.weights.folder import replaced_folder
from grpo_jax.weights.gguf import GgufModel, open_gguf
from grpo_jax.weights.gguf_tokenizer import (
    build_tokenizer,
    check_tokenizer,
    names_pre_tokenizer,
)
from grpo_jax.weights.names import (
    Parameter,
    Tensor,
    check_tensors,
    parameter_table,
    parameter_tensors,
    read_parameter,
)
from grpo_jax.weights.tokenizer import Tokenizer

EMBEDDED = "embedded"

# A model -> the tree of its parameters' shardings.
Placement = Callable[[Decoder], PyTree]
# The path of a parameter, as in "layers/attn/q/kernel" -> the name of its dtype.
DtypeOf = Callable[[str], str]

# A part that begins with a dot, as in ./model, is one of a path.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
_DTYPES = ("float32", "bfloat16", "float16")
_ROWS = 4096  # of a matrix, compared at a time


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A language model: module, parameters, tokenizer and configuration.

    `commit` is that of the hub, of a model that came from there.
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
    dtype: str | DtypeOf = "float32",
    sharding: Placement | None = None,
) -> Pretrained:
    """The model in a folder, a GGUF file, on the Hugging Face hub, or "embedded".

    "embedded" is the small arithmetic model that comes with the package.

    Args:
        revision: branch, tag or commit on the hub.
        dtype: of the parameters, one for all or by path; that of compute is the
            configuration's.
        sharding: gives the sharding with which each parameter is born, as a tree like
            the parameters. Only the parts of this process's devices are read. None is
            the default device.

    Raises:
        ValueError: naming the file or name: not found, incomplete, damaged, of a kind
            that is not supported, or whose parts do not fit each other.
    """
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {_DTYPES}, got {dtype!r}")
    source = _open(str(name_or_path), revision)
    params = _read_params(source.config, source.tensors, dtype, sharding)
    model = Decoder(source.config)
    return Pretrained(
        model, params, source.tokenizer, source.config, commit=source.commit
    )


def load_without_weights(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None
) -> tuple[ModelConfig, Tokenizer]:
    """The configuration and the tokenizer of a model; checks its files as loading does.

    Raises:
        ValueError: as `load_pretrained`.
    """
    source = _open(str(name_or_path), revision)
    return source.config, source.tokenizer


def load_config(name_or_path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a model alone; a folder needs no other file for it.

    Whatever else a local file or folder holds is checked as loading does, as far as
    that is possible without reading tensors or building a tokenizer: what a plan
    accepts, a run can load.

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
        # A snapshot of the hub may lack what was not asked for yet.
        if path == _local(str(name_or_path)) and any(path.glob("*.safetensors")):
            tensors = safetensors.open_folder(path)
    if tensors is not None:
        check_tensors(parameter_table(config), tensors, source=str(path))
    return config


def check_name(name_or_path: str) -> None:
    """Raises ValueError unless a model is here, or has a name as on the hub."""
    path = _local(name_or_path)
    named = path.suffix != ".gguf" and _HUB_NAME.fullmatch(name_or_path)
    if not path.exists() and not named:
        raise ValueError(f"{name_or_path}: no such file or folder")


def find_base(name_or_path: str) -> str:
    """What other programs, in any folder, call a model that is loaded by this name.

    A local file or folder by its absolute path, the embedded model by the folder of its
    files, a model of the hub by its name there.
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

    It is written beside its place and moved there when complete. An earlier export in
    `folder` is replaced. Parameters must be addressable by this process.

    Args:
        dtype: of the stored weights; None keeps that of the parameters.
        sampling: how the model is to draw, with the tokens that end a completion; None
            leaves it to whoever loads it, and the ends are the tokenizer's.

    Raises:
        ValueError: the folder holds other files, or params do not fit the config.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {_DTYPES} or None, got {dtype!r}")
    config, tokenizer = pretrained.config, pretrained.tokenizer
    stored = None if dtype is None else jnp.dtype(dtype)
    first = jax.tree.leaves(pretrained.params)[0]
    hf = {**config.to_hf(), "torch_dtype": dtype or first.dtype.name}
    with replaced_folder(pathlib.Path(folder)) as place:
        tensors = parameter_tensors(config, pretrained.params, dtype=stored)
        safetensors.write_folder(place, tensors)
        tokenizer.save(place)
        _write_json(place / "config.json", hf)
        generation = _generation(config, tokenizer, sampling)
        _write_json(place / "generation_config.json", generation)


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
        gguf_model = open_gguf(path)
        config, tensors = gguf_model.config, gguf_model.tensors
        tokenizer = _gguf_tokenizer(path, gguf_model)
    else:
        config = _read_config(path)
        tensors = safetensors.open_folder(path)
        tokenizer = Tokenizer.from_folder(path, config)
    check_tensors(parameter_table(config), tensors, source=str(path))
    _check_head(config, tensors, source=str(path))
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {path} has {tokenizer.vocab_size} tokens, the model has "
            f"{config.vocab_size} embeddings; they are not from the same model, or the "
            "model was not resized after tokens were added"
        )
    # Whoever samples by the configuration alone stops where the tokenizer does.
    config = dataclasses.replace(config, eos_token_ids=tokenizer.stop_ids)
    # The cache of the hub has a folder for each commit.
    commit = path.name if path.parent.name == "snapshots" else None
    return _Source(config, tensors, tokenizer, commit)


def _check_head(
    config: ModelConfig, tensors: Mapping[str, Tensor], *, source: str
) -> None:
    """A head in the files of a model whose embeddings are tied must repeat them."""
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
    return _download(name, revision, files)


def _local(name: str) -> pathlib.Path:
    """Where a model is if it is a file or folder here."""
    if name == EMBEDDED:
        name = str(resources.files("grpo_jax") / "assets" / "arithmetic-1m")
    return pathlib.Path(name).expanduser()


def _download(name: str, revision: str | None, files: tuple[str, ...]) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(files)
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ValueError(
            f"{name} is no local folder, and it could not be had from the Hugging Face "
            f"hub{at}: {error}. Check the name and the network; with HF_HUB_OFFLINE=1 "
            "only models that were downloaded before can be loaded"
        ) from error
    return pathlib.Path(folder)


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


def _gguf_tokenizer(path: pathlib.Path, model: GgufModel) -> Tokenizer:
    if _describes_tokenizer(path, model):
        return build_tokenizer(model.fields, file=str(path))
    return Tokenizer.from_folder(path.parent, model.config)


def _describes_tokenizer(path: pathlib.Path, model: GgufModel) -> bool:
    """Whether the tokenizer is that of the GGUF file, not of the files beside it.

    Raises:
        ValueError: it is neither.
    """
    beside = (path.parent / "tokenizer.json").is_file()
    try:
        check_tokenizer(model.fields, file=str(path))
    except ValueError:
        if not beside:
            raise
        return False
    return names_pre_tokenizer(model.fields) or not beside


def _read_params(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: str | DtypeOf,
    sharding: Placement | None,
) -> PyTree:
    places: dict[str, Any] = {}
    if sharding is not None:
        tree = sharding(Decoder(config))
        places = dict(traverse_util.flatten_dict(tree, sep="/"))
    flat = {}
    for row in parameter_table(config):
        stored = np.dtype(
            jnp.dtype(dtype if isinstance(dtype, str) else dtype(row.path))
        )
        if row.path in places:
            flat[row.path] = _read_sharded(row, tensors, stored, places[row.path])
        else:
            whole = (slice(None),) * len(row.shape)
            flat[row.path] = jnp.asarray(
                read_parameter(row, tensors, whole, dtype=stored)
            )
    return traverse_util.unflatten_dict(flat, sep="/")


def _read_sharded(
    parameter: Parameter,
    tensors: Mapping[str, Tensor],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    parts: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "jax passes an index to every call"
        # Devices that hold copies of the same part share one reading.
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:
            parts[key] = read_parameter(parameter, tensors, index, dtype=dtype)
        return parts[key]

    return jax.make_array_from_callback(parameter.shape, sharding, part)


def _generation(
    config: ModelConfig, tokenizer: Tokenizer, sampling: SamplingConfig | None
) -> dict[str, Any]:
    """The generation_config.json; 0 and 1 switch off cuts that readers have set."""
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


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
