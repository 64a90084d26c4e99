"""Rows of Parquet: one row group at a time, and only the columns that are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ddk_jax.data.sources.documents import Reject, Row
from ddk_jax.data.sources.files import SourceFile
from ddk_jax.errors import StorageError

_BATCH_ROWS = 1024


def row_groups(file: SourceFile) -> list[int]:
    """Bytes of each row group; empty if the file is damaged, which reading it reports.

    Raises:
        StorageError: the file cannot be read at all.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with file.path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as parquet:
            groups = range(parquet.metadata.num_row_groups)
            return [parquet.metadata.row_group(i).total_byte_size for i in groups]
    except pyarrow.ArrowInvalid:
        return []
    except OSError as error:
        if error.errno is None:
            return []
        raise StorageError(f"{file.name}: cannot be read ({error.strerror or error})") from error


def read_row_groups(
    file: SourceFile, fields: Sequence[str], start: int, stop: int
) -> Iterator[Row | Reject]:
    """The rows of some row groups, with the fields that are there; lines count from the file's.

    A damaged file gives the rows before the damage, then a reject.

    Raises:
        StorageError: the file cannot be read at all.
    """
    import pyarrow
    import pyarrow.parquet

    line = 0
    try:
        with file.path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as parquet:
            names = set(parquet.schema_arrow.names)
            wanted = {name for field in fields for name in (field, field.split(".")[0])}
            columns = [name for name in parquet.schema_arrow.names if name in wanted & names]
            stop = parquet.metadata.num_row_groups if stop < 0 else stop
            line = sum(parquet.metadata.row_group(i).num_rows for i in range(start))
            for group in range(start, stop):
                batches = parquet.iter_batches(
                    _BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False
                )
                for batch in batches:
                    for values in _rows(batch, columns):
                        line += 1
                        yield Row(line, values)
    except pyarrow.ArrowInvalid as error:
        yield Reject(file.name, line + 1, _damage(error))
    except OSError as error:
        if error.errno is None:
            yield Reject(file.name, line + 1, _damage(error))
            return
        raise StorageError(f"{file.name}: cannot be read ({error.strerror or error})") from error


def _rows(batch: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(batch.num_rows))
        return
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        # A writer that did not check its text. Row by row, the others can still be read.
        for i in range(batch.num_rows):
            yield {name: _value(batch.column(name)[i]) for name in columns}


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


def _damage(error: Exception) -> str:
    return f"the file is cut off or damaged: {' '.join(str(error).split())[:200]}"
