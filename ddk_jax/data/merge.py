"""Sorted runs to shards: the second part of `ddk prepare`.

First the index of all runs is gone through, a range of keys at a time: exact duplicates are found,
since they have one key, limits are applied, and each document gets its split. Then every shard is
written on its own, from the runs that hold its documents.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddk_jax.config import DomainConfig
from ddk_jax.data.convert import INDEX, Workshop, read_summary
from ddk_jax.data.shards import SPLITS, ShardInfo, file_name
from ddk_jax.errors import DataError

PLACE = np.dtype([*INDEX.descr, ("run", "<u4"), ("validation", "?")])
"""A document that is kept, in the order of the stream."""

_BUCKET_DOCUMENTS = 2**20
_BLOCK_TOKENS = 2**22
_OPEN_RUNS = 256


class Run(NamedTuple):
    """A run of a finished task: path of its arrays without the part and suffix."""

    stem: str

    def array(self, part: str) -> np.ndarray:
        """One of its arrays, memory-mapped."""
        return np.load(f"{self.stem}.{part}.npy", mmap_mode="r", allow_pickle=False)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which documents go where.

    Attributes:
        folder: with one file of `PLACE` for each range of keys.
        buckets: number of ranges, a power of two.
        tokens: of each domain and split: [domains, splits].
        documents: likewise.
        duplicates: by domain.
        over_limit: documents above the limit, by domain.
        from_feed: documents by domain and feed.
    """

    folder: Path
    buckets: int
    tokens: np.ndarray
    documents: np.ndarray
    duplicates: np.ndarray
    over_limit: np.ndarray
    from_feed: np.ndarray

    def bucket(self, number: int) -> np.ndarray:
        """The documents of a range of keys, in order."""
        return np.load(self.folder / f"{number}.npy", allow_pickle=False)


class ShardTask(NamedTuple):
    """One shard to write."""

    domain: int
    name: str
    split: str
    shard: int
    shards: int


def runs_of(workshop: Workshop, tasks: int) -> list[Run]:
    """The runs of all tasks, in reading order."""
    return [
        Run(str(workshop.folder / str(task) / str(run)))
        for task in range(tasks)
        for run in range(read_summary(workshop, task)["runs"])
    ]


