"""Safetensors files: checked headers, and any part of a tensor read from a disk or a bucket.

The package `safetensors` maps files of a disk into memory. These functions read files wherever they
are, in ranges, straight into the array that is asked for; so no more than that array is held.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from ddk_jax.places import AnyPath

FLOAT_TYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The types that parameters may have, by their name in the file."""

_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000
_HEADER_GUESS = 2**18
"""Bytes that are read at once in the hope that they hold the whole header."""
_BLOCK_BYTES = 2**23
_LOCAL_GAP = 2**15
_REMOTE_GAP = 2**22
_PIECE_BYTES = 2**24
_READERS = 8


@runtime_checkable
class Tensor(Protocol):
    """An array that is read when it is sliced; safetensors' own slices are of this kind."""

    def get_shape(self) -> list[int]:
        """Its shape."""
        ...

    def get_dtype(self) -> str:
        """Its type, as safetensors names it: F32, BF16 and so on."""
        ...

    def __getitem__(self, index: tuple[slice, ...], /) -> np.ndarray:
        """The part at a slice of every axis."""
        ...


class Entry(NamedTuple):
    """What a header says about one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    stop: int
    """Offset behind its last byte."""


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array without values, placed so that jax on a CPU can take its memory over as it is."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + size].view(dtype).reshape(shape)


class StoredFile:
    """A file whose parts are read into memory that the caller provides; threads may share it.

    Attributes:
      size: its bytes.
      gap: of two ranges that are closer than this, in bytes, reading what is between them costs
        less than asking twice.
    """

    def __init__(self, path: AnyPath) -> None:
        """Open a file.

        Raises:
          OSError: it cannot be opened.
        """
        self.path = path
        self._descriptor: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        if isinstance(path, Path):
            self._descriptor = os.open(path, os.O_RDONLY)
            self.size, self.gap = os.fstat(self._descriptor).st_size, _LOCAL_GAP
        else:
            self.size, self.gap = path.stat().length, _REMOTE_GAP

    def read(self, offset: int, size: int) -> bytes:
        """A range of the file."""
        memory = bytearray(size)
        self.read_into(offset, memoryview(memory))
        return bytes(memory)

    def read_into(self, offset: int, memory: memoryview) -> None:
        """Fill memory with the bytes from an offset on.

        Raises:
          OSError: the file cannot be read, or ends before.
        """
        if self._descriptor is not None:
            while memory:
                count = os.preadv(self._descriptor, [memory], offset)
                if not count:
                    raise OSError(f"{self.path}: ends at byte {offset}")
                memory, offset = memory[count:], offset + count
        elif len(memory) <= _PIECE_BYTES:
            self._read_piece(offset, memory)
        else:  # one stream of a bucket is far slower than the network
            starts = range(0, len(memory), _PIECE_BYTES)
            pieces = [memory[start : start + _PIECE_BYTES] for start in starts]
            list(self._readers().map(self._read_piece, [offset + s for s in starts], pieces))

    def _readers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_READERS)
            return self._pool

    def _read_piece(self, offset: int, memory: memoryview) -> None:
        try:
            with self.path.open("rb") as handle:
                handle.seek(offset)
                content: Any = handle.read(len(memory))
        except Exception as error:  # buckets have errors of many kinds
            raise OSError(f"{self.path}: {type(error).__name__}: {error}") from error
        if len(content) != len(memory):
            raise OSError(f"{self.path}: ends at byte {offset + len(content)}")
        memory[:] = content

    def close(self) -> None:
        """Release the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._pool is not None:
            self._pool.shutdown()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file."""

    file: StoredFile
    entry: Entry

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.entry.shape)

    def get_dtype(self) -> str:
        """The name of its type."""
        return self.entry.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read the part at a slice of every axis, of one of `FLOAT_TYPES`.

        Only the wanted ranges are read, and gaps between them that are too short to be worth a
        second request.
        """
        shape = self.entry.shape
        bounds = [part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]
        assert all(part.step in (None, 1) for part in index)
        out = empty([max(hi - lo, 0) for lo, hi in bounds], FLOAT_TYPES[self.entry.dtype])
        if not out.size:
            return out
        cut = (axis for axis, n in enumerate(shape) if bounds[axis] != (0, n))
        last = max(cut, default=0)  # the axes behind it are wanted whole
        step = out.itemsize * math.prod(shape[last + 1 :])
        if last and (shape[last] - out.shape[last]) * step < self.file.gap:
            self._read_across(bounds, out)
        else:
            self._read_runs(bounds, out, last, step)
        return out

    def _read_runs(
        self, bounds: Sequence[tuple[int, int]], out: np.ndarray, last: int, step: int
    ) -> None:
        """Read each contiguous range: a slice of axis `last`, whose elements are `step` bytes."""
        strides = [step * math.prod(self.entry.shape[i + 1 : last + 1]) for i in range(last + 1)]
        low = [lo for lo, _ in bounds[: last + 1]] or [0]  # a scalar has no axis
        runs = out.reshape(math.prod(out.shape[:last]), -1).view(np.uint8)
        for run, lead in zip(runs, np.ndindex(out.shape[:last]), strict=True):
            where = [lo + i for lo, i in zip(low, (*lead, 0), strict=True)]
            offset = sum(i * stride for i, stride in zip(where, strides, strict=True))
            self.file.read_into(self.entry.start + offset, run.data)

    def _read_across(self, bounds: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        """Read whole rows of the first axis, some at a time, and keep what is wanted of them."""
        rest = self.entry.shape[1:]
        step = out.itemsize * math.prod(rest)
        wanted = tuple(slice(lo, hi) for lo, hi in bounds[1:])
        (first, stop), count = bounds[0], max(1, _BLOCK_BYTES // step)
        for row in range(first, stop, count):
            block = np.empty((min(count, stop - row), *rest), out.dtype)
            memory = block.reshape(-1).view(np.uint8).data
            self.file.read_into(self.entry.start + row * step, memory)
            out[row - first : row - first + len(block)] = block[:, *wanted]


def read_header(file: StoredFile) -> dict[str, Entry]:
    """What a safetensors file holds, by name.

    Raises:
      ValueError: it is not a whole safetensors file: bytes are missing, left over, shared by two
        tensors or too many for a type and a shape; the message says which.
      OSError: it cannot be read.
    """
    start = file.read(0, min(file.size, _HEADER_GUESS))
    if len(start) < 8:
        raise ValueError(f"{len(start)} bytes, which is too short")
    length = int.from_bytes(start[:8], "little")
    if length > min(_LONGEST_HEADER, file.size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {file.size}")
    header = start[8 : 8 + length]
    header += file.read(8 + len(header), length - len(header))
    try:
        if not header.startswith(b"{"):
            raise ValueError("it does not begin with a brace")
        tree = json.loads(header, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not a JSON object ({error})") from error
    metadata = tree.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("the metadata is not a map of texts")
    entries = {name: _entry(name, item, 8 + length) for name, item in tree.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(
                f"{name} begins at byte {entry.start}, the one before it ends at {end}"
            )
        end = entry.stop
    if end != file.size:
        raise ValueError(f"the tensors end at byte {end}, the file at {file.size}")
    return entries


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The start of a safetensors file whose tensors follow in this order.

    Args:
      tensors: type and shape of each, by name.
    """
    tree: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + _size(dtype, shape)
        tree[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(tree, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers are aligned
    return len(header).to_bytes(8, "little") + header


def _entry(name: str, item: object, base: int) -> Entry:
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= item.keys():
        raise ValueError(f"{name} lacks a type, a shape or a place")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} has the unknown type {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has the shape {shape!r} and the place {offsets!r}")
    if offsets[1] - offsets[0] != _size(dtype, shape):
        raise ValueError(f"{name} of type {dtype} and shape {shape} has the place {offsets}")
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; -1 where they are not whole."""
    size, rest = divmod(_BITS[dtype] * math.prod(shape), 8)
    return -1 if rest else size


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found
