"""The one table between parameters and the tensors of checkpoint files.

Each row names a parameter by its path in the tree and the tensors that hold it, in the
spelling of Hugging Face and of GGUF. Files store kernels as [out, in] and one tensor
per layer; the tree holds them as [in, out] with the layers stacked on axis 0.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from jaxtyping import PyTree

from grpo_jax.models.config import ModelConfig
from grpo_jax.parallel.mesh import named_leaves
from grpo_jax.weights._mixer_names import mixer_tensors
from grpo_jax.weights._name_tables import (
    EXPERT_NAMES,
    FUSED,
    FUSED_GGUF,
    GGUF_NORMS,
    NAMES,
)

# Tensors that are read at once; NumPy converts them without the lock of Python.
_READERS = 4
_ROWS = 1 << 14  # rows of a matrix that are read at once: those of a layer, no head's
# Bytes at which the memory of a parameter begins.
_ALIGNMENT = 64


class Tensor(Protocol):
    """A tensor in a file, of which a part can be read without the rest."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        ...

    @property
    def file(self) -> str:
        """The file that holds it, for messages."""
        ...

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The values in `index`, one slice with bounds per axis."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of the tree and the tensors it is made of."""

    path: str  # keys joined by "/"
    shape: tuple[int, ...]  # with the axis of layers, if stacked
    stacked: int  # leading axes with a tensor per index: layers, then experts
    transposed: bool  # the file holds [out, in]
    names: tuple[str, ...]  # Hugging Face names, the last stacked axis fastest
    gguf_names: tuple[str, ...]  # empty where no GGUF file is read
    # Of a parameter that is a block of its tensors: the block's first entry, and the
    # shape of the tensors in the file.
    start: tuple[int, ...] = ()
    whole: tuple[int, ...] | None = None

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors in a file."""
        shape = self.shape[self.stacked :]
        return self.whole or (shape[::-1] if self.transposed else shape)

    def block(self, part: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where a part of one layer's parameter, [in, out], is in a file's tensor."""
        turned = part[::-1] if self.transposed else part
        start = self.start or (0,) * len(turned)
        pairs = zip(turned, start, strict=True)
        return tuple(slice(s.start + at, s.stop + at) for s, at in pairs)


