"""Rows of JSONL: one JSON object a line, in UTF-8.

A byte order mark at the start of a file is dropped, and blank lines hold no row.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from ddk_jax.data.sources.documents import Reject, Row
from ddk_jax.data.sources.fields import kind_of
from ddk_jax.data.sources.files import SourceFile, guarded, without_bom

MAX_LINE_BYTES = 2**30
"""A longer line is rejected; it is never held in memory."""


def read_rows(file: SourceFile) -> Iterator[Row | Reject]:
    """The JSON objects of a JSONL file in order, with a `Reject` in place of what is none.

    Raises:
        StorageError: the file cannot be read at all.
    """
    yield from guarded(file, _rows)


def _rows(stream: io.BufferedIOBase, name: str) -> Iterator[Row | Reject]:
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_LINE_BYTES)
            reason = f"longer than {MAX_LINE_BYTES // 2**20} MiB: split it into several documents"
            yield Reject(name, number, reason)
            continue
        if number == 1:
            raw = without_bom(raw)
        if raw.strip():
            yield _row(raw, name, number)


def _row(raw: bytes, name: str, number: int) -> Row | Reject:
    try:
        row: Any = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Reject(name, number, f"invalid UTF-8 at byte {error.start} of the line")
    except RecursionError:
        return Reject(name, number, "broken JSON: nested too deeply")
    except ValueError as error:
        return Reject(name, number, f"broken JSON: {error}")
    if not isinstance(row, dict):
        return Reject(name, number, f"expected a JSON object, found {kind_of(row)}")
    return Row(number, row)
