"""Validation text that is in training too: exact and near-duplicates by hashes of n-grams.

Exact duplicates of whole documents are dropped while preparing. Here, every run of 13 tokens within
a document is hashed. Of a validation document, the share of its n-grams that occurs in the training
text says how much of it a student may have seen: 1 for a copy that differs in its first line, a few
per cent for a shared licence header. In a large corpus the n-grams whose hashes fall under a
threshold stand for all, the same ones on both sides (a sketch of the kind known as FracMinHash), so
that memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

from ddk_jax.data.shards import LeakInfo, Shard

NGRAM = 13
"""Tokens that are hashed together."""
DOCUMENT_SHARE = 0.5
"""A validation document with this share of its n-grams in training counts as a near-duplicate."""

_SKETCH = 2**21
_BLOCK = 2**20
_FILTER_BITS = 24
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_MIX = np.uint64(0xD6E8FEB86659FD93)


class Sketch(NamedTuple):
    """The n-grams of all validation splits.

    Attributes:
        hashes: all hashes, sorted, each once.
        threshold: largest hash that is kept.
        domain: of each n-gram of each document, the document's domain;
        document: and its number over all domains;
        place: and where its hash is in `hashes`.
    """

    hashes: UInt64[np.ndarray, " hashes"]
    threshold: int
    domain: np.ndarray
    document: np.ndarray
    place: np.ndarray


class ScanTask(NamedTuple):
    """Training tokens to look through: files of the hashes, the tokens and the offsets."""

    hashes: Path
    threshold: int
    domain: int
    tokens: Path
    offsets: Path


def make_sketch(validation: Sequence[Sequence[Shard]]) -> Sketch:
    """The n-grams of the validation splits; the outer sequence is over domains."""
    tokens = sum(shard.tokens.size for shards in validation for shard in shards)
    threshold = 2**64 // max(1, -(-tokens // _SKETCH)) - 1
    domains, documents, hashes = [], [], []
    first = 0
    for domain, shards in enumerate(validation):
        for shard in shards:
            for found, document in _ngrams(shard.tokens, shard.offsets, threshold):
                # A line that a document repeats counts once.
                pairs = np.unique(np.stack([document.astype(np.uint64) + first, found]), axis=1)
                documents.append(pairs[0].astype(np.int64))
                hashes.append(pairs[1])
                domains.append(np.full(pairs.shape[1], domain, np.int32))
            first += shard.offsets.size - 1
    if not hashes:
        nothing = np.zeros(0, np.int64)
        return Sketch(np.zeros(0, np.uint64), threshold, nothing, nothing, nothing)
    unique, place = np.unique(np.concatenate(hashes), return_inverse=True)
    return Sketch(unique, threshold, np.concatenate(domains), np.concatenate(documents), place)


def scan(task: ScanTask) -> np.ndarray:
    """Which of the hashes occur in training tokens: their places, ascending."""
    hashes = np.load(task.hashes, allow_pickle=False)
    tokens = np.load(task.tokens, mmap_mode="r", allow_pickle=False)
    offsets = np.load(task.offsets, mmap_mode="r", allow_pickle=False)
    seen = np.zeros(hashes.size, bool)
    if not hashes.size:
        return np.flatnonzero(seen)
    # Most n-grams are in no validation split: a table of bits spares them the search.
    low = np.uint64(2**_FILTER_BITS - 1)
    may_be = np.zeros(2**_FILTER_BITS, bool)
    may_be[(hashes & low).astype(np.int64)] = True
    for found, _ in _ngrams(np.asarray(tokens), np.asarray(offsets), task.threshold):
        found = found[may_be[(found & low).astype(np.int64)]]
        place = np.minimum(np.searchsorted(hashes, found), hashes.size - 1)
        seen[place[hashes[place] == found]] = True
    return np.flatnonzero(seen)


def judge(
    sketch: Sketch, names: Sequence[str], seen: Mapping[int, Sequence[np.ndarray]]
) -> dict[str, LeakInfo]:
    """What the scans found, by domain of the validation split.

    Args:
        sketch: the n-grams.
        names: of the domains.
        seen: places that were found in the training split of each domain.
    """
    table = np.zeros((len(names), sketch.hashes.size), bool)
    for domain, places in seen.items():
        for one in places:
            table[domain, one] = True
    anywhere = np.any(table, axis=0)[sketch.place]
    leaks = {}
    for domain, name in enumerate(names):
        own = sketch.domain == domain
        document, place = sketch.document[own], sketch.place[own]
        numbers = np.unique(document, return_inverse=True)[1]
        share = np.bincount(numbers, anywhere[own]) / np.maximum(1, np.bincount(numbers))
        shares = table[:, place].mean(axis=1) if place.size else np.zeros(len(names))
        leaks[name] = LeakInfo(
            documents=int(np.count_nonzero(share >= DOCUMENT_SHARE)),
            ngrams={other: round(float(x), 6) for other, x in zip(names, shares, strict=True)},
        )
    return leaks


def _ngrams(
    tokens: np.ndarray, offsets: np.ndarray, threshold: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Hashes of the n-grams within documents, without end tokens, and the document of each."""
    longest = min(_BLOCK, tokens.size)
    up = _powers(_BASE, longest)
    down = _powers(pow(_BASE, -1, 2**64), longest + NGRAM)
    for start in range(0, tokens.size, _BLOCK):
        block = np.asarray(tokens[start : start + _BLOCK + NGRAM - 1]).astype(np.uint64)
        count = min(_BLOCK, block.size - NGRAM + 1)
        if count < 1:
            return
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(block * down[: block.size])])
        hashes = (sums[NGRAM : NGRAM + count] - sums[:count]) * up[:count]
        hashes ^= hashes >> np.uint64(32)
        hashes *= _MIX
        hashes ^= hashes >> np.uint64(32)
        # An n-gram lies within a document if no document ends before its last token.
        place = np.arange(start, start + count, dtype=np.int64)
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, start + count, side="left"))
        edges = np.asarray(offsets[first : last + 1])
        document = np.searchsorted(edges, place, side="right") - 1
        keep = (place + NGRAM < edges[document + 1]) & (hashes <= np.uint64(threshold))
        yield hashes[keep], document[keep] + first


def _powers(base: int, count: int) -> np.ndarray:
    """1, base, base**2, ... modulo 2**64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
