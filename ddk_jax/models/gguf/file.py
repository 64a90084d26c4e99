"""The container: metadata by key, and tensors that are dequantised as they are read.

The header is parsed here, every length checked against the bytes that are there, because the file
may come from anywhere: a count that is absurd costs neither memory nor time. What the bytes of a
quantised block mean is left to the package `gguf`.

The format: magic, version, two counts; then keys with typed values; then name, shape, type and
offset of each tensor; then, aligned, their data. Little-endian. A shape's first number is the
length of a row.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from ddk_jax.errors import StorageError, UserError

TOKENS = "tokenizer.ggml.tokens"
"""Key of the list of tokens."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_BLOCK_ROWS = 4096
_DEFAULT_ALIGNMENT = 32

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
"""Type numbers of the format, and their characters in `struct`, which are numpy's too."""


@dataclass(frozen=True)
class Tensor:
    """One tensor; slicing reads and dequantises the rows that are asked for."""

    name: str
    """In the file."""
    shape: tuple[int, ...]
    """Outermost axis first, as numpy has it; rows are the last axis."""
    kind: str
    """The format's name of the type: F32, Q4_1, ..."""
    rows: np.ndarray
    """The bytes of the file, uint8 [*shape[:-1], bytes of a row]."""

    def get_shape(self) -> list[int]:
        """The shape, as safetensors gives it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The type of what is read, as safetensors calls it; or its own, if it cannot be read."""
        return "F32" if can_dequantise(self.kind) else self.kind

    def __getitem__(self, index: Any) -> Float32[np.ndarray, "..."]:
        """The values at slices of the axes, outermost first; quantised ones by whole rows."""
        index = index if isinstance(index, tuple) else (index,)
        last = len(self.shape) - 1
        rows = self.rows[index[:last]]
        values = np.empty((*rows.shape[:-1], self.shape[-1]), np.float32)
        if last:
            # Block by block: dequantising needs several times the memory of its result.
            for start in range(0, len(rows), _BLOCK_ROWS):
                block = slice(start, start + _BLOCK_ROWS)
                values[block] = _dequantise(rows[block], self.kind)
        else:
            values[:] = _dequantise(rows, self.kind)
        return values[(..., *index[last:])]


@dataclass(frozen=True)
class GGUFFile:
    """A parsed file. Its tensors stay in the file until they are read."""

    path: Path
    """Where it is."""
    metadata: Mapping[str, Any]
    """By key: int, float, bool, str; a list of str; or an array of numbers."""
    tensors: Mapping[str, Tensor]
    """By name."""


def read(path: Path) -> GGUFFile:
    """Parse the header of a file and find its tensors.

    Raises:
      StorageError: the file cannot be read, is no GGUF file, or is truncated or corrupt.
      UserError: a type of tensor that is not known.
    """
    try:
        if not path.is_file():
            raise StorageError(f"{path}: no such file")
        if not path.stat().st_size:
            raise StorageError(f"{path}: the file is empty")
        content = np.memmap(path, mode="r", dtype=np.uint8)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _parse(path, content)
    except _Malformed as error:
        raise StorageError(
            f"{path}: truncated or corrupt ({error}); copy or download it again"
        ) from error


@cache
def can_dequantise(kind: str) -> bool:
    """Whether values of a type can be turned into float32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    try:
        _dequantise(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dequantise(rows: np.ndarray, kind: str) -> Float32[np.ndarray, "..."]:
    from gguf import GGMLQuantizationType, dequantize

    # What is not finite in the file stays so.
    with np.errstate(all="ignore"):
        return dequantize(np.ascontiguousarray(rows), GGMLQuantizationType[kind])


class _Malformed(Exception):
    """The bytes contradict the format."""


class _Cursor:
    """Reads values one after another; beyond the end there is an error, never fewer bytes."""

    def __init__(self, content: np.ndarray) -> None:
        self.content, self.bytes, self.offset = content, content.data, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.bytes) - self.offset:
            raise _Malformed(f"{size} bytes at {self.offset} reach beyond its end")
        self.offset += size
        return self.bytes[self.offset - size : self.offset]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        start = self.offset
        try:
            return str(self.take(self.number("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise _Malformed(f"the text at {start} is not UTF-8") from error

    def value(self) -> Any:
        kind = self.number("I")
        return self.array() if kind == _ARRAY else self.scalar(kind)

    def scalar(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _BOOL:
            return bool(self.number("B"))
        return self.number(self.code(kind))

    def array(self) -> list[str] | np.ndarray:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            # Every text is 8 bytes at least, so an absurd count ends at the end of the file.
            return [self.text() for _ in range(count)]
        dtype = np.dtype("?" if kind == _BOOL else "<" + self.code(kind))
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise _Malformed(f"value type {kind} at {self.offset}")
        return _NUMBERS[kind]


def _parse(path: Path, content: np.ndarray) -> GGUFFile:
    cursor = _Cursor(content)
    if bytes(cursor.bytes[:4]) != _MAGIC:
        raise StorageError(f"{path}: not a GGUF file (starts with {bytes(cursor.bytes[:4])!r})")
    cursor.take(4)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise StorageError(
            f"{path}: GGUF version {version} is not supported, only {_VERSIONS} in little-endian "
            "byte order; convert the model again with a current llama.cpp"
        )
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in metadata:
            raise _Malformed(f"key {key} comes twice")
        metadata[key] = cursor.value()
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.number("I")
        if name in infos or not 0 < dimensions <= _MAX_DIMENSIONS:
            raise _Malformed(f"tensor {name} comes twice or has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        infos[name] = shape[::-1], cursor.number("I"), cursor.number("Q")
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise _Malformed(f"general.alignment = {alignment}")
    start = -(-cursor.offset // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in infos.items():
        if offset % alignment:
            raise _Malformed(f"tensor {name} is not aligned")
        cursor.offset = start + offset
        tensors[name] = _tensor(path, cursor, name, shape, kind)
    return GGUFFile(path, metadata, tensors)


def _tensor(path: Path, cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int) -> Tensor:
    """The tensor whose data the cursor stands at."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
    except ValueError as error:
        raise UserError(
            f"{path}: tensor {name} has type {kind}, which the installed package gguf does not "
            "know: upgrade it, or quantise the model in another way"
        ) from error
    block, block_bytes = GGML_QUANT_SIZES[known]
    if 0 in shape or shape[-1] % block:
        raise _Malformed(f"tensor {name} of type {known.name} has shape {list(shape)}")
    row_bytes = shape[-1] // block * block_bytes
    first, size = cursor.offset, math.prod(shape[:-1]) * row_bytes
    cursor.take(size)
    rows = cursor.content[first : first + size].reshape(*shape[:-1], row_bytes)
    return Tensor(name, shape, known.name, rows)
