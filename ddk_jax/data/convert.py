"""Documents to tokens: the part of `ddk prepare` that runs in parallel.

`entries` is a pure function: what it makes of a document depends on the document, the tokenizer
and nothing else, least of all on what is read before it. Each entry carries the key that it is
sorted by and the hash that decides its split. So a corpus is the same whoever converts which part
of it, and a distributed engine may do it as well.

On one machine a corpus is cut into tasks. A task writes its entries as runs: files that are sorted
by key and small enough to be sorted in memory. Its folder appears when it is whole.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddk_jax.config import SharedSourceConfig, SourceConfig
from ddk_jax.data.shards import token_dtype
from ddk_jax.data.sources import (
    Document,
    Piece,
    Reject,
    documents_of,
    pieces_of,
    read_piece,
)
from ddk_jax.data.sources.fields import domain_of, passes
from ddk_jax.data.tokenize import Tokenizer, encode_documents

INDEX = np.dtype(
    [
        ("key", "<u8"),
        ("hash", "<u8"),
        ("domain", "<u4"),
        ("feed", "<u4"),
        ("tokens", "<u4"),
        ("turns", "<u4"),
        ("bytes", "<u4"),
        ("token_start", "<u8"),
        ("turn_start", "<u8"),
    ]
)
"""One entry of a run, in the order of key and hash; where its tokens and turns begin in the run."""
DONE = "done.json"

_BATCH_BYTES = 2**21
_TASK_BYTES = 2**25
_TASK_PIECES = 2**12


@dataclass(frozen=True, kw_only=True)
class Feed:
    """A source that is read once.

    Attributes:
        source: what is read.
        domain: number of the domain that its documents belong to; -1 if `shared` decides.
        shared: how rows are divided among domains.
        domains: number of each domain by name, for `shared`.
    """

    source: SourceConfig
    domain: int
    shared: SharedSourceConfig | None
    domains: dict[str, int]


class Task(NamedTuple):
    """Pieces of one feed that are converted together, and the feed's number."""

    feed: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What every worker knows.

    Attributes:
        folder: where tasks leave their runs, each in a folder of its number.
        tokenizer: file of the tokenizer.
        tokenizer_digest: its digest.
        feeds: all sources.
        run_bytes: text after which a run is written.
    """

    folder: Path
    tokenizer: Path
    tokenizer_digest: str
    feeds: tuple[Feed, ...]
    run_bytes: int = 2**25


class Entry(NamedTuple):
    """A document in tokens, with what decides its place.

    Attributes:
        key: place in the stream of its domain.
        hash: decides the split. With the key it is the document's identity.
        domain: number of its domain.
        ids: tokens, end token included.
        turns: as `Encoded.turns`.
        num_bytes: of its text.
    """

    key: int
    hash: int
    domain: int
    ids: np.ndarray
    turns: tuple[int, ...]
    num_bytes: int


class Placed(NamedTuple):
    """A document and the number of its domain."""

    document: Document
    domain: int


class Finding(NamedTuple):
    """A row that is rejected, and the number of its domain; -1 if that is not known."""

    reject: Reject
    domain: int


def entries(tokenizer: Tokenizer, placed: Sequence[Placed]) -> Iterator[Entry | Finding]:
    """Documents in tokens. Pure: an entry depends on its document and the tokenizer alone."""
    encoded = encode_documents(tokenizer, [document for document, _ in placed])
    for (document, domain), tokens in zip(placed, encoded, strict=True):
        if isinstance(tokens, str):
            yield Finding(Reject(document.file, document.line, tokens), domain)
            continue
        digest = document.digest
        yield Entry(
            key=int.from_bytes(digest[8:16], "big"),
            # All pieces of a document are on one side.
            hash=int.from_bytes((document.whole or digest)[:8], "big"),
            domain=domain,
            ids=tokens.ids,
            turns=tokens.turns,
            num_bytes=document.num_bytes,
        )


def tasks_of(feeds: Sequence[Feed]) -> Iterator[Task]:
    """The work, in reading order: large pieces alone, small ones together.

    Raises:
        DataError, StorageError: a source is not there, or cannot be read at all.
    """
    for number, feed in enumerate(feeds):
        held: list[Piece] = []
        for piece in pieces_of(feed.source):
            held.append(piece)
            if sum(p.size for p in held) >= _TASK_BYTES or len(held) >= _TASK_PIECES:
                yield Task(number, tuple(held))
                held = []
        if held:
            yield Task(number, tuple(held))


def is_done(workshop: Workshop, number: int) -> bool:
    """Whether a task was finished, maybe by a process that was killed since."""
    return (workshop.folder / str(number) / DONE).is_file()


def convert(workshop: Workshop, number: int, task: Task) -> None:
    """Write the runs of a task.

    Raises:
        StorageError, OSError: something cannot be read or written.
    """
    target = workshop.folder / str(number)
    folder = workshop.folder / f"{number}.{os.getpid()}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reader = _Reader(workshop.feeds[task.feed])
    tokenizer = _tokenizer(workshop.tokenizer, workshop.tokenizer_digest)
    runs = _Runs(folder, task.feed, token_dtype(tokenizer.vocab_size), workshop.run_bytes)
    findings: list[tuple[int, Finding]] = []
    for place, piece in enumerate(task.pieces):
        for batch in _batches(reader, piece, findings, place):
            for item in entries(tokenizer, batch):
                if isinstance(item, Entry):
                    runs.add(item)
                else:
                    findings.append((place, item))
    runs.write()
    # A document that has no tokens is found after others further down: back into reading order.
    findings.sort(key=lambda found: (found[0], found[1].reject.line))
    summary = {
        "runs": runs.written,
        "rejects": [[*finding.reject, finding.domain] for _, finding in findings],
        "filtered": _pairs(reader.filtered),
        "cut": _pairs(reader.cut),
        "read": _pairs(reader.read),
    }
    (folder / DONE).write_text(json.dumps(summary), encoding="utf-8")
    try:
        folder.rename(target)
    except OSError:
        if not (target / DONE).is_file():
            raise
        shutil.rmtree(folder)  # a process that outlived its parent was faster, with the same bytes


def read_summary(workshop: Workshop, number: int) -> dict[str, Any]:
    """What `convert` says of a finished task."""
    return json.loads((workshop.folder / str(number) / DONE).read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1)
def _tokenizer(file: Path, digest: str) -> Tokenizer:
    """The tokenizer of a file, loaded once for each content that the file has had."""
    tokenizer = Tokenizer(file)
    assert tokenizer.digest == digest, f"{file} is not the tokenizer that the work began with"
    return tokenizer


def _pairs(counts: Counter[int]) -> list[list[int]]:
    return [[domain, counts[domain]] for domain in sorted(counts)]


def _batches(
    reader: _Reader, piece: Piece, findings: list[tuple[int, Finding]], place: int
) -> Iterator[list[Placed]]:
    """Documents, enough for one call of the tokenizer at a time."""
    batch: list[Placed] = []
    size = 0
    for item in reader.documents(piece):
        if isinstance(item, Finding):
            findings.append((place, item))
            continue
        batch.append(item)
        size += len(item.document.text) + len(item.document.response) + 1
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Reader:
    """Reads the documents of a feed and counts what it does not read.

    Attributes:
        read: rows by domain, whatever became of them; -1: of no domain.
        filtered: rows that did not pass the filters, by domain.
        cut: pieces that very long documents were cut into, by domain.
    """

    def __init__(self, feed: Feed) -> None:
        self.read: Counter[int] = Counter()
        self.filtered: Counter[int] = Counter()
        self.cut: Counter[int] = Counter()
        self._feed = feed

    def documents(self, piece: Piece) -> Iterator[Placed | Finding]:
        """The documents of a piece."""
        source, shared = self._feed.source, self._feed.shared
        for row in read_piece(piece, source, shared.field if shared else ""):
            domain, found = self._feed.domain, iter(())
            try:
                if isinstance(row, Reject):
                    found = iter((row,))
                elif shared and not (name := domain_of(shared, row.columns, piece.name)):
                    self.filtered[-1] += 1
                else:
                    domain = self._feed.domains[name] if shared else domain
                    if passes(source.filters, row.columns, piece.name):
                        found = documents_of(row, piece.name, source)
                    else:
                        self.filtered[domain] += 1
            except ValueError as error:
                found = iter((Reject(piece.name, row.line, str(error)),))
            self.read[domain] += 1
            yield from self._placed(found, domain)

    def _placed(
        self, documents: Iterable[Document | Reject], domain: int
    ) -> Iterator[Placed | Finding]:
        for item in documents:
            if isinstance(item, Reject):
                yield Finding(item, domain)
                continue
            self.cut[domain] += bool(item.whole)
            yield Placed(item, domain)


class _Runs:
    """Collects entries and writes them sorted.

    Attributes:
        written: runs so far.
    """

    def __init__(self, folder: Path, feed: int, dtype: np.dtype[Any], run_bytes: int) -> None:
        self.written = 0
        self._folder = folder
        self._feed = feed
        self._dtype = dtype
        self._run_bytes = run_bytes
        self._held: list[Entry] = []
        self._bytes = 0

    def add(self, entry: Entry) -> None:
        """Take an entry."""
        self._held.append(entry._replace(ids=entry.ids.astype(self._dtype)))
        self._bytes += entry.num_bytes
        if self._bytes >= self._run_bytes:
            self.write()

    def write(self) -> None:
        """Write what is held as a run."""
        if not self._held:
            return
        self._held.sort(key=lambda entry: (entry.key, entry.hash))
        index = np.zeros(len(self._held), INDEX)
        for i, entry in enumerate(self._held):
            sizes = (entry.ids.size, len(entry.turns), entry.num_bytes)
            index[i] = (entry.key, entry.hash, entry.domain, self._feed, *sizes, 0, 0)
        for part in ("token", "turn"):
            index[f"{part}_start"][1:] = np.cumsum(index[f"{part}s"][:-1], dtype=np.uint64)
        turns = [turn for entry in self._held for turn in entry.turns]
        arrays = {
            "index": index,
            "tokens": np.concatenate([entry.ids for entry in self._held]),
            "turns": np.asarray(turns, np.uint32),
        }
        for part, array in arrays.items():
            np.save(self._folder / f"{self.written}.{part}.npy", array, allow_pickle=False)
        self.written += 1
        self._held, self._bytes = [], 0