def parameter_table(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter of a model of this configuration, with its tensors."""
    vocab, width = config.vocab_size, config.hidden_size
    norm = NAMES.get(config.architecture, {}).get("model.norm", "model.norm")
    rows = [
        _whole("embed/embedding", "model.embed_tokens", "token_embd", (vocab, width)),
        *_with_fused(config, _layer_rows(config)),
        *_expert_rows(config),
        *_mixer_rows(config),
        _whole("final_norm/scale", norm, "output_norm", (width,)),
    ]
    if not config.tie_embeddings:
        rows.append(_whole("lm_head/kernel", "lm_head", "output", (width, vocab)))
    return tuple(rows)


def check_tensors(
    table: Sequence[Parameter], tensors: Mapping[str, Tensor], *, source: str
) -> None:
    """Checks that the tensors of a file or folder are those that the table asks for.

    A head beside tied embeddings repeats them, and rotary frequencies are computed from
    the configuration; both are accepted and left unread.

    Raises:
        ValueError: listing every missing, unexpected and misshaped tensor, by file.
    """
    shapes = {name: row.file_shape for row in table for name in row.names}
    found = {
        "missing": sorted(shapes.keys() - tensors.keys()),
        "unexpected": [
            f"{name} in {tensor.file}"
            for name, tensor in tensors.items()
            if name not in {*shapes, "lm_head.weight"}
            and not name.endswith("rotary_emb.inv_freq")
        ],
        "misshaped": [
            f"{name}: {list(tensors[name].shape)} in {tensors[name].file}, the "
            f"configuration needs {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if any(found.values()):
        parts = (
            f"{len(names)} {kind}" + (f" ({'; '.join(names)})" if names else "")
            for kind, names in found.items()
        )
        raise ValueError(
            f"cannot load {source}: {', '.join(parts)}. The tensors must be those of "
            "the model's configuration; is config.json from the same revision?"
        )


def read_parameter(
    parameter: Parameter,
    tensors: Mapping[str, Tensor],
    index: tuple[slice, ...] | None = None,
    *,
    dtype: np.dtype,
) -> np.ndarray:
    """The part of a parameter in `index`, or all; no other part is read."""
    index = index or (slice(None),) * len(parameter.shape)
    bounds = tuple(
        slice(*part.indices(size)[:2])
        for part, size in zip(index, parameter.shape, strict=True)
    )
    stack, own = bounds[: parameter.stacked], bounds[parameter.stacked :]
    values = aligned([part.stop - part.start for part in bounds], dtype)
    names = np.reshape(parameter.names, parameter.shape[: parameter.stacked])[stack]

    first, *others = parameter.block(own)

    def fill(job: tuple[np.ndarray, str, int]) -> None:
        piece, name, start = job
        stop = min(start + _ROWS, first.stop)
        rows = piece.T if parameter.transposed else piece  # as in the file
        part = tensors[name].read((slice(start, stop), *others))
        rows[start - first.start : stop - first.start] = part

    starts = range(first.start, first.stop, _ROWS)
    pieces = zip(_pieces(values, parameter), names.flat, strict=True)
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(fill, ((*piece, start) for piece in pieces for start in starts)))
    return values


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """New memory that JAX takes over on a CPU."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def parameter_tensors(
    config: ModelConfig, params: PyTree, *, dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model's parameters, as `table_tensors` gives them."""
    return table_tensors(parameter_table(config), params, dtype=dtype)


def table_tensors(
    table: Sequence[Parameter], params: PyTree, *, dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The names in files and the values of a tree, one at a time, C-contiguous.

    `dtype` None keeps that of the parameters. One parameter at a time is on the host,
    or those that share tensors.

    Raises:
        ValueError: the tree is not one of this table.
    """
    flat = named_leaves(params)
    given = {path: tuple(values.shape) for path, values in flat.items()}
    needed = {row.path: row.shape for row in table}
    if given != needed:
        wrong = sorted(
            f"{path}: given {given.get(path)}, the configuration needs "
            f"{needed.get(path)}"
            for path in given.keys() | needed.keys()
            if given.get(path) != needed.get(path)
        )
        raise ValueError(f"params do not fit the configuration: {'; '.join(wrong)}")
    sharing: dict[tuple[str, ...], list[Parameter]] = {}
    for row in table:
        sharing.setdefault(row.names, []).append(row)
    for names, rows in sharing.items():
        values = [_pieces(np.asarray(flat[row.path]), row) for row in rows]
        for name, *parts in zip(names, *values, strict=True):
            parts = [part.T if rows[0].transposed else part for part in parts]
            kind = dtype or parts[0].dtype
            if rows[0].whole is None:
                # safetensors writes a transposed view as if it were not transposed.
                yield name, np.ascontiguousarray(parts[0], dtype=kind)
            else:
                yield name, _joined(rows, parts, kind)


def _joined(
    rows: Sequence[Parameter], parts: Sequence[np.ndarray], dtype: Any
) -> np.ndarray:
    """The tensor of a file that these parameters are blocks of; 0 where none is."""
    whole = np.zeros(rows[0].file_shape, dtype)
    for row, part in zip(rows, parts, strict=True):
        ends = zip(row.start, part.shape, strict=True)
        whole[tuple(slice(at, at + size) for at, size in ends)] = part
    return whole


def _layer_rows(
    config: ModelConfig,
) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """Path, names within a layer, and shape of one layer's parameters."""
    width, hidden, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    projected = 2 * queries if config.attention_gate else queries
    # Where the MLP's input norm is Llama's only norm after attention, Hugging Face
    # names it by that place.
    mlp_norm = "pre_feedforward" if config.sandwich_norm else "post_attention"
    if not config.post_norm:
        yield "attn_norm/scale", "input_layernorm", "attn_norm", (width,)
        yield "mlp_norm/scale", f"{mlp_norm}_layernorm", "ffn_norm", (width,)
    if config.post_norm or config.sandwich_norm:
        yield (
            "post_attn_norm/scale",
            "post_attention_layernorm",
            "post_attention_norm",
            (width,),
        )
        yield (
            "post_mlp_norm/scale",
            "post_feedforward_layernorm",
            "post_ffw_norm",
            (width,),
        )
    if config.qk_norm is not None:
        both = (queries, keys) if config.qk_norm == "width" else (head, head)
        yield "attn/q_norm/scale", "self_attn.q_norm", "attn_q_norm", both[:1]
        yield "attn/k_norm/scale", "self_attn.k_norm", "attn_k_norm", both[1:]
    for path, hf, gguf, shape, bias in (
        ("attn/q", "self_attn.q_proj", "attn_q", (width, projected), "attention"),
        ("attn/k", "self_attn.k_proj", "attn_k", (width, keys), "attention"),
        ("attn/v", "self_attn.v_proj", "attn_v", (width, keys), "attention"),
        ("attn/o", "self_attn.o_proj", "attn_output", (queries, width), "output"),
        ("mlp/gate", "mlp.gate_proj", "ffn_gate", (width, hidden), "mlp"),
        ("mlp/up", "mlp.up_proj", "ffn_up", (width, hidden), "mlp"),
        ("mlp/down", "mlp.down_proj", "ffn_down", (hidden, width), "mlp"),
    ):
        if path.startswith("mlp/") and config.experts is not None:
            continue
        yield f"{path}/kernel", hf, gguf, shape
        if bias in _biases(config):
            yield f"{path}/bias", hf, gguf, shape[1:]


def _with_fused(
    config: ModelConfig, rows: Iterable[tuple[str, str, str, tuple[int, ...]]]
) -> Iterator[Parameter]:
    """The parameters of all layers, where they may be parts of a file's tensors."""
    own = NAMES.get(config.architecture, {})
    gguf_norms = GGUF_NORMS.get(config.architecture, {})

    def layers(path: str) -> list[int]:
        return _layers(config, memory=False if path.startswith("attn/") else None)

    kinds = {
        path: (path, own.get(hf, hf), gguf_norms.get(gguf, gguf), shape)
        for path, hf, gguf, shape in rows
    }
    for fused, modules in FUSED.get(config.architecture, {}).items():
        for kind in ("kernel", "bias"):
            paths = [f"{module}/{kind}" for module in modules]
            if paths[0] not in kinds:
                continue
            ends = np.cumsum([kinds[path][-1][-1] for path in paths]).tolist()
            for path, start in zip(paths, [0, *ends], strict=False):
                *_, shape = kinds.pop(path)
                gguf = FUSED_GGUF[fused]
                row = _stacked(layers(path), path, fused, gguf, shape)
                yield dataclasses.replace(
                    row,
                    start=(start, *(0 for _ in shape[1:])),
                    whole=(ends[-1], *shape[:-1]),
                )
    for row in kinds.values():
        yield _stacked(layers(row[0]), *row)


def _expert_rows(config: ModelConfig) -> Iterator[Parameter]:
    if config.experts is None:
        return
    count, inner = config.experts.count, config.experts.width
    width, layers = config.hidden_size, range(config.num_layers)
    router, module, files = EXPERT_NAMES[config.architecture]
    shapes = (width, inner), (width, inner), (inner, width)
    tensors: list[Any] = [("router", (width, count), [router], ["ffn_gate_inp"])]
    for path, sizes, file in zip(("gate", "up", "down"), shapes, files, strict=True):
        names = [f"{module}.{e}.{file}" for e in range(count)]
        gguf = [f"ffn_{path}_exps.{e}" for e in range(count)]
        tensors.append((path, (count, *sizes), names, gguf))
    for path, shape, names, gguf in tensors:
        yield Parameter(
            path=f"layers/mlp/{path}",
            shape=(config.num_layers, *shape),
            stacked=len(shape) - 1,
            transposed=True,
            names=tuple(f"model.layers.{i}.{n}.weight" for i in layers for n in names),
            gguf_names=tuple(f"blk.{i}.{n}.weight" for i in layers for n in gguf),
        )


def _mixer_rows(config: ModelConfig) -> Iterator[Parameter]:
    layers = _layers(config, memory=True)
    for path, name, shape in mixer_tensors(config):
        yield Parameter(
            path=f"layers/{path}",
            shape=(len(layers), *shape),
            stacked=1,
            transposed=path.endswith("/kernel"),
            names=tuple(f"model.layers.{i}.{name}" for i in layers),
            gguf_names=(),
        )


def _layers(config: ModelConfig, *, memory: bool | None) -> list[int]:
    """The layers without attention, those with, or all."""
    every = range(config.num_layers)
    if memory is None or config.mixer is None:
        return [*every]
    return [i for i in every if config.mixer.layers[i] == memory]


def _biases(config: ModelConfig) -> set[str]:
    kinds = {
        "attention": config.attention_bias,
        "output": config.output_bias,
        "mlp": config.mlp_bias,
    }
    return {kind for kind, present in kinds.items() if present}


def _whole(path: str, hf: str, gguf: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(
        path=path,
        shape=shape,
        stacked=0,
        transposed=path.endswith("/kernel"),
        names=(f"{hf}.weight",),
        gguf_names=(f"{gguf}.weight",),
    )


def _stacked(
    layers: Sequence[int], path: str, hf: str, gguf: str, shape: tuple[int, ...]
) -> Parameter:
    kind = "bias" if path.endswith("/bias") else "weight"
    return Parameter(
        path=f"layers/{path}",
        shape=(len(layers), *shape),
        stacked=1,
        transposed=path.endswith("/kernel"),
        names=tuple(f"model.layers.{i}.{hf}.{kind}" for i in layers),
        gguf_names=tuple(f"blk.{i}.{gguf}.{kind}" for i in layers),
    )


def _pieces(values: np.ndarray, parameter: Parameter) -> np.ndarray:
    """What belongs to one tensor each, on the leading axis; a view."""
    return values.reshape(-1, *values.shape[parameter.stacked :])
