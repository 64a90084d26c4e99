"""Prepared data on disk: the manifest, and flat arrays of tokens per domain and split.

`ddk_jax.data.prepare` decides what is in it. A split is a stream of documents in the order of their
hashes, cut into shards of a bounded size; where it is cut changes nothing about the stream. Tokens
are memory-mapped: opening costs no memory, and processes on one machine share the pages.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ddk_jax.data.sources import file_sha256
from ddk_jax.errors import DataError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
TOKENIZER = "tokenizer"

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
PARTS = ("tokens", "offsets", "turns")
"""The arrays of a shard, each in `<domain>/<split>-<shard>-of-<shards>.<part>.npy`."""

_FORMAT = "ddk_jax token shards"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
_BLOCK_TOKENS = 2**22
_AGAIN = "run ddk prepare again"


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """What made the ids. The digest is `ddk_jax.data.tokenize.Tokenizer.digest`."""

    digest: str
    vocab_size: int
    end_id: int


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One origin of a domain's documents; `sha256` is over its files' names and contents."""

    path: str
    licence: str
    documents: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard. `tokens` counts end tokens, `bytes` is UTF-8 text without them."""

    documents: int
    tokens: int
    bytes: int
    files: Mapping[str, str]
    """SHA-256 of each file, by its name in the domain's folder."""


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split of a domain: its shards, in the order of the stream."""

    shards: tuple[ShardInfo, ...]

    @property
    def documents(self) -> int:
        """Documents of the split."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of the split, end tokens included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of text in UTF-8."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def files(self) -> Mapping[str, str]:
        """SHA-256 of every file, by its name in the domain's folder."""
        return {name: sha256 for shard in self.shards for name, sha256 in shard.files.items()}


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Rows and documents of a domain that are not in it, by reason, and what was cut."""

    rejected: int = 0
    """Rows that cannot be used; `rejects.jsonl` lists them."""
    duplicates: int = 0
    """Documents that are there already, or in a domain that comes before."""
    filtered: int = 0
    """Rows that did not pass the filters."""
    over_limit: int = 0
    """Documents above the domain's limit."""
    cut: int = 0
    """Pieces that very long documents were cut into; nothing is left out."""


@dataclass(frozen=True, kw_only=True)
class DomainInfo:
    """One domain: its splits, where it comes from, and what was left out."""

    name: str
    train: SplitInfo
    validation: SplitInfo
    sources: tuple[SourceInfo, ...]
    left_out: LeftOut

    def split(self, split: Split) -> SplitInfo:
        """The split of that name."""
        return self.train if split == "train" else self.validation


@dataclass(frozen=True, kw_only=True)
class LeakInfo:
    """Validation text of a domain that training text has too, by hashes of token n-grams."""

    documents: int
    """Validation documents of which at least half the n-grams are in training, of any domain."""
    ngrams: Mapping[str, float]
    """Share of the validation n-grams that is in the training split of each domain."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is in a directory of prepared data.

    Attributes:
        inputs_digest: SHA-256 over everything that decides the content: the files that were read,
            the tokenizer, the options. The same inputs need not be prepared again.
        domains: in the order in which weights and metrics list them.
        leaks: by domain.
        not_routed: rows of shared sources that belong to no domain, by source.
    """

    inputs_digest: str
    tokenizer: TokenizerInfo
    validation_fraction: float
    domains: tuple[DomainInfo, ...]
    leaks: Mapping[str, LeakInfo] = field(default_factory=dict)
    not_routed: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains, in order."""
        return tuple(domain.name for domain in self.domains)

    def domain(self, name: str) -> DomainInfo:
        """The domain of that name.

        Raises:
            DataError: there is none.
        """
        for domain in self.domains:
            if domain.name == name:
                return domain
        raise DataError(f"no domain {name!r}; there are {', '.join(self.names)}")

    def to_json(self) -> str:
        """The content of `manifest.json`: the same text for the same content."""
        tree = {"format": _FORMAT, "version": FORMAT_VERSION, **_plain(self)}
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


class Shard(NamedTuple):
    """Documents of one domain and split, memory-mapped and read-only.

    Attributes:
        tokens: flat ids, uint16 or uint32 [tokens]; every document ends in the end token.
        offsets: where each document starts, and the end of the last one, int64 [documents + 1].
        turns: where the role changes from prompt to response and back, int64, ascending. A document
            begins as a prompt; one that ends as a response has a turn at its end. None for text.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    turns: np.ndarray


def checked_name(name: str) -> str:
    """A domain's name, which is also its folder's.

    Raises:
        DataError: the name is not a plain file name.
    """
    if not _PLAIN_NAME.fullmatch(name) or name in (MANIFEST, REJECTS, TOKENIZER):
        raise DataError(
            f"domain name {name!r}: use letters, digits and _ . + - (at most 100, not starting "
            f"with . + -), and not {MANIFEST}, {REJECTS} or {TOKENIZER}"
        )
    return name


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that ids are stored in: uint16 if they fit."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def file_name(split: str, shard: int, shards: int, part: str) -> str:
    """Name of an array of a shard in the domain's folder."""
    return f"{split}-{shard:05d}-of-{shards:05d}.{part}.npy"


