"""Rows in the tokens of another vocabulary: the same text, and pairs that have read the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from ddk_jax.data.retokenise import Retokeniser, teacher_length
from ddk_jax.data.rows import HostBatch, open_rows
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.places import resolve_path

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x[0] + 12345  # naïve",
    "Grüße 你好 \U0001f600!",
    "  two spaces, an <|endoftext|> spelt out  ",
)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer(resolve_path("assets:tokenizer"))


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("letters")))


def packed(tokenizer: Tokenizer, texts: tuple[str, ...], length: int) -> HostBatch:
    """One row of as many documents as fit, the last one cut."""
    pieces = [np.append(ids, tokenizer.end_id) for ids in tokenizer.encode(texts)]
    tokens = np.concatenate(pieces)[: length + 1]
    segments = np.repeat(np.arange(1, len(pieces) + 1), [p.size for p in pieces])[: length + 1]
    pad = (0, length + 1 - tokens.size)
    tokens, segments = (np.pad(x, pad).astype(np.int32)[None] for x in (tokens, segments))
    return HostBatch(tokens, segments, np.minimum(segments, 1), np.zeros(1, np.int32))


def read(tokenizer: Tokenizer, tokens: np.ndarray, segments: np.ndarray, last: int) -> str:
    """The text of a document up to and with token `last`."""
    first = int(np.flatnonzero(segments == segments[last])[0])
    return tokenizer.ends(tokens[first : last + 1])[0]


@pytest.mark.parametrize("length", [40, 90, 200])
@pytest.mark.parametrize("order", ["words first", "letters first"])
def test_pairs_have_read_the_same_text(
    words: Tokenizer, letters: Tokenizer, order: str, length: int
) -> None:
    ours, theirs = (words, letters) if order == "words first" else (letters, words)
    batch = packed(ours, TEXTS, length)
    made = Retokeniser(ours, theirs, 256)(batch).teacher
    assert made is not None
    pairs = 0
    for t, there in enumerate(made.position[0]):
        if there < 0:
            continue
        pairs += 1
        assert made.segment_ids[0, there] == batch.segment_ids[0, t]
        mine = read(ours, batch.tokens[0], batch.segment_ids[0], t)
        assert read(theirs, made.tokens[0], made.segment_ids[0], there) == mine
    # The coarser of the two decides: all its tokens that end a character have a partner.
    coarse = packed(words, TEXTS, length) if order == "words first" else batch
    assert pairs > 0.15 * np.count_nonzero(coarse.segment_ids)


def test_every_token_of_the_same_tokenizer_is_its_own_partner(words: Tokenizer) -> None:
    batch = packed(words, TEXTS[:2], 60)
    made = Retokeniser(words, words, 64)(batch).teacher
    assert made is not None
    np.testing.assert_array_equal(made.tokens[0, :61], batch.tokens[0])
    inside = (batch.segment_ids[0, :-1] > 0) & (batch.tokens[0, :-1] != words.end_id)
    found = np.where(inside, made.position[0], -1)
    complete = found >= 0
    np.testing.assert_array_equal(found[complete], np.flatnonzero(complete))
    # Only a token that ends within a character has none.
    assert complete.sum() >= inside.sum() - 2


def test_what_does_not_fit_has_no_pair(words: Tokenizer, letters: Tokenizer) -> None:
    batch = packed(words, TEXTS, 80)
    whole = Retokeniser(words, letters, 300)(batch).teacher
    cut = Retokeniser(words, letters, 30)(batch).teacher
    assert whole is not None and cut is not None
    np.testing.assert_array_equal(cut.tokens[0], whole.tokens[0, :31])
    expected = np.where(whole.position < 30, whole.position, -1)
    np.testing.assert_array_equal(cut.position, expected)


def test_a_row_of_padding_has_no_pair(words: Tokenizer, letters: Tokenizer) -> None:
    made = Retokeniser(words, letters, 8)(
        packed(words, ("",), 5)._replace(segment_ids=np.zeros((1, 6), np.int32))
    ).teacher
    assert made is not None
    assert not made.tokens.any() and (made.position == -1).all()


def test_the_length_holds_the_sampled_rows(tiny_root: Path, words: Tokenizer) -> None:
    rows = open_rows(tiny_root / "data", "train", tiny.SEQ_LEN)
    bytes_of = Tokenizer(tiny_root / "tokenizer")
    assert teacher_length(rows, bytes_of, words) <= 32
    same = teacher_length(rows, bytes_of, bytes_of)
    assert tiny.SEQ_LEN <= same <= 64 and same % 32 == 0
