"""Rows in which no document is cut that fits: best fit with a bounded look-ahead.

A document that is longer than a row is cut into pieces of a row's size, each of which repeats the
last token of the one before: there it is predicted, here it is context. What remains is a piece
like a short document. Pieces are taken in the order of the stream, `LOOK_AHEAD` at a time, the
longest of them first, and each goes to the open row that it fills best; at most `OPEN_ROWS` rows
stay open. So the rows depend on the documents and the length of a row only.

A packing is made once (about 50 bytes a document, a few millionths of a second), and memory-mapped
from then on.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddk_jax.data.shards import Shard, SplitInfo

LOOK_AHEAD = 4096
"""Pieces of which the longest is placed first."""
OPEN_ROWS = 512
"""Rows that wait for a piece which fits."""

_BLOCK = 2**20


class Packing(NamedTuple):
    """Which pieces of the stream a row consists of.

    Attributes:
        starts: where each piece begins in the stream, by row.
        stops: where it ends.
        rows: first piece of every row, and the number of pieces.
    """

    starts: np.ndarray
    stops: np.ndarray
    rows: np.ndarray

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """Start and end of the pieces of a row."""
        where = slice(int(self.rows[row]), int(self.rows[row + 1]))
        return list(zip(self.starts[where].tolist(), self.stops[where].tolist(), strict=True))


class PackingReport(NamedTuple):
    """How well rows are used: shares between 0 and 1.

    Attributes:
        padding: of the places of all rows, those that hold no token.
        cut: of the documents that fit a row, those that are in more than one.
    """

    padding: float
    cut: float


def best_fit(shards: Sequence[Shard], length: int) -> Packing:
    """Pack the documents of a stream into rows that predict `length` tokens."""
    width = length + 1
    row_of, starts, stops = array("q"), array("q"), array("q")
    number = 0
    # Open rows by the room they have; bit n of `rooms` says that one has n places left.
    by_room: list[deque[int]] = [deque() for _ in range(width + 1)]
    rooms, opened = 0, 0
    for start, stop in _longest_first(_pieces(shards, length)):
        size = stop - start
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].popleft()
            opened -= 1
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = width, number
            number += 1
        row_of.append(row)
        starts.append(start)
        stops.append(stop)
        if (left := room - size) > 1:  # a document has two tokens at least
            by_room[left].append(row)
            rooms |= 1 << left
            opened += 1
        if opened > OPEN_ROWS:
            fullest = (rooms & -rooms).bit_length() - 1
            by_room[fullest].popleft()
            opened -= 1
            if not by_room[fullest]:
                rooms &= ~(1 << fullest)
    rows = np.frombuffer(row_of, np.int64)
    order = np.argsort(rows, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=number))]).astype(np.int64)
    begins, ends = (np.frombuffer(values, np.int64)[order] for values in (starts, stops))
    return Packing(begins, ends, first)


def open_packing(
    directory: Path, domain: str, info: SplitInfo, shards: Sequence[Shard], length: int
) -> Packing:
    """The packing of a split, memory-mapped: made the first time, and kept beside the data.

    Raises:
        OSError: it cannot be written or read.
    """
    content = json.dumps([domain, length, LOOK_AHEAD, OPEN_ROWS, sorted(info.files.items())])
    digest = hashlib.sha256(content.encode()).hexdigest()[:24]
    folder = directory / "packing" / f"{domain}-{length}-{digest}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        for name, values in best_fit(shards, length)._asdict().items():
            np.save(partial / f"{name}.npy", values, allow_pickle=False)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise  # otherwise another process was faster, with the same bytes
    return Packing(
        *(
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            for name in Packing._fields
        )
    )


def report(shards: Sequence[Shard], length: int, packing: Packing | None) -> PackingReport:
    """How well the rows of a stream are used; without a packing, of sequential rows."""
    tokens = sum(int(shard.offsets[-1]) for shard in shards)
    if packing is not None:
        held = int(np.sum(packing.stops - packing.starts))
        return PackingReport(1 - held / ((packing.rows.size - 1) * (length + 1)), 0.0)
    rows = max(1, -(-(tokens - 1) // length))
    fitting = cut = first = 0
    for shard in shards:
        for begin in range(0, shard.offsets.size - 1, _BLOCK):
            edges = np.asarray(shard.offsets[begin : begin + _BLOCK + 1]) + first
            short = np.diff(edges) <= length + 1
            fitting += int(np.count_nonzero(short))
            # The rows in which its first and its last token are predicted.
            same = edges[:-1] // length == (edges[1:] - 2) // length
            cut += int(np.count_nonzero(short & ~same))
        first += int(shard.offsets[-1])
    places = rows * length + 1  # neighbouring rows share a token
    return PackingReport(1 - tokens / max(places, tokens), cut / max(1, fitting))


def _longest_first(pieces: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    while window := list(islice(pieces, LOOK_AHEAD)):
        yield from sorted(window, key=lambda piece: piece[0] - piece[1])


def _pieces(shards: Sequence[Shard], length: int) -> Iterator[tuple[int, int]]:
    """Start and end of what has to be placed, in the order of the stream."""
    first = 0
    for shard in shards:
        for begin in range(0, shard.offsets.size - 1, _BLOCK):
            edges = (np.asarray(shard.offsets[begin : begin + _BLOCK + 1]) + first).tolist()
            for start, stop in pairwise(edges):
                at = start
                while stop - at > length + 1:
                    yield at, at + length + 1
                    at += length
                if stop - at > 1 or at == start:
                    yield at, stop
        first += int(shard.offsets[-1])