def is_prepared(directory: Path) -> bool:
    """Whether a directory holds prepared data of any version, and so may be replaced by new."""
    try:
        tree = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and tree.get("format") == _FORMAT


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory of prepared data.

    Raises:
        DataError: there is none, or it is damaged or of another program or version.
    """
    path = directory / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{directory}: no prepared data (no {MANIFEST}); run ddk prepare"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
    if not isinstance(tree, dict) or tree.pop("format", None) != _FORMAT:
        raise DataError(f"{path}: not a manifest of prepared data; choose another data.dir")
    version = tree.pop("version", None)
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {version}, this program reads {FORMAT_VERSION}; {_AGAIN}"
        )
    try:
        tree["tokenizer"] = TokenizerInfo(**tree["tokenizer"])
        tree["domains"] = tuple(_domain(entry) for entry in tree["domains"])
        tree["leaks"] = {name: LeakInfo(**leak) for name, leak in tree["leaks"].items()}
        return Manifest(**tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); {_AGAIN}") from error


def open_shards(
    directory: Path, manifest: Manifest, domain: str, split: Split, *, verify: bool = False
) -> list[Shard]:
    """The documents of one domain and split, in the order of the stream.

    Args:
        directory: where the manifest was read.
        manifest: its content.
        domain: name of the domain.
        split: `train` or `validation`.
        verify: also compare the SHA-256 of every file and the range of every id.

    Raises:
        DataError: no such domain, or a file is missing, damaged, or not what the manifest says.
    """
    infos = manifest.domain(domain).split(split).shards
    found = []
    for number, info in enumerate(infos):
        names = [file_name(split, number, len(infos), part) for part in PARTS]
        paths = [directory / domain / name for name in names]
        for path in paths if verify else ():
            if not path.is_file() or file_sha256(path) != info.files[path.name]:
                raise DataError(
                    f"{path}: does not have the content that {MANIFEST} lists; {_AGAIN}"
                )
        shard = Shard(*(_open_array(path) for path in paths))
        _check(shard, info, manifest.tokenizer, paths, verify)
        found.append(shard)
    return found


def _open_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; {_AGAIN}") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged ({error}); {_AGAIN}") from error


def _check(
    shard: Shard, info: ShardInfo, tokenizer: TokenizerInfo, paths: list[Path], every_id: bool
) -> None:
    """That the arrays fit each other and the manifest. Reads the tokens only if `every_id`."""
    tokens, offsets, turns = shard
    if tokens.dtype != token_dtype(tokenizer.vocab_size) or tokens.shape != (info.tokens,):
        raise DataError(
            f"{paths[0]}: {tokens.dtype} {tokens.shape} is not what was listed; {_AGAIN}"
        )
    documents = info.documents
    if offsets.dtype != np.int64 or offsets.shape != (documents + 1,):
        raise DataError(f"{paths[1]}: not {documents + 1} offsets; {_AGAIN}")
    if offsets[0] != 0 or offsets[-1] != info.tokens or not _rises(offsets, 1):
        raise DataError(f"{paths[1]}: does not divide the {info.tokens} tokens; {_AGAIN}")
    if turns.dtype != np.int64 or turns.ndim != 1 or turns.size % 2:
        raise DataError(f"{paths[2]}: not turns from prompt to response and back; {_AGAIN}")
    if turns.size and (turns[0] < 0 or turns[-1] > info.tokens or not _rises(turns, 0)):
        raise DataError(f"{paths[2]}: not within the {info.tokens} tokens; {_AGAIN}")
    for start in range(0, info.tokens if every_id else 0, _BLOCK_TOKENS):
        largest = int(tokens[start : start + _BLOCK_TOKENS].max())
        if largest >= tokenizer.vocab_size:
            raise DataError(
                f"{paths[0]}: id {largest} is outside the vocabulary of "
                f"{tokenizer.vocab_size}; {_AGAIN}"
            )


def _rises(array: np.ndarray, least: int) -> bool:
    """Whether each number is at least `least` above the one before, a block at a time."""
    starts = range(0, array.size, _BLOCK_TOKENS)
    blocks = (array[start : start + _BLOCK_TOKENS + 1] for start in starts)
    return all(bool(np.all(np.diff(block) >= least)) for block in blocks)


def _domain(tree: dict[str, Any]) -> DomainInfo:
    checked_name(tree["name"])
    splits: dict[Split, SplitInfo] = {}
    for split in SPLITS:
        shards = tuple(ShardInfo(**shard) for shard in tree[split]["shards"])
        for number, shard in enumerate(shards):
            names = sorted(file_name(split, number, len(shards), part) for part in PARTS)
            if sorted(shard.files) != names:
                raise KeyError(f"files of {tree['name']}/{split}")
        splits[split] = SplitInfo(shards=shards)
    return DomainInfo(
        name=tree["name"],
        train=splits["train"],
        validation=splits["validation"],
        sources=tuple(SourceInfo(**source) for source in tree["sources"]),
        left_out=LeftOut(**tree["left_out"]),
    )


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as what JSON knows; mappings in the order of their keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value)}
    return value
