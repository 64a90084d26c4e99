"""Documents from every kind of source.

A source is cut into pieces that can be read apart, by one process or by several; a piece gives
rows, and a row a document, or the reason why there is none. This module knows the kinds; each has a
module of its own, and whatever package it needs is imported when a source of that kind is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ddk_jax.config import SourceConfig
from ddk_jax.data.sources import array_records, hf_sets, parquet, tfds_sets
from ddk_jax.data.sources.documents import (
    Document,
    MultipleChoice,
    Reject,
    Row,
    Turn,
    documents_of,
    is_multiple_choice,
    multiple_choice,
    text_of,
)
from ddk_jax.data.sources.fields import check_filters, columns_read
from ddk_jax.data.sources.files import (
    ARRAY_RECORD_SUFFIXES,
    PARQUET_SUFFIXES,
    SourceFile,
    file_sha256,
    file_size,
    inner_suffix,
    is_jsonl,
    source_files,
)
from ddk_jax.data.sources.jsonl import read_rows
from ddk_jax.data.sources.textfile import check_encoding, read_text
from ddk_jax.errors import UserError
from ddk_jax.places import resolve_place

__all__ = [
    "Document",
    "MultipleChoice",
    "Piece",
    "Reject",
    "Row",
    "SourceFile",
    "Turn",
    "check_source",
    "documents_of",
    "file_sha256",
    "file_size",
    "files_of",
    "identity",
    "is_jsonl",
    "is_multiple_choice",
    "multiple_choice",
    "pieces_of",
    "read_piece",
    "read_rows",
    "source_files",
    "text_of",
]

PIECE_BYTES = 2**26
"""Size at which Parquet files and data sets are cut into pieces."""


class Piece(NamedTuple):
    """A part of a source that is read in one go.

    Attributes:
        name: the file as the user would write it, or the data set.
        location: the file's path; empty for a data set.
        start: first row group, record, row or shard.
        stop: after the last one; -1: to the end.
        size: bytes, roughly.
    """

    name: str
    location: str
    start: int
    stop: int
    size: int


def check_source(source: SourceConfig) -> None:
    """That the settings of a source can be meant.

    Raises:
        UserError: they cannot.
    """
    where = f"source {source.path}"
    if bool(source.prompt) != bool(source.response):
        raise UserError(f"{where}: prompt and response are given together or not at all")
    if source.messages and source.prompt:
        raise UserError(f"{where}: name messages, or prompt and response, but not both")
    check_encoding(source)
    check_filters(source.filters, where)


def files_of(source: SourceConfig) -> list[SourceFile]:
    """The files that decide what a source holds, in a fixed order.

    Raises:
        DataError: the source is not there.
    """
    if source.path.startswith(tfds_sets.PREFIX):
        return tfds_sets.files_of(source)
    if source.path.startswith(hf_sets.PREFIX):
        return hf_sets.files_of(source)
    return source_files(source)


def identity(source: SourceConfig, files: Sequence[SourceFile], digests: Sequence[str]) -> str:
    """SHA-256 over the names of a source's files and the digests of their contents."""
    digest = hashlib.sha256()
    for file, content in zip(files, digests, strict=True):
        digest.update(f"{content} {file.name}\n".encode())
    if not files:
        digest.update(f"{source.path} {source.revision}\n".encode())
    return digest.hexdigest()


def pieces_of(source: SourceConfig) -> Iterator[Piece]:
    """The pieces of a source in reading order.

    Raises:
        DataError, StorageError: the source is not there, or cannot be read at all.
    """
    if source.path.startswith(tfds_sets.PREFIX):
        size = sum(file_size(file.path) for file in tfds_sets.files_of(source))
        yield from _cut(source.path, "", tfds_sets.num_rows(source), size)
    elif source.path.startswith(hf_sets.PREFIX):
        size = sum(file_size(file.path) for file in hf_sets.files_of(source))
        shards = hf_sets.num_shards(source)
        for shard in range(shards):
            yield Piece(source.path, "", shard, shard + 1, size // shards)
    else:
        for file in source_files(source):
            yield from _pieces_of_file(file)


def _pieces_of_file(file: SourceFile) -> Iterator[Piece]:
    location, suffix, size = str(file.path), inner_suffix(file.path), file_size(file.path)
    if suffix in ARRAY_RECORD_SUFFIXES and (records := array_records.num_records(file)) > 0:
        yield from _cut(file.name, location, records, size)
    elif suffix in PARQUET_SUFFIXES and (groups := parquet.row_groups(file)):
        start, held = 0, 0
        for group, group_bytes in enumerate(groups):
            held += group_bytes
            if held >= PIECE_BYTES or group == len(groups) - 1:
                yield Piece(file.name, location, start, group + 1, held)
                start, held = group + 1, 0
    else:
        yield Piece(file.name, location, 0, -1, size)


def _cut(name: str, location: str, rows: int, size: int) -> Iterator[Piece]:
    """Equal parts of numbered rows."""
    parts = max(1, min(rows, -(-size // PIECE_BYTES)))
    for part in range(parts):
        start, stop = rows * part // parts, rows * (part + 1) // parts
        yield Piece(name, location, start, stop, size // parts)


def read_piece(piece: Piece, source: SourceConfig, field: str = "") -> Iterator[Row | Reject]:
    """The rows of a piece, with a `Reject` in place of each that cannot be read.

    A file that is cut off or damaged gives the rows before the damage, then a reject.

    Args:
        piece: one of `pieces_of(source)`.
        source: what it belongs to.
        field: another field that is needed besides those the source names.

    Raises:
        StorageError: the file cannot be read at all.
    """
    file = SourceFile(piece.name, resolve_place(piece.location))
    suffix = inner_suffix(file.path)
    if source.path.startswith(tfds_sets.PREFIX):
        yield from tfds_sets.read_rows(source, piece.start, piece.stop)
    elif source.path.startswith(hf_sets.PREFIX):
        yield from hf_sets.read_shard(source, piece.start)
    elif suffix in ARRAY_RECORD_SUFFIXES:
        yield from array_records.read_records(file, source.text, piece.start, piece.stop)
    elif suffix in PARQUET_SUFFIXES:
        fields = columns_read(source, field)
        yield from parquet.read_row_groups(file, fields, piece.start, piece.stop)
    elif is_jsonl(file.path):
        yield from read_rows(file)
    else:
        yield from read_text(file, source)
