"""A bucket in memory, which `gs://` paths lead to through etils and fsspec as they are."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FakeBucket(MemoryFileSystem):
    """Notes what is read and written, and fails where it is told to.

    Attributes:
      reads: file, offset and size of every read.
      written: files in the order in which they appeared or were deleted (`-name`).
      broken: files that cannot be opened.
    """

    protocol = ("gs", "gcs")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    reads: ClassVar[list[tuple[str, int, int]]] = []
    written: ClassVar[list[str]] = []
    broken: ClassVar[set[str]] = set()

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        name = Path(path).name
        if name in self.broken:
            raise RuntimeError("503 Service Unavailable")  # as gcsfs does: not an OSError
        if mode != "rb":
            self.written.append(name)
            return super()._open(path, mode, **settings)
        if self._strip_protocol(path) not in self.store:
            raise FileNotFoundError(path)
        return _Reading(name, self.store[self._strip_protocol(path)].getvalue())

    def rm_file(self, path: str) -> None:
        self.written.append(f"-{Path(path).name}")
        super().rm_file(path)


class _Reading(io.BytesIO):
    """One reader of a file, with a place of its own."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self.name = name

    def read(self, size: int | None = -1) -> bytes:
        place = self.tell()
        content = super().read(size)
        if content:
            FakeBucket.reads.append((self.name, place, len(content)))
        return content


def empty() -> type[FakeBucket]:
    """The bucket, with nothing in it."""
    for kept in (FakeBucket.store, FakeBucket.reads, FakeBucket.written, FakeBucket.broken):
        kept.clear()
    FakeBucket.pseudo_dirs[:] = [""]
    fsspec.register_implementation("gcs", FakeBucket, clobber=True)
    return FakeBucket


def upload(directory: Path, place: str) -> str:
    """Copy the files of a directory into the bucket; return the place."""
    for file in directory.iterdir():
        FakeBucket().pipe_file(f"{place}/{file.name}", file.read_bytes())
    FakeBucket.written.clear()
    return place
