"""The container of GGUF files: fields, and tensors that are dequantized when read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the
gguf library makes several arrays for each token of a vocabulary, which takes longer
than all else. This one reads the 300,000 strings of a file in a fraction of a second.
Blocks are laid out as in llama.cpp (ggml/src/ggml-common.h). The library dequantizes
the types that are not here.
"""

import dataclasses
import mmap
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

# Types of fields: the numbers of the format, as `struct` names them.
_NUMBERS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?")))
_NUMBERS |= {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_AXES = 4
_AT_ONCE = 1 << 16  # values that are dequantized together: they stay in the cache


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of an open file, unread.

    Attributes:
      kind: the name of its type.
      shape: as Hugging Face writes it: the last axis is contiguous.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    raw: UInt8[np.ndarray, "rows bytes"]

    def values(self, rows: slice = slice(None)) -> Float[np.ndarray, "..."]:
        """The values in float32; of the first axis those in `rows`.

        Raises:
          NotImplementedError: for a type that cannot be dequantized.
        """
        import gguf

        raw = self.raw[rows] if len(self.shape) == 2 else self.raw
        shape = -1, *self.shape[1:]
        if self.kind not in _DEQUANTIZERS:
            kind = gguf.GGMLQuantizationType[self.kind]
            return gguf.dequantize(raw, kind).reshape(shape)
        size, width, dequantize = _DEQUANTIZERS[self.kind]
        blocks = raw.reshape(-1, width)
        values = np.empty((len(blocks), size), np.float32)
        step = _AT_ONCE // size
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            dequantize(blocks[part], values[part])
        return values.reshape(shape)


def read_file(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The fields of a file by key, and its tensors by name, unread.

    Raises:
      ValueError: the file is truncated, of another format, or has a key twice.
    """
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(memory)
    magic, version = cursor.numbers("4sI")
    if magic != b"GGUF" or version not in _VERSIONS:
        raise ValueError(
            f"it begins with {magic!r} and version {version}; expected b'GGUF' and "
            "version 2 or 3, little-endian"
        )
    tensor_count, field_count = cursor.numbers("QQ")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        _add(fields, cursor.text(), cursor.value(*cursor.numbers("I")))
    found: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(tensor_count):
        _add(found, cursor.text(), cursor.tensor())
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    data = -(-cursor.at // alignment) * alignment
    return fields, {
        name: _stored(name, *what, memory, start=data) for name, what in found.items()
    }


class _Cursor:
    """Reads one thing after another; ValueError where the file ends before it."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.at = 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        self._check(struct.calcsize(form))
        values = struct.unpack_from(form, self._memory, self.at)
        self.at += struct.calcsize(form)
        return values

    def text(self) -> str:
        (length,) = self.numbers("Q")
        self._check(length)
        self.at += length
        return self._memory[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.numbers("IQ")
            if kind == _STRING:
                return [self.text() for _ in range(count)]
            self._check(count)  # before a format of so many numbers is made
            return list(self.numbers(f"{count}{self._number(kind)}"))
        return self.numbers(self._number(kind))[0]

    def tensor(self) -> tuple[list[int], int, int]:
        """The sizes of the axes, the contiguous one first, the type and the place."""
        (axes,) = self.numbers("I")
        if not 1 <= axes <= _MOST_AXES:
            raise ValueError(f"a tensor has {axes} axes")
        *sizes, kind, offset = self.numbers(f"{axes}QIQ")
        return sizes, kind, offset

    def _number(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise ValueError(f"a field has the type {kind}, which is not known")
        return _NUMBERS[kind]

    def _check(self, count: int) -> None:
        if count > len(self._memory) - self.at:
            raise ValueError(f"it ends after {len(self._memory):,} bytes")


def _add(found: dict[str, Any], key: str, value: Any) -> None:
    if key in found:
        raise ValueError(f"it has {key} twice")
    found[key] = value


def _stored(
    name: str, sizes: list[int], kind: int, offset: int, memory: mmap.mmap, start: int
) -> StoredTensor:
    import gguf

    if kind not in {known.value for known in gguf.GGMLQuantizationType}:
        raise ValueError(f"{name} has the type {kind}, which is not known")
    named = gguf.GGMLQuantizationType(kind)
    size, width = gguf.GGML_QUANT_SIZES[named]
    if sizes[0] % size:
        raise ValueError(f"{name} has rows of {sizes[0]}, which are no whole blocks")
    shape = tuple(reversed(sizes))
    length, place = sizes[0] // size * width, start + offset
    rows = int(np.prod(shape[:-1], dtype=object))
    if place + rows * length > len(memory):
        raise ValueError(f"it ends before {name}")
    raw = np.frombuffer(memory, np.uint8, count=rows * length, offset=place)
    return StoredTensor(name, named.name, shape, raw.reshape(rows, length))


def _halves(blocks: UInt8[np.ndarray, "n bytes"]) -> Float[np.ndarray, "n m"]:
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _halves(blocks[:, :2])


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:, :16] = blocks[:, 2:] & 15
    out[:, 16:] = blocks[:, 2:] >> 4
    out -= 8
    out *= _halves(blocks[:, :2])


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    bits = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    bits <<= 4
    bits[:, :16] |= blocks[:, 6:] & 15
    bits[:, 16:] |= blocks[:, 6:] >> 4
    bits -= 16
    out[...] = bits.view(np.int8)
    out *= _halves(blocks[:, :2])


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scale, minimum = np.split(_halves(blocks[:, :4]), 2, axis=1)
    # Eight scales and minima of six bits.
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.hstack([low & 63, (high & 15) | (low >> 6 << 4)])
    minima = np.hstack([middle & 63, (high >> 4) | (middle >> 6 << 4)])
    nibbles = blocks[:, 16:].reshape(-1, 4, 32)
    of_pairs, of_eight = out.reshape(-1, 4, 2, 32), out.reshape(-1, 8, 32)
    of_pairs[:, :, 0] = nibbles & 15
    of_pairs[:, :, 1] = nibbles >> 4
    of_eight *= (scale * scales)[..., None]
    of_eight -= (minimum * minima)[..., None]


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    nibbles = blocks[:, :128].reshape(-1, 2, 2, 32)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    bits = (pairs >> np.array([[0], [2], [4], [6]], np.uint8)) & 3
    bits <<= 4
    bits[:, :, :2] |= nibbles & 15
    bits[:, :, 2:] |= nibbles >> 4
    bits -= 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    of_sixteen = out.reshape(-1, 16, 16)
    of_sixteen[...] = bits.view(np.int8).reshape(-1, 16, 16)
    of_sixteen *= (_halves(blocks[:, 208:]) * scales)[..., None]


# Type -> values of a block, its bytes, and what writes the values of blocks.
_DEQUANTIZERS: dict[str, tuple[int, int, Callable[[np.ndarray, np.ndarray], None]]] = {
    "Q8_0": (32, 34, _q8_0),
    "Q4_0": (32, 18, _q4_0),
    "Q5_0": (32, 22, _q5_0),
    "Q4_K": (256, 144, _q4_k),
    "Q6_K": (256, 210, _q6_k),
}
