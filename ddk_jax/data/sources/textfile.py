"""A text or code file as one row."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator

from ddk_jax.config import SourceConfig
from ddk_jax.data.sources.documents import Reject, Row
from ddk_jax.data.sources.files import SourceFile, guarded, without_bom
from ddk_jax.errors import UserError

MAX_FILE_BYTES = 2**30
"""A longer file is rejected."""


def read_text(file: SourceFile, source: SourceConfig) -> Iterator[Row | Reject]:
    """The text of a file as the only column of a row, or a `Reject`.

    Raises:
        StorageError: the file cannot be read at all.
    """
    yield from guarded(file, lambda stream, name: _whole(stream, name, source))


def check_encoding(source: SourceConfig) -> None:
    """That the encoding of a source is one of text.

    Raises:
        UserError: it is not.
    """
    try:
        "a".encode(source.encoding)
        codecs.lookup(source.encoding)
    except (LookupError, UnicodeError) as error:
        raise UserError(f"source {source.path}: encoding {source.encoding}: {error}") from error


def _whole(stream: io.BufferedIOBase, name: str, source: SourceConfig) -> Iterator[Row | Reject]:
    if column := source.prompt or source.messages:
        yield Reject(name, 1, f"a text file has no columns, and the source names {column!r}")
        return
    raw = stream.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        reason = f"longer than {MAX_FILE_BYTES // 2**20} MiB: split it into several documents"
        yield Reject(name, 1, reason)
        return
    utf8 = codecs.lookup(source.encoding).name == "utf-8"
    try:
        # The mark is U+FEFF in every encoding of Unicode; some decoders leave it.
        text = (without_bom(raw) if utf8 else raw).decode(source.encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        encoding = "UTF-8" if utf8 else source.encoding
        yield Reject(name, 1, f"invalid {encoding} at byte {error.start}")
        return
    yield Row(1, {source.text: text})
