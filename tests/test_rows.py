"""Rows against a reference that walks the documents token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_jax.data.rows import DomainRows, HostBatch, empty_batch, validation_batches
from ddk_jax.data.shards import Shard

Document = tuple[list[int], int]
"""Token ids, and how many of them are the prompt's."""


def make_rows(documents: list[Document], length: int, domain: int = 3) -> DomainRows:
    sizes = [len(ids) for ids, _ in documents]
    shard = Shard(
        np.concatenate([ids for ids, _ in documents]).astype(np.uint16),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        np.asarray([prompt for _, prompt in documents], np.int64),
    )
    return DomainRows(shard, name="some", domain=domain, length=length)


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


@given(corpora(), st.integers(1, 40))
def test_every_token_but_the_first_of_a_document_is_predicted_once(
    documents: list[Document], length: int
) -> None:
    rows = make_rows(documents, length)
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


def test_ids_beyond_sixteen_bits() -> None:
    shard = Shard(
        np.asarray([70_000, 151_642, 2], np.uint32),
        np.asarray([0, 3], np.int64),
        np.asarray([3], np.int64),
    )
    row = DomainRows(shard, name="wide", domain=0, length=2)[0]
    assert row.tokens.tolist() == [70_000, 151_642, 2]
