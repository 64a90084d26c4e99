"""`ddk prepare`: documents to token shards, once, before any training.

The result is a pure function of the files that are read, the tokenizer and the options: the same
bytes on every machine. It appears whole under `data.dir` or not at all; the same inputs are not
prepared twice.

- Exact duplicates are dropped within and across domains: the first one in reading order stays.
- A document is held out for validation if the hash of its text falls under `validation_fraction`:
  adding documents moves none from one side to the other. A domain in which the hash selects none
  gives the one with the smallest hash (and the one with the largest stays in training if it selects
  all), so two documents are enough for a domain, and one is not.
- Rows that cannot be used are listed in `rejects.jsonl`, with file, line and reason.

Memory: about 150 bytes per document, and one batch of documents.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from ddk_jax.config import DataConfig, DomainConfig, SourceConfig, resolve_path
from ddk_jax.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    REJECTS,
    SPLITS,
    TOKENIZER,
    DomainInfo,
    Manifest,
    SourceInfo,
    Split,
    SplitWriter,
    TokenisedDocument,
    TokenizerInfo,
    checked_name,
    is_prepared,
    read_manifest,
    token_dtype,
)
from ddk_jax.data.sources import (
    Document,
    Reject,
    SourceFile,
    file_sha256,
    read_file,
    source_files,
)
from ddk_jax.data.tokenize import Tokenizer, encode_documents
from ddk_jax.errors import DataError, StorageError, UserError

Progress = Callable[[str], None]
"""Takes one line of text for the user."""

_BATCH_BYTES = 2**21
_PROGRESS_DOCUMENTS = 20_000


class _Source(NamedTuple):
    config: SourceConfig
    files: list[SourceFile]
    sha256: str


def prepare(config: DataConfig, *, progress: Progress) -> Manifest:
    """Write the token shards of every domain to `config.dir`, unless they are there already.

    Args:
        config: the corpus, the tokenizer and the options.
        progress: called with lines of text that say how far it is.

    Returns:
        The manifest of what is now in `config.dir`.

    Raises:
        UserError: the options cannot be meant. DataError: a source or the tokenizer is missing, too
        much of a domain was rejected (the list is then in `<dir>.rejects.jsonl`), or a domain has
        fewer than two documents. StorageError: something cannot be read or written, or another
        process prepares the same data.
    """
    _check_options(config)
    tokenizer = Tokenizer(resolve_path(config.tokenizer))
    progress(f"reading {sum(len(domain.sources) for domain in config.domains)} sources")
    sources = {
        domain.name: [_scan(source) for source in domain.sources] for domain in config.domains
    }
    inputs = _inputs_digest(config, tokenizer, sources)
    target = resolve_path(config.dir)
    if (manifest := _up_to_date(target, inputs)) is not None:
        progress(f"{config.dir} is up to date")
        return manifest
    try:
        with _building(target) as folder:
            manifest = _build(config, tokenizer, sources, inputs, folder, progress)
            (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            _replace(folder, target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror or error})") from error
    progress(f"wrote {config.dir}")
    return manifest


def _check_options(config: DataConfig) -> None:
    if not config.domains:
        raise UserError("data.domains: name at least one domain")
    names = [checked_name(domain.name) for domain in config.domains]
    if len({name.casefold() for name in names}) != len(names):
        raise UserError(f"data.domains: a name is used twice in {', '.join(names)}")
    if not config.tokenizer:
        raise UserError("data.tokenizer: name the folder of the teacher's tokenizer.json")
    if not 0 < config.validation_fraction < 1:
        raise UserError(
            f"data.validation_fraction: {config.validation_fraction} is not between 0 and 1"
        )
    for domain in config.domains:
        if not domain.sources:
            raise UserError(f"domain {domain.name}: name at least one source")
        for source in domain.sources:
            if bool(source.prompt) != bool(source.response):
                raise UserError(
                    f"source {source.path}: prompt and response are given together or not at all"
                )


def _scan(source: SourceConfig) -> _Source:
    """The files of a source and a digest over their names and contents."""
    files = source_files(source)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file_sha256(file.path)} {file.name}\n".encode())
    return _Source(source, files, digest.hexdigest())


def _inputs_digest(
    config: DataConfig, tokenizer: Tokenizer, sources: dict[str, list[_Source]]
) -> str:
    """SHA-256 over everything that decides what is written."""
    tree = {
        "version": FORMAT_VERSION,
        "tokenizer": tokenizer.digest,
        "validation_fraction": config.validation_fraction,
        "max_rejected_fraction": config.max_rejected_fraction,
        "domains": [
            [name, [[*_columns(one.config), one.sha256] for one in each]]
            for name, each in sources.items()
        ],
    }
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _columns(source: SourceConfig) -> list[str]:
    return [source.path, source.text, source.prompt, source.response, source.licence]


def _up_to_date(target: Path, inputs: str) -> Manifest | None:
    """The manifest in `target` if it was made from these inputs and its files are there."""
    try:
        manifest = read_manifest(target)
    except DataError:
        return None
    files = [
        target / d.name / file
        for d in manifest.domains
        for s in SPLITS
        for file in d.split(s).files
    ]
    files += [target / REJECTS, target / TOKENIZER / "tokenizer.json"]
    return manifest if manifest.inputs_digest == inputs and all(map(Path.is_file, files)) else None


@contextlib.contextmanager
def _building(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, held by this process alone and removed in the end.

    What a killed run left there is removed first. The lock goes with the process that holds it.
    """
    if target.exists() and not is_prepared(target) and (target.is_file() or any(target.iterdir())):
        raise StorageError(
            f"{target}: holds something else than prepared data; remove it or change data.dir"
        )
    folder = target.parent / f".{target.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"{target}: another process is preparing it; wait for it") from error
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(held)


