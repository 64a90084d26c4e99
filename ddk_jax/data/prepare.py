"""`ddk prepare`: documents to token shards, once, before any training.

The result is a pure function of the files that are read, the tokenizer and the options: the same
bytes on every machine, with any number of processes, and however often it was killed on the way. It
appears whole under `data.dir` or not at all; the same inputs are not prepared twice.

- Documents are in the order of their hashes: shuffled, but the same whatever is read first.
- Exact duplicates are dropped within and across domains: the first domain keeps its copy.
- A document is held out for validation if the hash of its text falls under `validation_fraction`:
  adding documents moves none from one side to the other. A domain in which the hash selects none
  gives the one with the smallest hash (and the one with the largest stays in training if it selects
  all), so two documents are enough for a domain, and one is not.
- Rows that cannot be used are listed in `rejects.jsonl`, with file, line and reason.

Until it is whole, everything is in `.<name>.partial` beside `data.dir`; what is finished there is
not done again after a kill. Memory: under 400 MiB a process, whatever the size of the corpus.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddk_jax.config import DataConfig, SourceConfig
from ddk_jax.data.assemble import Assembly, Input
from ddk_jax.data.convert import Feed
from ddk_jax.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    REJECTS,
    SPLITS,
    TOKENIZER,
    Manifest,
    checked_name,
    is_prepared,
    read_manifest,
)
from ddk_jax.data.sources import (
    SourceFile,
    check_source,
    file_sha256,
    file_size,
    files_of,
    identity,
)
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.data.workers import Pool, Progress, metered
from ddk_jax.errors import DataError, StorageError, UserError
from ddk_jax.places import resolve_path
from ddk_jax.plain import to_plain

_INPUTS = "inputs"
_SMALL = 2**25  # bytes that are read sooner than processes are started


def prepare(config: DataConfig, *, progress: Progress, workers: int = 1) -> Manifest:
    """Write the token shards of every domain to `config.dir`, unless they are there already.

    Args:
        config: the corpus, the tokenizer and the options.
        progress: called with lines of text that say how far it is.
        workers: processes, which change nothing about the result. 0: one for each core, or this
            one alone for a small corpus.

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
    target = resolve_path(config.dir)
    feeds = _feeds(config)
    files = [files_of(feed.source) for feed in feeds]
    sizes = [[file_size(file.path) for file in each] for each in files]
    progress(f"reading {len(feeds)} sources")
    if not workers and sum(map(sum, sizes)) < _SMALL:
        workers = 1
    with Pool(workers) as pool:
        inputs = _identified(feeds, files, sizes, pool, progress)
        digest = _inputs_digest(config, tokenizer, inputs)
        if (manifest := _up_to_date(target, digest)) is not None:
            progress(f"{config.dir} is up to date")
            return manifest
        try:
            with _building(target, digest) as folder:
                manifest = Assembly(
                    config=config,
                    tokenizer=tokenizer,
                    inputs=tuple(inputs),
                    digest=digest,
                    folder=folder,
                    pool=pool,
                    progress=progress,
                ).manifest()
                (folder / "out" / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
                _replace(folder / "out", target)
        except OSError as error:
            raise StorageError(
                f"{target}: cannot be written ({error.strerror or error}); the same command goes "
                "on where it was"
            ) from error
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
    shared = {name for one in config.shared for name in one.domains.values()}
    if unknown := shared - set(names):
        raise UserError(f"data.shared: no domain is called {', '.join(sorted(unknown))}")
    for domain in config.domains:
        if min(domain.max_documents, domain.max_tokens, domain.max_epochs) < 0:
            raise UserError(f"domain {domain.name}: a limit is negative; 0 means none")
        if not domain.sources and domain.name not in shared:
            raise UserError(f"domain {domain.name}: name at least one source")
    for feed in _feeds(config):
        check_source(feed.source)


def _feeds(config: DataConfig) -> list[Feed]:
    """All sources: those of the domains, then the shared ones."""
    numbers = {domain.name: number for number, domain in enumerate(config.domains)}
    feeds = [
        Feed(source=source, domain=number, shared=None, domains=numbers)
        for number, domain in enumerate(config.domains)
        for source in domain.sources
    ]
    return feeds + [
        Feed(source=shared.source, domain=-1, shared=shared, domains=numbers)
        for shared in config.shared
    ]


def _identified(
    feeds: list[Feed],
    files: list[list[SourceFile]],
    sizes: list[list[int]],
    pool: Pool,
    progress: Progress,
) -> list[Input]:
    """Every feed with a digest over the names and contents of its files."""
    flat = list(zip(itertools.chain(*files), itertools.chain(*sizes), strict=True))
    digests = [""] * len(flat)
    with metered("reading", sum(size for _, size in flat), "B", progress) as meter:
        for number, digest in pool.run(_file_digest, flat, lambda item: meter.add(item[1])):
            digests[number] = digest
    rest = iter(digests)
    return [
        Input(feed, identity(feed.source, each, [next(rest) for _ in each]))
        for feed, each in zip(feeds, files, strict=True)
    ]


def _file_digest(item: tuple[SourceFile, int]) -> str:
    return file_sha256(item[0].path)


def _inputs_digest(config: DataConfig, tokenizer: Tokenizer, inputs: list[Input]) -> str:
    """SHA-256 over everything that decides what is written."""
    with_chat = any(one.feed.source.messages for one in inputs)
    tree = {
        "version": FORMAT_VERSION,
        "tokenizer": tokenizer.digest,
        "chat_template": tokenizer.template.source if with_chat else "",
        "validation_fraction": config.validation_fraction,
        "max_rejected_fraction": config.max_rejected_fraction,
        "domains": [
            {**to_plain(domain), "sources": [], "max_epochs": 0} for domain in config.domains
        ],
        "inputs": [
            [_source_plain(one.feed.source), one.feed.domain, to_plain(one.feed.shared), one.sha256]
            for one in inputs
        ],
    }
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _source_plain(source: SourceConfig) -> dict[str, Any]:
    return {**to_plain(source), "data_dir": ""}


def _up_to_date(target: Path, inputs: str) -> Manifest | None:
    """The manifest in `target` if it was made from these inputs and its files are there."""
    try:
        manifest = read_manifest(target)
    except DataError:
        return None
    files = [
        target / domain.name / file
        for domain in manifest.domains
        for split in SPLITS
        for file in domain.split(split).files
    ]
    files += [target / REJECTS, target / TOKENIZER / "tokenizer.json"]
    return manifest if manifest.inputs_digest == inputs and all(map(Path.is_file, files)) else None


@contextlib.contextmanager
def _building(target: Path, inputs: str) -> Iterator[Path]:
    """A folder beside `target`, held by this process alone, for what is made of these inputs.

    It holds what a killed run of the same inputs left there. Afterwards it is gone, unless writing
    failed or was interrupted. The lock goes with the process that holds it.
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
        mark = folder / _INPUTS
        if not mark.is_file() or mark.read_text(encoding="utf-8") != inputs:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            mark.write_text(inputs, encoding="utf-8")
        (folder / "out").mkdir(exist_ok=True)
        try:
            yield folder
        except (OSError, StorageError, KeyboardInterrupt):
            raise  # what is finished is used when the command is given again
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
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
