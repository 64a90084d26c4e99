"""The same rows in the tokens of a teacher that has another vocabulary.

The text of every piece of a document is taken from its tokens and cut again by the teacher's
tokenizer. Position t of a row is paired with the position of the teacher that has read the same
text: only there do both models predict what follows the same words. Where a token of one model ends
in the middle of a token of the other, there is no pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from ddk_jax.data.rows import DomainRows, HostBatch, TeacherRows
from ddk_jax.data.tokenize import Tokenizer

_SAMPLE_ROWS = 64
_SPARE = 1.1
_MULTIPLE = 32


class Retokeniser:
    """Rows of the data's tokenizer to rows of the teacher's, of one fixed length."""

    def __init__(self, ours: Tokenizer, theirs: Tokenizer, length: int) -> None:
        """Args are both tokenizers, and the tokens that the teacher reads of a row."""
        self.ours, self.theirs, self.length = ours, theirs, length

    def __call__(self, batch: HostBatch) -> HostBatch:
        """The batch with `teacher` filled in. What does not fit the length has no pair."""
        rows, width = batch.tokens.shape
        shape = (rows, self.length + 1)
        made = TeacherRows(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.int32),
            np.full((rows, width - 1), -1, np.int32),
        )
        pieces = list(_pieces(batch))
        texts = [self.ours.ends(batch.tokens[p.row, p.start : p.stop]) for p in pieces]
        encoded = self.theirs.encode_with_ends([text for text, _ in texts])
        used = np.zeros(rows, np.int64)
        for piece, (_, ends), (ids, their_ends) in zip(pieces, texts, encoded, strict=True):
            if batch.tokens[piece.row, piece.stop - 1] == self.ours.end_id:
                ids = np.append(ids, self.theirs.end_id)
            offset = used[piece.row]
            kept = ids[: self.length + 1 - offset]
            where = slice(offset, offset + kept.size)
            made.tokens[piece.row, where] = kept
            made.segment_ids[piece.row, where] = batch.segment_ids[piece.row, piece.start]
            _pair(made.position[piece.row], piece, ends, their_ends, int(offset), self.length)
            used[piece.row] += kept.size
        return batch._replace(teacher=made)


class _Piece(NamedTuple):
    """Tokens of one document in one row."""

    row: int
    start: int
    stop: int


def _pieces(batch: HostBatch) -> Iterable[_Piece]:
    for row, segments in enumerate(batch.segment_ids):
        edges = np.flatnonzero(np.diff(segments)) + 1
        for start, stop in zip([0, *edges], [*edges, segments.size], strict=True):
            if segments[start]:
                yield _Piece(row, int(start), int(stop))


def _pair(
    position: Int32[np.ndarray, " T"],
    piece: _Piece,
    ends: Int32[np.ndarray, " ours"],
    their_ends: Int32[np.ndarray, " theirs"],
    offset: int,
    length: int,
) -> None:
    """Fill in the pairs of one piece."""
    # The last token with an end: those before it are parts of the same character.
    last = {int(end): offset + k for k, end in enumerate(their_ends)}
    for i, end in enumerate(ends[: position.size - piece.start]):
        found = last.get(int(end), length) if end > 0 else length
        if found < length:
            position[piece.start + i] = found


def teacher_length(domains: Iterable[DomainRows], ours: Tokenizer, theirs: Tokenizer) -> int:
    """Tokens of the teacher that rows need: the most in a sample of every domain, and a tenth more.

    Depends on the data alone, so that a run which is continued has the same shapes.
    """
    most = 1
    for rows in domains:
        chosen = np.unique(np.linspace(0, len(rows) - 1, _SAMPLE_ROWS).astype(np.int64))
        for row in (rows[int(i)] for i in chosen):
            batch = HostBatch(*(x[None] for x in row[:3]), domain=np.zeros(1, np.int32))
            pieces = list(_pieces(batch))
            texts = [ours.ends(batch.tokens[p.row, p.start : p.stop])[0] for p in pieces]
            needed = sum(ids.size for ids in theirs.encode(texts)) + len(pieces)
            most = max(most, needed)
    return -(-int(most * _SPARE) // _MULTIPLE) * _MULTIPLE
