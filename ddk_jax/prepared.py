"""What prepared data holds, as text for a person: counts, lengths, overlap, samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddk_jax.analysis.tables import aligned_table
from ddk_jax.data.shards import (
    SPLITS,
    TOKENIZER,
    DomainInfo,
    Manifest,
    Shard,
    open_shards,
    read_manifest,
)
from ddk_jax.data.tokenize import Tokenizer

_BOUNDS = (64, 256, 1024, 4096, 16384)
_SAMPLE_TOKENS = 40
_SAMPLE_CHARS = 90
_LEAK = 0.01


def describe_data(directory: Path) -> str:
    """Say what is in a directory of prepared data.

    Raises:
        DataError: it is damaged, or not what its manifest says.
    """
    manifest = read_manifest(directory)
    tokenizer, read = manifest.tokenizer, Tokenizer(directory / TOKENIZER)
    opened = {
        name: {split: open_shards(directory, manifest, name, split) for split in SPLITS}
        for name in manifest.names
    }
    train = {name: splits["train"] for name, splits in opened.items()}
    facts = {
        "prepared data": str(directory),
        "tokenizer": f"{tokenizer.vocab_size:,} tokens, end token {tokenizer.end_id}, digest "
        f"{tokenizer.digest[:16]}",
        "held out": f"{manifest.validation_fraction:.1%} of the documents, by hash of their text",
    }
    width = max(map(len, facts))
    parts = [
        "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items()),
        _counts(manifest),
        "tokens of a document (share of the training documents)\n" + _lengths(train),
        _left_out(manifest),
        _leaks(manifest),
        "\n".join(f"{name}: {_sample(shards, read)}" for name, shards in train.items() if shards),
        "\n".join(_sources(domain) for domain in manifest.domains),
    ]
    return "\n\n".join(part for part in parts if part)


def _counts(manifest: Manifest) -> str:
    header = ("domain", "documents", "tokens", "held out", "tokens", "bytes", "bytes/token")
    rows = []
    for domain in manifest.domains:
        train, held = domain.train, domain.validation
        tokens, size = train.tokens + held.tokens, train.bytes + held.bytes
        rows.append([train.documents, train.tokens, held.documents, held.tokens, size, tokens])
    rows.append([sum(column) for column in zip(*rows, strict=True)])
    cells = [
        (name, *(f"{value:,}" for value in row[:5]), f"{row[4] / max(1, row[5]):.2f}")
        for name, row in zip([*manifest.names, "total"], rows, strict=True)
    ]
    return aligned_table(header, cells)


def _lengths(train: dict[str, list[Shard]]) -> str:
    """A histogram of each domain, and the median and the longest document."""
    header = ("domain", *(f"<{bound:,}" for bound in _BOUNDS), "longer", "median", "longest")
    cells = []
    for name, shards in train.items():
        sizes = np.concatenate([np.diff(shard.offsets) for shard in shards])
        counts = np.bincount(
            np.searchsorted(_BOUNDS, sizes, side="right"), minlength=len(_BOUNDS) + 1
        )
        shares = (f"{share:.0%}" for share in counts / sizes.size)
        cells.append((name, *shares, f"{np.median(sizes):,.0f}", f"{sizes.max():,}"))
    return aligned_table(header, cells)


def _left_out(manifest: Manifest) -> str:
    """What is not there; empty if that is nothing."""
    header = ("domain", "rejected", "duplicates", "filtered", "over limit", "cut")
    cells = []
    for domain in manifest.domains:
        out = domain.left_out
        values = (out.rejected, out.duplicates, out.filtered, out.over_limit, out.cut)
        if any(values):
            cells.append((domain.name, *(f"{value:,}" for value in values)))
    lines = [aligned_table(header, cells)] if cells else []
    lines += [f"{path}: {rows:,} rows of no domain" for path, rows in manifest.not_routed.items()]
    return "\n".join(lines)


def _leaks(manifest: Manifest) -> str:
    """Validation text in training text; a sentence if there is none worth a line."""
    lines = []
    for name, leak in manifest.leaks.items():
        shares = [
            f"{share:.1%} in {other}" for other, share in leak.ngrams.items() if share >= _LEAK
        ]
        if leak.documents or shares:
            found = f"{leak.documents:,} near-duplicates of training documents"
            lines.append(f"{name}: {'; '.join([found, *shares])}")
    if not lines:
        return "validation text in training: no near-duplicates, under 1% of the 13-grams"
    return "validation text in training (near-duplicates, shares of 13-grams)\n" + "\n".join(lines)


def _sample(shards: Sequence[Shard], tokenizer: Tokenizer) -> str:
    """The beginning of the first document."""
    [first, *_] = (shard for shard in shards if shard.offsets.size > 1)
    ids = first.tokens[: min(_SAMPLE_TOKENS, int(first.offsets[1]))].tolist()
    return " ".join(tokenizer.decode(ids).split())[:_SAMPLE_CHARS]


def _sources(domain: DomainInfo) -> str:
    return "\n".join(
        f"{domain.name}: {source.path} ({source.licence or 'licence not stated'})"
        for source in domain.sources
    )
