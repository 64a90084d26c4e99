"""Rows of data sets in the format of TensorFlow Datasets, without TensorFlow.

Read through `as_data_source`, so the data set must lie there in ArrayRecord files: it was made with
`download_and_prepare(file_format="array_record")`. Nothing is downloaded here. A data set whose
builder is code of the user is found by its files in `data_dir`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddk_jax.config import SourceConfig
from ddk_jax.data.sources.documents import Reject, Row
from ddk_jax.data.sources.files import SourceFile
from ddk_jax.errors import DataError
from ddk_jax.places import resolve_place

PREFIX = "tfds:"

_BATCH_ROWS = 256


def files_of(source: SourceConfig) -> list[SourceFile]:
    """The files of the split of a data set.

    Raises:
        DataError: there is no such data set or split, or it is not in ArrayRecord files.
    """
    builder, _ = _opened(source)
    split = builder.info.splits[source.split.partition("[")[0]]
    return [SourceFile(f"{source.path}/{path.name}", path) for path in split.filepaths]


def num_rows(source: SourceConfig) -> int:
    """Rows of the split.

    Raises:
        DataError: as `files_of`.
    """
    return len(_opened(source)[1])


def read_rows(source: SourceConfig, start: int, stop: int) -> Iterator[Row | Reject]:
    """Some rows of the split; lines count from its first row."""
    _, rows = _opened(source)
    for first in range(start, stop, _BATCH_ROWS):
        indices = range(first, min(first + _BATCH_ROWS, stop))
        try:
            batch = rows.__getitems__(list(indices))
        except (ValueError, RuntimeError, IndexError):
            batch = [None] * len(indices)
        for index, columns in zip(indices, batch, strict=True):
            yield _row(source, rows, index) if columns is None else Row(index + 1, _plain(columns))


def _row(source: SourceConfig, rows: Any, index: int) -> Row | Reject:
    """One row of a batch that could not be read as a whole."""
    try:
        return Row(index + 1, _plain(rows[index]))
    except (ValueError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        return Reject(source.path, index + 1, f"the file is cut off or damaged: {reason}")


def _opened(source: SourceConfig) -> tuple[Any, Any]:
    return _open(source.path, source.split, source.data_dir)


@functools.lru_cache(maxsize=4)
def _open(path: str, split: str, data_dir: str) -> tuple[Any, Any]:
    """The builder and the rows of the split."""
    import tensorflow_datasets as tfds

    name = path.removeprefix(PREFIX)
    folder = str(resolve_place(data_dir)) if data_dir else None
    try:
        builder = tfds.builder(name, data_dir=folder, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise DataError(
            f"source {path}: no such data set in {folder or 'the folder of TFDS'} "
            f"({str(error).splitlines()[0]})"
        ) from error
    if not builder.info.splits:
        raise DataError(
            f"source {path}: nothing in {builder.data_dir}; make it with TFDS first: "
            'download_and_prepare(file_format="array_record")'
        )
    try:
        return builder, builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise DataError(
            f"source {path}: {builder.data_dir} is not in ArrayRecord files; make it again with "
            'download_and_prepare(file_format="array_record")'
        ) from error
    except ValueError as error:
        raise DataError(f"source {path}: {' '.join(str(error).split())[:200]}") from error


def _plain(value: Any) -> Any:
    """Values as JSON would have them; text stays bytes."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
