"""Tokens a second that the data pipeline makes ready, and what packing costs.

    python benchmarks/pipeline.py                         # eight domains of synthetic tokens
    python benchmarks/pipeline.py --data data/quickstart  # of prepared data

Batches are taken as fast as they come: nothing is trained. The files are read once before, so that
they are in the page cache. Memory that grows with the number of tokens would show in the last
column: it is this process's own, without the pages that are mapped from files.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from ddk_jax.data.packing import best_fit, report
from ddk_jax.data.pipeline import MixturePipeline
from ddk_jax.data.rows import DomainRows, predicted_tokens
from ddk_jax.data.shards import Shard, open_shards, read_manifest

DOMAINS = 8
MEAN_TOKENS = 900
"""Of a synthetic document."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the pipeline on this machine."""

    data: Path | None = None
    """Directory of prepared data. Default: synthetic tokens."""
    tokens: int = 64_000_000
    """Synthetic tokens, over all domains."""
    seq_len: int = 4096
    """Tokens that a row predicts."""
    rows: int = 64
    """Rows of a batch."""
    batches: int = 40
    """Batches that are timed, after as many that are not."""
    prefetch: int = 2
    """Batches built ahead."""
    json: Path | None = None
    """Write the measurements to this file as well."""


def synthetic(folder: Path, tokens: int) -> list[list[Shard]]:
    """Memory-mapped shards, two of each domain."""
    random = np.random.default_rng(0)
    found = []
    for domain in range(DOMAINS):
        shards = []
        for number in range(2):
            size = tokens // DOMAINS // 2
            lengths = 2 + random.exponential(MEAN_TOKENS, 2 * size // MEAN_TOKENS).astype(np.int64)
            ends = np.cumsum(lengths)
            ends = ends[ends < size - 2]
            arrays = {
                "tokens": random.integers(0, 2**16, size, dtype=np.uint16),
                "offsets": np.concatenate([[0], ends, [size]]).astype(np.int64),
                "turns": np.zeros(0, np.int64),
            }
            paths = {name: folder / f"{domain}-{number}-{name}.npy" for name in arrays}
            for name, array in arrays.items():
                np.save(paths[name], array, allow_pickle=False)
            shards.append(Shard(*(np.load(path, mmap_mode="r") for path in paths.values())))
        found.append(shards)
    return found


def prepared(directory: Path) -> list[list[Shard]]:
    """The training shards of every domain."""
    manifest = read_manifest(directory)
    return [open_shards(directory, manifest, name, "train") for name in manifest.names]


def own_memory() -> int:
    """Bytes of this process that are no mapped file; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = dict(line.split(":", 1) for line in status.read_text("ascii").splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def measure(shards: list[list[Shard]], packing: str, options: Options) -> dict[str, float]:
    """Make rows of the shards, and take batches of them."""
    rows, made, padding, cut = [], 0.0, [], []
    for number, each in enumerate(shards):
        started = time.perf_counter()
        packed = best_fit(each, options.seq_len) if packing == "best_fit" else None
        made += time.perf_counter() - started
        used = report(each, options.seq_len, packed)
        padding.append(used.padding)
        cut.append(used.cut)
        rows.append(
            DomainRows(
                each, name=f"d{number}", domain=number, length=options.seq_len, packing=packed
            )
        )
    weights = np.full(len(rows), 1 / len(rows))
    pipeline = MixturePipeline(
        rows, weights, rows_per_step=options.rows, seed=0, prefetch=options.prefetch
    )
    for _ in range(options.batches):
        next(pipeline)
    before, started, tokens = own_memory(), time.perf_counter(), 0
    for _ in range(options.batches):
        batch, _ = next(pipeline)
        tokens += int(predicted_tokens(batch, len(rows)).sum())
    seconds = time.perf_counter() - started
    grown = own_memory() - before
    pipeline.close()
    return {
        "tokens_per_second": tokens / seconds,
        "packing_seconds": made,
        "padding": float(np.mean(padding)),
        "cut": float(np.mean(cut)),
        "grown_bytes": grown,
    }


def main(options: Options) -> None:
    """Measure both ways of packing."""
    with tempfile.TemporaryDirectory() as folder:
        shards = prepared(options.data) if options.data else synthetic(Path(folder), options.tokens)
        for each in shards:
            for shard in each:
                shard.tokens.sum()  # into the page cache
        found = {way: measure(shards, way, options) for way in ("sequential", "best_fit")}
    print("packing     M tokens/s  padding  documents cut  packing made in  memory grown by")
    for way, one in found.items():
        print(
            f"{way:10s}  {one['tokens_per_second'] / 1e6:10.2f}  {one['padding']:7.2%}"
            f"  {one['cut']:13.2%}  {one['packing_seconds']:13.2f} s"
            f"  {one['grown_bytes'] / 2**20:11.1f} MiB"
        )
    if options.json:
        options.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