def _replace(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`, putting away what was there. Everything is on the disk first."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _build(
    config: DataConfig,
    tokenizer: Tokenizer,
    sources: dict[str, list[_Source]],
    inputs: str,
    folder: Path,
    progress: Progress,
) -> Manifest:
    """Write every domain into `folder`; the manifest is left to the caller."""
    tokenizer.copy_to(folder / TOKENIZER)
    seen: set[bytes] = set()
    domains = []
    with (folder / REJECTS).open("w", encoding="utf-8") as rejects:
        for domain in config.domains:
            builder = _DomainBuilder(domain, config, tokenizer, folder / domain.name, seen, rejects)
            domains.append(builder.build(sources[domain.name], progress))
            if builder.refused:
                rejects.flush()
                listing = Path(f"{resolve_path(config.dir)}.{REJECTS}")
                shutil.copyfile(folder / REJECTS, listing)
                raise DataError(f"{builder.refused}; see {listing}")
    return Manifest(
        inputs_digest=inputs,
        tokenizer=TokenizerInfo(
            digest=tokenizer.digest, vocab_size=tokenizer.vocab_size, end_id=tokenizer.end_id
        ),
        validation_fraction=config.validation_fraction,
        domains=tuple(domains),
    )


class _DomainBuilder:
    """Reads one domain's sources and writes its two splits.

    Attributes:
        refused: why the domain cannot be used; empty if it can.
    """

    def __init__(
        self,
        domain: DomainConfig,
        config: DataConfig,
        tokenizer: Tokenizer,
        folder: Path,
        seen: set[bytes],
        rejects: IO[str],
    ) -> None:
        self.refused = ""
        self._name = domain.name
        self._config = config
        self._tokenizer = tokenizer
        self._seen = seen
        self._rejects = rejects
        self._rejected = 0
        self._duplicates = 0
        self._tokens = 0
        folder.mkdir()
        dtype = token_dtype(tokenizer.vocab_size)
        self._splits = {split: SplitWriter(folder, split, dtype) for split in SPLITS}

    def build(self, sources: list[_Source], progress: Progress) -> DomainInfo:
        """Write the shards; look at `refused` before using them.

        Raises:
            DataError: the domain has fewer than two documents.
        """
        with contextlib.ExitStack() as stack:
            for writer in self._splits.values():
                stack.callback(writer.close)
            infos = [self._read(source, progress) for source in sources]
            self.refused = self._why_refused()
            if not self.refused:
                self._balance()
            splits = {split: writer.finish() for split, writer in self._splits.items()}
        progress(
            f"{self._name}: {self._documents():,} documents, {self._tokens:,} tokens, "
            f"{splits['validation'].documents:,} documents held out, "
            f"{self._rejected:,} rejected, {self._duplicates:,} duplicates"
        )
        return DomainInfo(
            name=self._name,
            train=splits["train"],
            validation=splits["validation"],
            sources=tuple(infos),
            rejected=self._rejected,
            duplicates=self._duplicates,
        )

    def _read(self, source: _Source, progress: Progress) -> SourceInfo:
        """Add the documents of one source."""
        documents = 0
        for batch in self._batches(source.config, source.files):
            before = self._documents()
            documents += self._add(batch)
            if before // _PROGRESS_DOCUMENTS < self._documents() // _PROGRESS_DOCUMENTS:
                progress(f"{self._name}: {self._documents():,} documents, {self._tokens:,} tokens")
        return SourceInfo(
            path=source.config.path,
            licence=source.config.licence,
            documents=documents,
            sha256=source.sha256,
        )

    def _documents(self) -> int:
        return sum(len(writer.keys) for writer in self._splits.values())

    def _batches(self, source: SourceConfig, files: list[SourceFile]) -> Iterator[list[Document]]:
        """New documents, enough for one call of the tokenizer at a time."""
        batch: list[Document] = []
        size = 0
        for file in files:
            for item in read_file(file, source):
                if isinstance(item, Reject):
                    self._reject(item)
                elif (digest := item.digest[:16]) in self._seen:
                    self._duplicates += 1
                else:
                    self._seen.add(digest)
                    batch.append(item)
                    size += item.num_bytes
                if size >= _BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _reject(self, reject: Reject) -> None:
        self._rejected += 1
        row = {**reject._asdict(), "domain": self._name}
        self._rejects.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _add(self, documents: list[Document]) -> int:
        """Tokenise documents and write them to their split. Returns how many were written."""
        written = 0
        for document, (ids, prompt) in zip(
            documents, encode_documents(self._tokenizer, documents), strict=True
        ):
            reason = ""
            if ids.size < 2 or prompt < 1 or (document.response and prompt == ids.size - 1):
                reason = "the tokenizer makes no token of it"
            elif np.any(ids[:-1] == self._tokenizer.end_id):
                reason = "the tokenizer takes a part of it for the end token"
            if reason:
                self._reject(Reject(document.file, document.line, reason))
                continue
            key = int.from_bytes(document.digest[:8], "big")
            split: Split = (
                "validation" if key / 2**64 < self._config.validation_fraction else "train"
            )
            self._splits[split].add(TokenisedDocument(ids, prompt, document.num_bytes, key))
            self._tokens += ids.size
            written += 1
        return written

    def _why_refused(self) -> str:
        total = self._documents() + self._duplicates + self._rejected
        limit = self._config.max_rejected_fraction
        if self._rejected <= limit * total:
            return ""
        return (
            f"domain {self._name}: {self._rejected} of {total} documents were rejected "
            f"({self._rejected / total:.1%}; data.max_rejected_fraction is {limit:.1%})"
        )

    def _balance(self) -> None:
        """Give each split at least one document."""
        if self._documents() < 2:
            raise DataError(
                f"domain {self._name}: {self._documents()} usable documents, but training and "
                "validation need one each; cut the text into several JSONL rows or files"
            )
        train, validation = self._splits["train"], self._splits["validation"]
        if not validation.keys:
            validation.add(train.take(min(range(len(train.keys)), key=train.keys.__getitem__)))
        elif not train.keys:
            train.add(
                validation.take(max(range(len(validation.keys)), key=validation.keys.__getitem__))
            )
