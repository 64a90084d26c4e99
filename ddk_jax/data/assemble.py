"""One corpus in the making: what is done in which order, and what is said about it in the manifest.

convert     every piece of every source to sorted runs            in parallel, kept when finished
plan        duplicates, limits and splits, from the runs' index   quick, done again
shards      every shard from the runs that hold its documents     in parallel, kept when finished
leaks       the n-grams of validation text in training text       in parallel
"""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddk_jax.config import DataConfig
from ddk_jax.data import leaks, merge
from ddk_jax.data.convert import Feed, Task, Workshop, convert, is_done, read_summary, tasks_of
from ddk_jax.data.shards import (
    REJECTS,
    SPLITS,
    TOKENIZER,
    DomainInfo,
    LeakInfo,
    LeftOut,
    Manifest,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    TokenizerInfo,
    file_name,
    open_shards,
    token_dtype,
)
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.data.workers import Pool, Progress, metered
from ddk_jax.errors import DataError
from ddk_jax.places import resolve_path

SHARD_TOKENS = 2**28
"""Tokens of a shard, at most about."""


class Input(NamedTuple):
    """A feed with the digest of its content."""

    feed: Feed
    sha256: str


@dataclass(kw_only=True)
class Counts:
    """Rows by domain: those that were read, and what became of some; -1: of no domain."""

    read: Counter[int] = field(default_factory=Counter)
    rejected: Counter[int] = field(default_factory=Counter)
    filtered: Counter[int] = field(default_factory=Counter)
    cut: Counter[int] = field(default_factory=Counter)
    not_routed: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Makes the content of a folder of prepared data.

    Attributes:
        config: the corpus and the options.
        tokenizer: makes the tokens.
        inputs: all sources.
        digest: of everything that decides the content.
        folder: for work in progress; the result is in its folder `out`.
        pool: does the work.
        progress: takes lines for the user.
    """

    config: DataConfig
    tokenizer: Tokenizer
    inputs: tuple[Input, ...]
    digest: str
    folder: Path
    pool: Pool
    progress: Progress

    def manifest(self) -> Manifest:
        """Write everything but the manifest, which is returned.

        Raises:
            DataError: too much of a domain was rejected, or it has fewer than two documents.
            StorageError, OSError: something cannot be read or written.
        """
        self._copy_tokenizer()
        workshop = Workshop(
            folder=self.folder / "runs",
            tokenizer=self._out / TOKENIZER / "tokenizer.json",
            tokenizer_digest=self.tokenizer.digest,
            feeds=tuple(one.feed for one in self.inputs),
        )
        workshop.folder.mkdir(exist_ok=True)
        tasks = list(tasks_of(workshop.feeds))
        self._convert(workshop, tasks)
        counts = self._collect(workshop, tasks)
        runs = merge.runs_of(workshop, len(tasks))
        plan = merge.make_plan(
            self.folder / "plan",
            runs,
            self.config.domains,
            len(self.inputs),
            self.config.validation_fraction,
        )
        splits = self._write_shards(plan, runs)
        manifest = Manifest(
            inputs_digest=self.digest,
            tokenizer=TokenizerInfo(
                digest=self.tokenizer.digest,
                vocab_size=self.tokenizer.vocab_size,
                end_id=self.tokenizer.end_id,
            ),
            validation_fraction=self.config.validation_fraction,
            domains=tuple(
                self._domain_info(number, plan, counts, splits[number])
                for number in range(len(self.config.domains))
            ),
            not_routed=dict(counts.not_routed),
        )
        return replace(manifest, leaks=self._leaks(manifest))

    @property
    def _out(self) -> Path:
        return self.folder / "out"

    def _copy_tokenizer(self) -> None:
        if not (self._out / TOKENIZER).is_dir():
            partial = self.folder / TOKENIZER
            shutil.rmtree(partial, ignore_errors=True)
            self.tokenizer.copy_to(partial)
            partial.rename(self._out / TOKENIZER)

    def _convert(self, workshop: Workshop, tasks: Sequence[Task]) -> None:
        left = [(n, task) for n, task in enumerate(tasks) if not is_done(workshop, n)]
        if len(left) < len(tasks):
            self.progress(f"going on: {len(tasks) - len(left)} of {len(tasks)} parts were finished")
        work = functools.partial(_convert_one, workshop)
        total = sum(task.size for _, task in left)
        with metered("tokenising", total, "B", self.progress) as meter:
            for _ in self.pool.run(work, left, lambda item: meter.add(item[1].size)):
                pass

    def _collect(self, workshop: Workshop, tasks: Sequence[Task]) -> Counts:
        """Add up what the tasks counted, and write the list of what was rejected.

        Raises:
            DataError: too much of a domain was.
        """
        counts = Counts()
        names = {number: domain.name for number, domain in enumerate(self.config.domains)}
        with (self._out / REJECTS).open("w", encoding="utf-8") as stream:
            for number, task in enumerate(tasks):
                summary = read_summary(workshop, number)
                for name in ("read", "filtered", "cut"):
                    getattr(counts, name).update(dict(map(tuple, summary[name])))
                path = workshop.feeds[task.feed].source.path
                if lost := dict(map(tuple, summary["filtered"])).get(-1, 0):
                    counts.not_routed[path] += lost
                for file, line, reason, domain in summary["rejects"]:
                    counts.rejected[domain] += 1
                    row = {"file": file, "line": line, "reason": reason}
                    row["domain"] = names.get(domain, "")
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        for domain in sorted(counts.rejected):
            self._check_rejected(counts, domain, names.get(domain, ""))
        return counts

    def _check_rejected(self, counts: Counts, domain: int, name: str) -> None:
        rejected, total = counts.rejected[domain], counts.read[domain]
        limit = self.config.max_rejected_fraction
        if rejected <= limit * total:
            return
        listing = Path(f"{resolve_path(self.config.dir)}.{REJECTS}")
        shutil.copyfile(self._out / REJECTS, listing)
        where = f"domain {name}" if name else "shared sources"
        raise DataError(
            f"{where}: {rejected} of {total} documents were rejected ({rejected / total:.1%}; "
            f"data.max_rejected_fraction is {limit:.1%}); see {listing}"
        )

    def _write_shards(
        self, plan: merge.Plan, runs: Sequence[merge.Run]
    ) -> list[dict[str, SplitInfo]]:
        """Write all shards. Returns the splits of every domain."""
        names = [domain.name for domain in self.config.domains]
        tasks = list(merge.shard_tasks(plan, names, SHARD_TOKENS))
        dtype = token_dtype(self.tokenizer.vocab_size).str
        work = functools.partial(merge.write_shard, plan, runs, self._out, dtype)
        with metered("writing shards", len(tasks), "", self.progress) as meter:
            for _ in self.pool.run(work, tasks, lambda _: meter.add(1)):
                pass
        found: list[dict[str, list[ShardInfo]]] = [{split: [] for split in SPLITS} for _ in names]
        for task in tasks:
            found[task.domain][task.split].append(merge.take_facts(self._out, task))
        merge.remove_facts(self._out, tasks)
        return [
            {split: SplitInfo(shards=tuple(shards)) for split, shards in each.items()}
            for each in found
        ]

    def _domain_info(
        self, number: int, plan: merge.Plan, counts: Counts, splits: dict[str, SplitInfo]
    ) -> DomainInfo:
        domain = self.config.domains[number]
        sources = tuple(
            SourceInfo(
                path=one.feed.source.path,
                licence=one.feed.source.licence,
                documents=int(plan.from_feed[number, feed]),
                sha256=one.sha256,
            )
            for feed, one in enumerate(self.inputs)
            if one.feed.domain == number
            or (one.feed.shared and domain.name in one.feed.shared.domains.values())
        )
        left_out = LeftOut(
            rejected=counts.rejected[number],
            duplicates=int(plan.duplicates[number]),
            filtered=counts.filtered[number],
            over_limit=int(plan.over_limit[number]),
            cut=counts.cut[number],
        )
        info = DomainInfo(
            name=domain.name,
            train=splits["train"],
            validation=splits["validation"],
            sources=sources,
            left_out=left_out,
        )
        self.progress(
            f"{domain.name}: {info.train.documents + info.validation.documents:,} documents, "
            f"{info.train.tokens + info.validation.tokens:,} tokens, "
            f"{info.validation.documents:,} documents held out, "
            f"{left_out.rejected:,} rejected, {left_out.duplicates:,} duplicates"
        )
        return info

    def _leaks(self, manifest: Manifest) -> dict[str, LeakInfo]:
        """Look for validation text in training text."""
        names = manifest.names
        opened = [open_shards(self._out, manifest, name, "validation") for name in names]
        sketch = leaks.make_sketch(opened)
        hashes = self.folder / "hashes.npy"
        np.save(hashes, sketch.hashes, allow_pickle=False)
        tasks = []
        for number, info in enumerate(manifest.domains):
            count = len(info.train.shards)
            for shard in range(count):
                tokens, offsets = (
                    self._out / info.name / file_name("train", shard, count, part)
                    for part in ("tokens", "offsets")
                )
                tasks.append(leaks.ScanTask(hashes, sketch.threshold, number, tokens, offsets))
        seen: dict[int, list[Any]] = {number: [] for number in range(len(names))}
        with metered("comparing the splits", len(tasks), "", self.progress) as meter:
            for number, places in self.pool.run(leaks.scan, tasks, lambda _: meter.add(1)):
                seen[tasks[number].domain].append(places)
        return leaks.judge(sketch, names, seen)


def _convert_one(workshop: Workshop, item: tuple[int, Task]) -> None:
    convert(workshop, *item)
