"""GGUF files: weights, configuration and tokenizer of a model in one file, or in parts.

Tensors are dequantized to float32, in the layout of Hugging Face files. llama.cpp
changes two kinds of tensors on conversion, and this module changes them back. It
reorders the rows of Llama's query and key projections, because its rotary embedding
pairs neighbors. And it stores the norms of Gemma as the whole multiplier, 1 + w.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo_jax.models.config import ModelConfig
from grpo_jax.weights._gguf_config import (
    PAIRED_ROWS,
    ROPE_TENSORS,
    as_written,
    hf_config,
)
from grpo_jax.weights._gguf_file import StoredTensor, read_file
from grpo_jax.weights._names import Tensor, parameter_table

# The name of a part: "model-00001-of-00003.gguf".
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """The content of a GGUF file; tensors have their Hugging Face names."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    fields: Mapping[str, Any]  # metadata by key


@dataclasses.dataclass(frozen=True)
class _GgufTensor:
    """A tensor of a memory-mapped GGUF file."""

    data: StoredTensor
    file: str  # of several, that of the tensor
    rotary_heads: int | None  # heads whose rows are in rotary pairs
    shifted: bool  # a norm that is stored as 1 + w

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        # Heads are reordered whole; of other matrices only the rows asked for are read.
        part = self.rotary_heads is None and len(self.shape) == 2
        try:
            values = self.data.values(index[0]) if part else self.data.values()
        except NotImplementedError as error:
            raise ValueError(
                f"{self.data.name} in {self.file} has type {self.data.kind}, which "
                "cannot be dequantized; use a file in F16, BF16, F32, Q8_0 or Q4_K_M"
            ) from error
        if part:
            return values[:, index[1]]
        if self.rotary_heads is not None:
            # Rows (pair, first or second) of a head become (first or second, pair).
            pairs = values.reshape(self.rotary_heads, -1, 2, *values.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if self.shifted:
            values = values - np.float32(1.0)
        return values[index]


def open_gguf(path: pathlib.Path) -> GgufModel:
    """Returns the model of a GGUF file, with its tensors unread.

    `path` is the first file of a model in parts. The others are beside it.

    Raises:
        ValueError: naming the file. It is truncated or no GGUF file, parts are missing,
            or the architecture or kind is not supported.
    """
    fields, stored = _read_file(path)
    files = dict.fromkeys(stored, str(path))
    if fields.get("split.count", 0) > 1:
        stored, files = _read_parts(path, fields, stored)
    try:
        config = ModelConfig.from_hf(hf_config(fields, stored))
    except KeyError as error:
        raise ValueError(f"cannot load {path}: it has no {error}") from error
    except ValueError as error:
        raise ValueError(f"cannot load {path}: {error}") from error
    hf_names = {
        gguf_name: name
        for row in parameter_table(config)
        for gguf_name, name in zip(row.gguf_names, row.names, strict=True)
    }
    if config.experts is not None:
        stored, files = _experts_apart(stored, files)
    rotary = {}
    if fields["general.architecture"] in PAIRED_ROWS:
        rotary = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    tensors: dict[str, Tensor] = {
        hf_names.get(name, name): _GgufTensor(
            data=tensor,
            file=files[name],
            rotary_heads=rotary.get(name.split(".")[-2]) if "." in name else None,
            shifted=bool(config.norm_offset) and name.endswith("norm.weight"),
        )
        for name, tensor in stored.items()
        if name not in ROPE_TENSORS
    }
    return GgufModel(config=config, tensors=tensors, fields=fields)


def _experts_apart(
    stored: Mapping[str, StoredTensor], files: Mapping[str, str]
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors where those of experts are one for each, and their files.

    llama.cpp joins the experts of a layer: "blk.0.ffn_up_exps.weight" [E, out, in].
    """
    apart: dict[str, StoredTensor] = {}
    of_files: dict[str, str] = {}
    for name, tensor in stored.items():
        own = {name: tensor}
        joined = name.removesuffix("_exps.weight")
        if joined != name and len(tensor.shape) == 3:
            rows = np.split(tensor.raw, tensor.shape[0])
            own = {
                f"{joined}_exps.{e}.weight": StoredTensor(
                    name, tensor.kind, tensor.shape[1:], raw
                )
                for e, raw in enumerate(rows)
            }
        apart |= own
        of_files |= dict.fromkeys(own, files[name])
    return apart, of_files


def _read_file(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The fields of a file, and its tensors by name, unread."""
    try:
        fields, stored = read_file(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a complete GGUF file ({error}); download or copy it again"
        ) from error
    fields |= {n: as_written(v) for n, v in fields.items() if isinstance(v, float)}
    return fields, stored


def _read_parts(
    path: pathlib.Path, fields: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of all parts, by name, and the file of each.

    The first part has all fields. The others say which part they are.
    """
    count, total = fields["split.count"], fields.get("split.tensors.count")
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise ValueError(
            f"{path} is one part of {count}. Give all of them the names that llama.cpp "
            f"gives, such as model-00001-of-{count:05}.gguf"
        )
    parts = [
        path.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]
    if fields.get("split.no") != 0 or path != parts[0]:
        raise ValueError(f"{path} is one part of {count}; load {parts[0]}, the first")
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(
            f"{path} is one part of {count}; missing: {', '.join(missing)}"
        )
    tensors, files = dict(stored), dict.fromkeys(stored, str(path))
    for number, part in enumerate(parts[1:], start=1):
        own, more = _read_file(part)
        if (own.get("split.no"), own.get("split.count")) != (number, count):
            raise ValueError(f"{part} is not part {number + 1} of {count} of a model")
        tensors |= more
        files |= dict.fromkeys(more, str(part))
    if total is not None and len(tensors) != total:
        raise ValueError(
            f"{path}: its parts have {len(tensors)} tensors instead of {total}; they "
            "are not of one model"
        )
    return tensors, files
