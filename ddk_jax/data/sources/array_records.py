"""Rows of ArrayRecord files whose records are texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ddk_jax.data.sources.documents import Reject, Row
from ddk_jax.data.sources.files import SourceFile
from ddk_jax.errors import DataError

_BATCH_RECORDS = 256
_DAMAGE = (ValueError, RuntimeError, IndexError)


def num_records(file: SourceFile) -> int:
    """Records of a file; -1 if it is damaged, which reading it reports."""
    try:
        with _reader(file) as reader:
            return reader.num_records()
    except _DAMAGE:
        return -1


def read_records(file: SourceFile, column: str, start: int, stop: int) -> Iterator[Row | Reject]:
    """Some records of a file, each as the only column of a row.

    A damaged file gives the records before the damage, then a reject.
    """
    line = start
    try:
        with _reader(file) as reader:
            stop = reader.num_records() if stop < 0 else stop
            for first in range(start, stop, _BATCH_RECORDS):
                for record in _batch(reader, first, min(first + _BATCH_RECORDS, stop)):
                    line += 1
                    yield Row(line, {column: record})
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        yield Reject(file.name, line + 1, f"the file is cut off or damaged: {reason}")


def _batch(reader: Any, start: int, stop: int) -> Iterator[bytes]:
    """Records, together if that works: otherwise one by one, up to the damage."""
    try:
        yield from reader.read(list(range(start, stop)))
    except _DAMAGE:
        for number in range(start, stop):
            yield from reader.read([number])


class _Reader:
    """A reader that is closed when it is left."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __enter__(self) -> Any:
        if not self._reader.ok():
            raise ValueError("not an ArrayRecord file")
        return self._reader

    def __exit__(self, *_: object) -> None:
        self._reader.close()


def _reader(file: SourceFile) -> _Reader:
    try:
        from array_record.python import array_record_module
    except ImportError as error:  # there are no wheels for every system
        raise DataError(
            f"source {file.name}: reading ArrayRecord needs `pip install array_record`"
        ) from error
    return _Reader(array_record_module.ArrayRecordReader(str(file.path)))
