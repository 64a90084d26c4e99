"""Rows against a reference that walks the documents token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_jax.data import packing
from ddk_jax.data.packing import best_fit
from ddk_jax.data.rows import DomainRows, HostBatch, empty_batch, validation_batches
from ddk_jax.data.shards import Shard, ShardInfo, SplitInfo

Document = tuple[list[int], int]
"""Token ids, and how many of them are the prompt's."""


def make_shard(documents: list[Document]) -> Shard:
    sizes = [len(ids) for ids, _ in documents]
    return Shard(
        np.concatenate([ids for ids, _ in documents]).astype(np.uint16),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        turns_of(documents),
    )


def make_rows(documents: list[Document], length: int, domain: int = 3) -> DomainRows:
    return DomainRows([make_shard(documents)], name="some", domain=domain, length=length)


def packed_rows(documents: list[Document], length: int) -> DomainRows:
    shard = make_shard(documents)
    return DomainRows(
        [shard], name="some", domain=3, length=length, packing=best_fit([shard], length)
    )


def turns_of(documents: list[Document]) -> np.ndarray:
    """Where prompts end and responses end."""
    turns, start = [], 0
    for ids, prompt in documents:
        turns += [start + prompt, start + len(ids)] if prompt < len(ids) else []
        start += len(ids)
    return np.asarray(turns, np.int64)


def reference(documents: list[Document], length: int) -> list[tuple[list[int], ...]]:
    """tokens, segment_ids and role of each row, by walking the stream."""
    stream = [
        (token, number, 1 if place < prompt else 2)
        for number, (ids, prompt) in enumerate(documents)
        for place, token in enumerate(ids)
    ]
    rows = []
    start = 0
    while True:
        window = stream[start : start + length + 1]
        tokens, segments, roles, segment = [], [], [], 0
        for i, (token, number, role) in enumerate(window):
            segment += i == 0 or number != window[i - 1][1]
            tokens.append(token)
            segments.append(segment)
            roles.append(role)
        pad = [0] * (length + 1 - len(window))
        rows.append((tokens + pad, segments + pad, roles + pad))
        start += length
        if start >= len(stream) - 1:
            return rows


@st.composite
def corpora(draw: st.DrawFn) -> list[Document]:
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    plain = draw(st.booleans())
    ids = iter(range(1, sum(sizes) + 1))
    return [
        ([next(ids) for _ in range(size)], size if plain else draw(st.integers(0, size)))
        for size in sizes
    ]


@given(corpora(), st.integers(1, 40))
def test_rows_equal_the_reference(documents: list[Document], length: int) -> None:
    rows = make_rows(documents, length)
    expected = reference(documents, length)
    assert len(rows) == len(expected)
    for i, (tokens, segments, roles) in enumerate(expected):
        row = rows[i]
        np.testing.assert_array_equal(row.tokens, tokens)
        np.testing.assert_array_equal(row.segment_ids, segments)
        np.testing.assert_array_equal(row.role, roles)
        assert row.domain == 3


def predicted_tokens(batch: HostBatch) -> np.ndarray:
    """The tokens that some position predicts, as the contract's mask says."""
    same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    return batch.tokens[:, 1:][same & (batch.role[:, 1:] > 0)]


@given(corpora(), st.integers(1, 40), st.booleans())
def test_every_token_but_the_first_of_a_document_is_predicted_once(
    documents: list[Document], length: int, packed: bool
) -> None:
    rows = packed_rows(documents, length) if packed else make_rows(documents, length)
    batch = empty_batch(len(rows), length)
    rows.fill(batch, np.arange(len(rows)), np.arange(len(rows)))
    expected = [token for ids, _ in documents for token in ids[1:]]
    assert sorted(predicted_tokens(batch).tolist()) == expected