def make_plan(
    folder: Path, runs: Sequence[Run], domains: Sequence[DomainConfig], feeds: int, fraction: float
) -> Plan:
    """Decide on every document; of equal ones, that of the first domain and feed stays.

    Args:
        folder: where the plan is written.
        runs: all runs.
        domains: with their limits.
        feeds: number of sources.
        fraction: share of the hashes that is held out for validation.

    Raises:
        DataError: a domain has fewer than two documents.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    total = sum(run.array("index").size for run in runs)
    buckets = 1 << max(0, -(-total // _BUCKET_DOCUMENTS) - 1).bit_length()
    size = len(domains)
    plan = Plan(
        folder=folder,
        buckets=buckets,
        tokens=np.zeros((size, 2), np.int64),
        documents=np.zeros((size, 2), np.int64),
        duplicates=np.zeros(size, np.int64),
        over_limit=np.zeros(size, np.int64),
        from_feed=np.zeros((size, feeds), np.int64),
    )
    for bucket in range(buckets):
        found = _gather(runs, *_key_range(bucket, buckets))
        same = (found["key"][1:] == found["key"][:-1]) & (found["hash"][1:] == found["hash"][:-1])
        twice = np.concatenate([[False], same]) if found.size else np.zeros(0, bool)
        plan.duplicates[:] += np.bincount(found["domain"][twice], minlength=size)
        kept = _within_limits(found[~twice], domains, plan)
        kept["validation"] = kept["hash"].astype(np.float64) / 2.0**64 < fraction
        np.save(folder / f"{bucket}.npy", kept, allow_pickle=False)
        for split in range(2):
            chosen = kept[kept["validation"] == bool(split)]
            plan.documents[:, split] += np.bincount(chosen["domain"], minlength=size)
            tokens = np.bincount(chosen["domain"], chosen["tokens"], minlength=size)
            plan.tokens[:, split] += tokens.astype(np.int64)
        np.add.at(plan.from_feed, (kept["domain"], kept["feed"]), 1)
    for number, domain in enumerate(domains):
        _balance(plan, number, domain.name)
    return plan


def shard_tasks(plan: Plan, names: Sequence[str], shard_tokens: int) -> Iterator[ShardTask]:
    """The shards of every domain and split: as few as hold at most about `shard_tokens` each."""
    for domain, name in enumerate(names):
        for column, split in enumerate(SPLITS):
            wanted = -(-int(plan.tokens[domain, column]) // shard_tokens)
            shards = 1 << max(0, wanted - 1).bit_length()
            yield from (ShardTask(domain, name, split, shard, shards) for shard in range(shards))


def write_shard(plan: Plan, runs: Sequence[Run], out: Path, dtype: str, task: ShardTask) -> None:
    """Write the arrays of a shard, and then `<out>/<domain>/<split>-...json` with its facts."""
    if _facts_file(out, task).is_file():
        return
    places = _places(plan, task)
    folder = out / task.name
    folder.mkdir(exist_ok=True)
    offsets = np.concatenate([[0], np.cumsum(places["tokens"], dtype=np.int64)]).astype(np.int64)
    turns = int(places["turns"].sum())
    arrays: dict[str, tuple[Iterator[np.ndarray], int, np.dtype[Any]]] = {
        "tokens": (_token_blocks(runs, places), int(offsets[-1]), np.dtype(dtype)),
        "offsets": (iter((offsets,)), offsets.size, np.dtype(np.int64)),
        "turns": (_turn_blocks(runs, places, offsets), turns, np.dtype(np.int64)),
    }
    files = {}
    for part, (blocks, size, kind) in arrays.items():
        path = folder / file_name(task.split, task.shard, task.shards, part)
        files[path.name] = _write_array(path, blocks, size, kind)
    info = ShardInfo(
        documents=places.size,
        tokens=int(offsets[-1]),
        bytes=int(places["bytes"].sum()),
        files=files,
    )
    partial = _facts_file(out, task).with_suffix(".partial")
    partial.write_text(json.dumps(asdict(info)), encoding="utf-8")
    partial.rename(_facts_file(out, task))


def take_facts(out: Path, task: ShardTask) -> ShardInfo:
    """What `write_shard` wrote of a shard."""
    return ShardInfo(**json.loads(_facts_file(out, task).read_text(encoding="utf-8")))


def remove_facts(out: Path, tasks: Sequence[ShardTask]) -> None:
    """Remove what only `write_shard` needs, when all shards are there."""
    for task in tasks:
        _facts_file(out, task).unlink()


def _facts_file(out: Path, task: ShardTask) -> Path:
    return out / task.name / file_name(task.split, task.shard, task.shards, "facts.json")


def _key_range(number: int, count: int) -> tuple[int, int]:
    """First key of a range, and that of the next one."""
    return number * 2**64 // count, (number + 1) * 2**64 // count


def _gather(runs: Sequence[Run], first: int, stop: int) -> np.ndarray:
    """The entries of all runs in a range of keys, sorted, equal ones by domain and feed."""
    parts = []
    for number, run in enumerate(runs):
        index = run.array("index")
        begin, end = _between(np.ascontiguousarray(index["key"]), first, stop)
        part = np.zeros(end - begin, PLACE)
        for name in INDEX.names or ():
            part[name] = index[name][begin:end]
        part["run"] = number
        parts.append(part)
    found = np.concatenate([np.zeros(0, PLACE), *parts])
    order = np.lexsort((found["run"], found["feed"], found["domain"], found["hash"], found["key"]))
    return found[order]


def _between(keys: np.ndarray, first: int, stop: int) -> tuple[int, int]:
    """Where the keys from `first` on and under `stop` are; `stop` may be 2**64."""
    begin = int(np.searchsorted(keys, np.uint64(first)))
    return begin, keys.size if stop == 2**64 else int(np.searchsorted(keys, np.uint64(stop)))


def _within_limits(found: np.ndarray, domains: Sequence[DomainConfig], plan: Plan) -> np.ndarray:
    """The documents under the limits of their domains, given what the plan holds already."""
    keep = np.ones(found.size, bool)
    for number, domain in enumerate(domains):
        if not domain.max_documents and not domain.max_tokens:
            continue
        of_domain = np.flatnonzero(found["domain"] == number)
        closed = bool(plan.over_limit[number])
        documents = plan.documents[number].sum() + np.arange(1, of_domain.size + 1)
        tokens = plan.tokens[number].sum() + np.cumsum(found["tokens"][of_domain], dtype=np.int64)
        good = np.full(of_domain.size, not closed)
        if domain.max_documents:
            good &= documents <= domain.max_documents
        if domain.max_tokens:
            good &= tokens <= domain.max_tokens
        keep[of_domain] = good
        plan.over_limit[number] += np.count_nonzero(~good)
    return found[keep]


def _balance(plan: Plan, domain: int, name: str) -> None:
    """Give each split of a domain at least one document."""
    train, validation = plan.documents[domain].tolist()
    if train + validation < 2:
        raise DataError(
            f"domain {name}: {train + validation} usable documents, but training and "
            "validation need one each; cut the text into several JSONL rows or files"
        )
    if train and validation:
        return
    hashes = {}
    for bucket in range(plan.buckets):
        places = plan.bucket(bucket)
        for i in np.flatnonzero(places["domain"] == domain).tolist():
            hashes[int(places["hash"][i])] = bucket, i
    bucket, i = hashes[min(hashes) if not validation else max(hashes)]
    places = plan.bucket(bucket)
    places["validation"][i] = not validation
    np.save(plan.folder / f"{bucket}.npy", places, allow_pickle=False)
    there, here = (1, 0) if not validation else (0, 1)
    for counts, amount in ((plan.documents, 1), (plan.tokens, int(places["tokens"][i]))):
        counts[domain, there] += amount
        counts[domain, here] -= amount


def _places(plan: Plan, task: ShardTask) -> np.ndarray:
    """The documents of a shard, in order."""
    first, stop = _key_range(task.shard, task.shards)
    parts = []
    for bucket in range(plan.buckets):
        low, high = _key_range(bucket, plan.buckets)
        if high <= first or low >= stop:
            continue
        places = plan.bucket(bucket)
        begin, end = _between(np.ascontiguousarray(places["key"]), first, stop)
        places = places[begin:end]
        side = places["validation"] == (task.split == "validation")
        parts.append(places[(places["domain"] == task.domain) & side])
    return np.concatenate(parts)


def _token_blocks(runs: Sequence[Run], places: np.ndarray) -> Iterator[np.ndarray]:
    yield from _blocks(runs, places, "token")


def _turn_blocks(
    runs: Sequence[Run], places: np.ndarray, offsets: np.ndarray
) -> Iterator[np.ndarray]:
    """Turns of the documents, counted from the start of the shard."""
    with_turns = places["turns"] > 0
    some = places[with_turns]
    starts = np.repeat(offsets[:-1][with_turns], some["turns"])
    at = 0
    for block in _blocks(runs, some, "turn"):
        yield block + starts[at : at + block.size]
        at += block.size


def _blocks(runs: Sequence[Run], places: np.ndarray, part: str) -> Iterator[np.ndarray]:
    """One array of every document, several documents at a time."""
    opened = functools.lru_cache(_OPEN_RUNS)(lambda run: np.asarray(runs[run].array(f"{part}s")))
    held: list[np.ndarray] = []
    size = 0
    columns = (places[name].tolist() for name in ("run", f"{part}_start", f"{part}s"))
    for run, start, length in zip(*columns, strict=True):
        held.append(opened(run)[start : start + length])
        size += length
        if size >= _BLOCK_TOKENS:
            yield np.concatenate(held)
            held, size = [], 0
    if held:
        yield np.concatenate(held)


def _write_array(path: Path, blocks: Iterator[np.ndarray], size: int, dtype: np.dtype[Any]) -> str:
    """Write a flat .npy file block by block. Returns its SHA-256."""
    kind = dtype.newbyteorder("<")
    header = {"descr": kind.str, "fortran_order": False, "shape": (size,)}
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        stream.flush()
        digest.update(path.read_bytes())
        for block in blocks:
            data = block.astype(kind, copy=False).tobytes()
            digest.update(data)
            stream.write(data)
    return digest.hexdigest()
