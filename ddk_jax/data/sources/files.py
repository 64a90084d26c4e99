"""Files of a source: finding, opening and unpacking them, here or in a bucket."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from ddk_jax.config import SourceConfig
from ddk_jax.data.sources.documents import Reject, Row
from ddk_jax.errors import DataError, StorageError
from ddk_jax.places import AnyPath, resolve_place

JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .tex .html .py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js .jsx"
    " .ts .tsx .rb .pl .php .cs .swift .m .r .jl .lua .hs .ml .lean .sql .sh .f90 .zig .v".split()
)
"""Files in a folder that are read as one document each; other files of a folder are passed over."""
PARQUET_SUFFIXES = frozenset({".parquet"})
ARRAY_RECORD_SUFFIXES = frozenset({".array_record", ".arrayrecord"})
_UNREAD = {
    **dict.fromkeys((".json",), "write one JSON object a line and call it .jsonl"),
    **dict.fromkeys((".csv", ".tsv", ".arrow", ".feather", ".orc"), "write JSON lines or Parquet"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack it and name the folder"),
    **dict.fromkeys((".bz2", ".lz4", ".br"), "pack it with gzip, xz or zstd instead"),
}
"""Files that would otherwise be read as text, and what to do with them."""

_COMPRESSED = frozenset({".gz", ".xz", ".zst"})
_MAGIC = frozenset("*?[")
_BOM = b"\xef\xbb\xbf"
_BLOCK = 2**20
_UNPACKED = 2**16  # of a cut file, at most this much before the cut is lost

T = TypeVar("T", bound=Row | Reject)


class SourceFile(NamedTuple):
    """A file of a source: its name as the user would write it, and where it is."""

    name: str
    path: AnyPath


def source_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source in the order in which they are read: sorted by name.

    Raises:
        DataError: nothing is there, or a file is of a kind that is not read.
    """
    try:
        return _found(source)
    except NotImplementedError as error:  # etils spares a bucket the listing of everything
        raise DataError(
            f"source {source.path}: `**` does not work in a bucket; name a folder, or use `*`"
        ) from error
    except ImportError as error:
        raise DataError(
            f"source {source.path}: reading from a bucket needs pip install 'ddk_jax[gcs]' "
            f"({error})"
        ) from error


def _found(source: SourceConfig) -> list[SourceFile]:
    head, pattern = _split_glob(source.path)
    root = resolve_place(head)
    if pattern:
        found = [path for path in sorted(root.glob(pattern)) if path.is_file()]
    elif root.is_dir():
        found = sorted(path for path in _all_files(root) if _is_wanted(path, root))
    elif root.is_file():
        found = [root]
    else:
        raise DataError(f"source {source.path}: no such file or folder")
    if not found:
        advice = "no file matches" if pattern else "the folder holds no text or rows of a kind read"
        raise DataError(f"source {source.path}: {advice}")
    files = [SourceFile(_name(head, path, root), path) for path in found]
    for name, path in files:
        if advice := _UNREAD.get(inner_suffix(path)):
            raise DataError(f"source {name}: {advice}")
    return files


def is_jsonl(path: AnyPath) -> bool:
    """Whether the name is that of a JSONL file, compressed or not."""
    return inner_suffix(path) in JSONL_SUFFIXES


def inner_suffix(path: AnyPath) -> str:
    """The suffix without that of the compression: `.jsonl` of `a.jsonl.xz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def file_sha256(path: AnyPath) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Raises:
        StorageError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def file_size(path: AnyPath) -> int:
    """Bytes of a file.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        status: Any = path.stat()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error
    return int(status.st_size if hasattr(status, "st_size") else status.length)


def without_bom(raw: bytes) -> bytes:
    """Bytes without the byte order marks that they begin with."""
    while raw.startswith(_BOM):
        raw = raw[len(_BOM) :]
    return raw


def guarded(
    file: SourceFile, reader: Callable[[io.BufferedIOBase, str], Iterator[T]]
) -> Iterator[T | Reject]:
    """What a reader finds in a file, with a `Reject` where a compressed file is damaged.

    Raises:
        StorageError: the file cannot be read at all.
    """
    line = 0
    try:
        with _opened(file.path) as stream:
            for item in reader(stream, file.name):
                line = item.line
                yield item
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, _DamagedError) as error:
        yield Reject(file.name, line + 1, f"the compressed file is cut off or damaged: {error}")
    except OSError as error:
        raise StorageError(f"{file.name}: cannot be read ({error.strerror or error})") from error


class _DamagedError(Exception):
    """Zstandard data that cannot be unpacked."""


class _Zstandard(io.RawIOBase):
    """A zstandard stream. pyarrow reads it, and reports damage as an OSError like any other."""

    def __init__(self, raw: io.BufferedIOBase) -> None:
        import pyarrow

        self._raw = raw
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            if error.errno is not None:
                raise
            raise _DamagedError(str(error)) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def _opened(path: AnyPath) -> io.BufferedIOBase:
    stream: Any = path.open("rb")
    match path.suffix.lower():
        case ".gz":
            return _closing(gzip.GzipFile(fileobj=stream), stream)
        case ".xz":
            return _closing(lzma.LZMAFile(stream), stream)
        case ".zst":
            return io.BufferedReader(_Zstandard(stream), _UNPACKED)
        case _:
            return stream


def _closing(unpacked: Any, stream: Any) -> io.BufferedIOBase:
    """`unpacked`, closing the file below it as well, which neither gzip nor lzma does."""
    inner = unpacked.close

    def close() -> None:
        inner()
        stream.close()

    unpacked.close = close
    return unpacked


def _split_glob(path: str) -> tuple[str, str]:
    """The part before the first component with a wildcard, and the rest ("" if there is none)."""
    if not _MAGIC & set(path):
        return path, ""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC & set(part))
    prefix, colon, rest = parts[first].rpartition(":")
    if first == 0 and prefix == "assets":
        return prefix + colon, "/".join([rest, *parts[1:]])
    head = "/".join(parts[:first])
    return head or ("/" if path.startswith("/") else "."), "/".join(parts[first:])


def _name(head: str, path: AnyPath, root: AnyPath) -> str:
    if path == root:
        return head
    inside = path.relative_to(root).as_posix()
    return inside if head == "." else head + ("" if head[-1] in "/:" else "/") + inside


def _all_files(root: AnyPath) -> Iterator[AnyPath]:
    for path in root.iterdir():
        if path.is_dir():
            yield from _all_files(path)
        else:
            yield path


def _is_wanted(path: AnyPath, root: AnyPath) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    kinds = TEXT_SUFFIXES | JSONL_SUFFIXES | PARQUET_SUFFIXES | ARRAY_RECORD_SUFFIXES
    return not hidden and inner_suffix(path) in kinds