@given(corpora(), st.integers(1, 12), st.integers(0, 9), st.integers(1, 5))
def test_validation_batches_are_evenly_spaced_distinct_and_of_one_shape(
    documents: list[Document], length: int, count: int, batch_rows: int
) -> None:
    rows = make_rows(documents, length)
    total = min(count, len(rows)) if count else len(rows)
    batches = list(validation_batches(rows, count, batch_rows))
    assert len(batches) == -(-total // batch_rows)
    tokens = np.concatenate([batch.tokens for batch in batches])
    assert {batch.tokens.shape for batch in batches} == {(batch_rows, length + 1)}
    assert all((batch.domain == 3).all() for batch in batches)
    chosen = [k * len(rows) // total for k in range(total)]
    np.testing.assert_array_equal(tokens[:total], [rows[i].tokens for i in chosen])
    padding = np.concatenate([batch.role for batch in batches])[total:]
    assert not padding.any()


def test_batches_are_int32_and_filled_in_place() -> None:
    rows = make_rows([([5, 6, 7, 1], 4), ([8, 1], 1)], 4, domain=1)
    batch = empty_batch(3, 4)
    rows.fill(batch, np.asarray([2, 0]), np.asarray([1, 0]))
    assert all(array.dtype == np.int32 for array in batch[:4]) and batch.teacher is None
    assert batch.tokens.tolist() == [[5, 6, 7, 1, 8], [0] * 5, [8, 1, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2], [0] * 5, [1, 1, 0, 0, 0]]
    assert batch.role.tolist() == [[1, 1, 1, 1, 1], [0] * 5, [1, 2, 0, 0, 0]]
    assert batch.domain.tolist() == [1, 0, 1]


def test_bad_numbers_are_refused() -> None:
    rows = make_rows([([1, 2, 3], 3)], 2)
    with pytest.raises(IndexError, match="has 1 rows"):
        rows[1]
    with pytest.raises(IndexError, match="has 1 rows"):
        rows[-1]
    with pytest.raises(ValueError, match="seq_len"):
        make_rows([([1, 2, 3], 3)], 0)


@given(corpora(), st.integers(1, 40), st.integers(1, 4))
def test_best_fit_cuts_no_document_that_fits_a_row(
    documents: list[Document], length: int, open_rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN_ROWS", open_rows)
        rows = packed_rows(documents, length)
    whole = {tuple(ids) for ids, _ in documents if len(ids) <= length + 1}
    role_of = {
        token: 1 if place < prompt else 2
        for ids, prompt in documents
        for place, token in enumerate(ids)
    }
    found = []
    for number in range(len(rows)):
        row = rows[number]
        used = np.count_nonzero(row.segment_ids)
        assert used and not row.segment_ids[used:].any() and not row.role[used:].any()
        assert [role_of[token] for token in row.tokens[:used].tolist()] == row.role[:used].tolist()
        for segment in range(1, row.segment_ids.max() + 1):
            found.append(tuple(row.tokens[row.segment_ids == segment].tolist()))
    assert whole <= set(found)
    for ids, _ in documents:
        pieces = sorted(piece for piece in found if piece[0] in ids)
        if len(ids) > length + 1:
            assert all(len(piece) == length + 1 for piece in pieces[:-1])
            assert [piece[0] for piece in pieces[1:]] == [piece[-1] for piece in pieces[:-1]]


def test_best_fit_fills_rows_and_is_made_once(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(2, 40, 400).tolist()
    shard = make_shard([([5] * size, size) for size in sizes])
    made = best_fit([shard], 63)
    # Cut into two shards, the stream is the same.
    middle = int(shard.offsets[200])
    halves = [
        Shard(shard.tokens[:middle], shard.offsets[:201], shard.turns),
        Shard(shard.tokens[middle:], shard.offsets[200:] - middle, shard.turns),
    ]
    for one, other in zip(made, best_fit(halves, 63), strict=True):
        np.testing.assert_array_equal(one, other)
    used = packing.report([shard], 63, made)
    assert used.cut == 0.0 and used.padding < 0.02
    sequential = packing.report(halves, 63, None)
    assert sequential.padding < 0.01 and 0.2 < sequential.cut < 0.5
    info = SplitInfo(shards=(ShardInfo(documents=1, tokens=1, bytes=1, files={"a": "b"}),))
    first = packing.open_packing(tmp_path, "d", info, [shard], 63)
    again = packing.open_packing(tmp_path, "d", info, [], 63)
    for one, two, three in zip(made, first, again, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    assert len(list((tmp_path / "packing").iterdir())) == 1


def test_ids_beyond_sixteen_bits() -> None:
    shard = Shard(
        np.asarray([70_000, 151_642, 2], np.uint32),
        np.asarray([0, 3], np.int64),
        np.zeros(0, np.int64),
    )
    row = DomainRows([shard], name="wide", domain=0, length=2)[0]
    assert row.tokens.tolist() == [70_000, 151_642, 2]
