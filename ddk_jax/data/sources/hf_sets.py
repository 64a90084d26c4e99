"""Rows of Hugging Face `datasets`, streamed; needs the extra `hf-datasets`.

A folder is either one that `save_to_disk` wrote, or one of data files as `load_dataset` reads them.
A data set of the hub is pinned by its commit, since its files cannot be compared before reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ddk_jax.config import SourceConfig
from ddk_jax.data.sources.documents import Reject, Row
from ddk_jax.data.sources.files import SourceFile
from ddk_jax.errors import DataError
from ddk_jax.places import AnyPath, resolve_path

PREFIX = "hf:"


def files_of(source: SourceConfig) -> list[SourceFile]:
    """The files of a folder, in order; none for a data set of the hub.

    Raises:
        DataError: there is no such folder, and no commit is given.
    """
    name = source.path.removeprefix(PREFIX)
    folder = resolve_path(name)
    if folder.is_dir():
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return [SourceFile(f"{name}/{path.relative_to(folder).as_posix()}", path) for path in found]
    if not source.revision:
        raise DataError(
            f"source {source.path}: no such folder; for a data set of the hub, pin its commit "
            "with `revision`"
        )
    return []


def num_shards(source: SourceConfig) -> int:
    """Parts that can be read apart.

    Raises:
        DataError: the extra is not installed, or the data set cannot be opened.
    """
    return _opened(source).num_shards


def read_shard(source: SourceConfig, shard: int) -> Iterator[Row | Reject]:
    """The rows of a part; lines count from the part's first row."""
    rows = _opened(source)
    name = source.path if rows.num_shards == 1 else f"{source.path} shard {shard}"
    line = 0
    try:
        for columns in rows.shard(num_shards=rows.num_shards, index=shard):
            line += 1
            yield Row(line, dict(columns))
    except (ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        yield Reject(name, line + 1, f"cannot be read further: {reason}")


def _opened(source: SourceConfig) -> Any:
    """The split as an `IterableDataset`."""
    try:
        import datasets  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise DataError(
            f"source {source.path}: needs the extra: pip install 'ddk_jax[hf-datasets]'"
        ) from error
    name = source.path.removeprefix(PREFIX)
    folder = resolve_path(name)
    try:
        if _is_saved(folder):
            found: Any = datasets.load_from_disk(str(folder))
            if isinstance(found, datasets.DatasetDict):
                found = found[source.split]
            return found.to_iterable_dataset(num_shards=max(1, len(found.cache_files)))
        revision = source.revision or None
        place = str(folder) if folder.is_dir() else name
        return datasets.load_dataset(place, split=source.split, streaming=True, revision=revision)
    except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"source {source.path}: {' '.join(str(error).split())[:300]}") from error


def _is_saved(folder: AnyPath) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
