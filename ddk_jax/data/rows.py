"""Rows of tokens out of a flat stream: what a model sees, by number, in any order.

Row i of a domain with T tokens to predict is `tokens[i * T : i * T + T + 1]`. Neighbouring rows
share one token: the last of a row is predicted there and is context in the next. So every token but
the first of a document is predicted exactly once. The content of a row depends on the stream and T
only.

With a packing (`ddk_jax.data.packing`), a row is made of whole documents instead, and only longer
ones are cut. Every token but the first of a document is predicted once there too.

A row holds pieces of one document or more, numbered 1, 2, ... in `segment_ids`; 0 is padding.
Position t predicts token t + 1 if both are in one segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from ddk_jax.data.packing import Packing, open_packing
from ddk_jax.data.shards import Shard, Split, open_shards, read_manifest
from ddk_jax.data.stream import TokenStream


class TeacherRows(NamedTuple):
    """The text of the rows in the tokens of a teacher with another vocabulary.

    Attributes:
        tokens: ids; 0 where padded.
        segment_ids: as in the rows themselves.
        position: of every predicting token, where in the teacher's row it has read the same text;
            -1 if nowhere.
    """

    tokens: Int32[np.ndarray, "rows theirs+1"]
    segment_ids: Int32[np.ndarray, "rows theirs+1"]
    position: Int32[np.ndarray, "rows length"]


class HostBatch(NamedTuple):
    """Rows as the train step gets them, plain numpy.

    Attributes:
        tokens: ids; 0 where padded.
        segment_ids: 1, 2, ... per document piece of a row; 0 where padded.
        role: PADDING, PROMPT or RESPONSE.
        domain: number of the domain of each row.
        teacher: for a teacher with another vocabulary.
    """

    tokens: Int32[np.ndarray, "rows length+1"]
    segment_ids: Int32[np.ndarray, "rows length+1"]
    role: Int32[np.ndarray, "rows length+1"]
    domain: Int32[np.ndarray, " rows"]
    teacher: TeacherRows | None = None


class Row(NamedTuple):
    """One row; the fields are those of `HostBatch`, before anything is added."""

    tokens: Int32[np.ndarray, "length+1"]
    segment_ids: Int32[np.ndarray, "length+1"]
    role: Int32[np.ndarray, "length+1"]
    domain: int


def empty_batch(rows: int, length: int, domain: int = 0) -> HostBatch:
    """A batch of padding."""
    shape = (rows, length + 1)
    arrays = (np.zeros(shape, np.int32) for _ in range(3))
    return HostBatch(*arrays, domain=np.full(rows, domain, np.int32))


def predicted_tokens(batch: HostBatch, num_domains: int) -> Int64[np.ndarray, " domains"]:
    """Predicted tokens of a batch by domain."""
    same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    per_row = (same & (batch.role[:, 1:] > 0)).sum(axis=1)
    return np.bincount(batch.domain, weights=per_row, minlength=num_domains).astype(np.int64)


class DomainRows:
    """The rows of one domain and split: a sequence with random access, O(log documents) a row.

    Attributes:
        name: the domain's name.
        domain: its number in weights and metrics.
        length: tokens that a row predicts (T).
        num_tokens: tokens of the stream.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        name: str,
        domain: int,
        length: int,
        packing: Packing | None = None,
    ) -> None:
        """Rows of the stream of some shards that predict `length` tokens.

        Without a packing the rows are cut from the stream one after the other.

        Raises:
            ValueError: `length` is not positive.
        """
        if length < 1:
            raise ValueError(f"rows of {length} tokens: data.seq_len must be at least 1")
        self.name = name
        self.domain = domain
        self.length = length
        self._stream = TokenStream(shards)
        self._packing = packing
        self.num_tokens = self._stream.num_tokens

    def __len__(self) -> int:
        """Number of rows; without a packing only the last one may be padded."""
        if self._packing is not None:
            return self._packing.rows.size - 1
        return max(1, -(-(self.num_tokens - 1) // self.length))

    def __getitem__(self, index: int) -> Row:
        """Row `index`, from 0."""
        batch = empty_batch(1, self.length)
        self.fill(batch, np.zeros(1, np.int64), np.asarray([index], np.int64))
        return Row(batch.tokens[0], batch.segment_ids[0], batch.role[0], self.domain)

    def fill(
        self,
        batch: HostBatch,
        places: Int64[np.ndarray, " chosen"],
        indices: Int64[np.ndarray, " chosen"],
    ) -> None:
        """Write rows `indices` of this domain into rows `places` of a batch of padding.

        Raises:
            IndexError: there is no such row.
        """
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"domain {self.name} has {len(self)} rows, asked for {indices.tolist()}"
            )
        for place, index in zip(places.tolist(), indices.tolist(), strict=True):
            row = batch.tokens[place], batch.segment_ids[place], batch.role[place]
            at = segments = 0
            for start, stop in self._pieces(index):
                piece = tuple(array[at : at + stop - start] for array in row)
                self._stream.copy(start, stop, *piece)
                piece[1][:] += segments
                at, segments = at + stop - start, int(piece[1][-1])
        batch.domain[places] = self.domain

    def _pieces(self, index: int) -> list[tuple[int, int]]:
        if self._packing is not None:
            return self._packing.pieces(index)
        start = index * self.length
        return [(start, min(start + self.length + 1, self.num_tokens))]


def open_rows(
    directory: Path,
    split: Split,
    length: int,
    packing: Literal["sequential", "best_fit"] = "sequential",
) -> list[DomainRows]:
    """The rows of every domain of a directory of prepared data, in the manifest's order.

    Raises:
        DataError: the directory does not hold sound prepared data.
        OSError: a packing cannot be written beside it.
    """
    manifest = read_manifest(directory)
    found = []
    for number, name in enumerate(manifest.names):
        shards = open_shards(directory, manifest, name, split)
        packed = None
        if packing == "best_fit":
            info = manifest.domain(name).split(split)
            packed = open_packing(directory, name, info, shards, length)
        rows = DomainRows(shards, name=name, domain=number, length=length, packing=packed)
        found.append(rows)
    return found


def validation_batches(
    rows: DomainRows,
    count: int,
    batch_rows: int,
    places: Int64[np.ndarray, " local"] | None = None,
) -> Iterator[HostBatch]:
    """The same `count` rows each time, evenly spaced over a split, in batches of one shape.

    Args:
        rows: the split.
        count: rows to take; all of them if 0 or if there are fewer.
        batch_rows: rows of a batch. The last one is filled up with padding.
        places: those rows of every batch that are filled; the others are padding. Default: all.
    """
    places = np.arange(batch_rows, dtype=np.int64) if places is None else places
    total = len(rows) if count == 0 else min(count, len(rows))
    chosen = np.arange(total, dtype=np.int64) * len(rows) // total
    for start in range(0, total, batch_rows):
        part = chosen[start : start + batch_rows]
        batch = empty_batch(batch_rows, rows.length, rows.domain)
        filled = places[places < part.size]
        rows.fill(batch, filled, part[filled])
        yield batch
