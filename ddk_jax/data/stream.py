"""The documents of a domain and split as one stream of tokens, over any number of shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from ddk_jax.data.shards import Shard

PADDING, PROMPT, RESPONSE = 0, 1, 2
"""Roles of a token; plain text is PROMPT throughout."""


class _Part(NamedTuple):
    """A part of the stream that is in one shard: its first and last place there and in the cut."""

    shard: Shard
    start: int
    stop: int
    at: int


class TokenStream:
    """Random access to tokens by place, O(log documents) each time.

    Attributes:
        num_tokens: tokens of all shards.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        # Plain views: slicing a memmap itself costs several times as much.
        self._shards = [Shard(*(np.asarray(array) for array in shard)) for shard in shards]
        sizes = [int(shard.offsets[-1]) for shard in self._shards]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.num_tokens = int(self._starts[-1])

    def copy(
        self,
        start: int,
        stop: int,
        tokens: Int32[np.ndarray, " size"],
        segment_ids: Int32[np.ndarray, " size"],
        role: Int32[np.ndarray, " size"],
    ) -> None:
        """Write the tokens from `start` to `stop` with their roles; segments count from 1."""
        segment_ids[:] = 0
        for shard, first, last, at in self._parts(start, stop):
            here = slice(at, at + last - first)
            tokens[here] = shard.tokens[first:last]
            documents = np.searchsorted(shard.offsets[:-1], [first, last])
            segment_ids[shard.offsets[documents[0] : documents[1]] - first + at] = 1
            role[here] = PROMPT
            if shard.turns.size:
                turns = np.searchsorted(shard.turns, [first, last], side="right")
                changes = shard.turns[turns[0] : turns[1]] - first
                counts = np.bincount(changes[changes < last - first], minlength=last - first)
                role[here] += ((np.cumsum(counts) + turns[0]) % 2).astype(np.int32)
        segment_ids[:1] = 1
        np.cumsum(segment_ids, out=segment_ids)

    def _parts(self, start: int, stop: int) -> Iterator[_Part]:
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        at = 0
        while start + at < stop:
            first = start + at - int(self._starts[number])
            last = min(stop - int(self._starts[number]), int(self._shards[number].offsets[-1]))
            if last > first:
                yield _Part(self._shards[number], first, last, at)
                at += last - first
            number += 1
