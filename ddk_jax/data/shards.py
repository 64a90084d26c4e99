"""Prepared data on disk: the manifest, and one flat array of tokens per domain and split.

`ddk_jax.data.prepare` decides what is in it. Tokens are memory-mapped: opening costs no memory, and
processes on one machine share the pages.
"""

from __future__ import annotations

import dataclasses
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ddk_jax.data.sources import file_sha256
from ddk_jax.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
TOKENIZER = "tokenizer"

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
PARTS = ("tokens", "offsets", "prompts")
"""The arrays of a split, each in `<domain>/<split>.<part>.npy`."""

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
class SplitInfo:
    """One split of a domain. `tokens` counts end tokens, `bytes` is UTF-8 text without them."""

    documents: int
    tokens: int
    bytes: int
    files: Mapping[str, str]
    """SHA-256 of each file, by its name in the domain's folder."""


@dataclass(frozen=True, kw_only=True)
class DomainInfo:
    """One domain: its splits, where it comes from, and how many rows were left out."""

    name: str
    train: SplitInfo
    validation: SplitInfo
    sources: tuple[SourceInfo, ...]
    rejected: int
    duplicates: int

    def split(self, split: Split) -> SplitInfo:
        """The split of that name."""
        return self.train if split == "train" else self.validation


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is in a directory of prepared data.

    Attributes:
        inputs_digest: SHA-256 over everything that decides the content: the files that were read,
            the tokenizer, the options. The same inputs need not be prepared again.
        domains: in the order in which weights and metrics list them.
    """

    inputs_digest: str
    tokenizer: TokenizerInfo
    validation_fraction: float
    domains: tuple[DomainInfo, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains, in order."""
        return tuple(domain.name for domain in self.domains)

    def to_json(self) -> str:
        """The content of `manifest.json`: the same text for the same content."""
        tree = {"format": _FORMAT, "version": FORMAT_VERSION, **_plain(self)}
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


class Shard(NamedTuple):
    """The documents of one domain and split, memory-mapped and read-only.

    Attributes:
        tokens: flat ids, uint16 or uint32 [tokens]; every document ends in the end token.
        offsets: where each document starts, and the end of the last one, int64 [documents + 1].
        prompts: leading prompt tokens of each document, int64 [documents]; the document's length
            for plain text.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompts: np.ndarray


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
        return Manifest(**tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); {_AGAIN}") from error


def open_shard(
    directory: Path, manifest: Manifest, domain: str, split: Split, *, verify: bool = False
) -> Shard:
    """The documents of one domain and split.

    Args:
        directory: where the manifest was read.
        manifest: its content.
        domain: name of the domain.
        split: `train` or `validation`.
        verify: also compare the SHA-256 of every file and the range of every id.

    Raises:
        DataError: no such domain, or a file is missing, damaged, or not what the manifest says.
    """
    info = next((info for info in manifest.domains if info.name == domain), None)
    if info is None:
        raise DataError(f"{directory}: no domain {domain!r}; it has {', '.join(manifest.names)}")
    paths = [directory / domain / f"{split}.{part}.npy" for part in PARTS]
    if verify:
        for path in paths:
            if not path.is_file() or file_sha256(path) != info.split(split).files[path.name]:
                raise DataError(
                    f"{path}: does not have the content that {MANIFEST} lists; {_AGAIN}"
                )
    shard = Shard(*(_open_array(path) for path in paths))
    _check(shard, info.split(split), manifest.tokenizer, directory / domain / split, verify)
    return shard


def _open_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; {_AGAIN}") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged ({error}); {_AGAIN}") from error


def _check(
    shard: Shard, info: SplitInfo, tokenizer: TokenizerInfo, name: Path, every_id: bool
) -> None:
    """That the arrays fit each other and the manifest. Reads the tokens only if `every_id`."""
    tokens, offsets, prompts = shard
    if tokens.dtype != token_dtype(tokenizer.vocab_size) or tokens.shape != (info.tokens,):
        raise DataError(
            f"{name}.tokens.npy: {tokens.dtype} {tokens.shape} is not what was listed; {_AGAIN}"
        )
    documents = info.documents
    if offsets.dtype != np.int64 or offsets.shape != (documents + 1,) or documents < 1:
        raise DataError(f"{name}.offsets.npy: not {documents + 1} offsets; {_AGAIN}")
    if prompts.dtype != np.int64 or prompts.shape != (documents,):
        raise DataError(f"{name}.prompts.npy: not {documents} lengths; {_AGAIN}")
    lengths = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != info.tokens or np.any(lengths < 1):
        raise DataError(f"{name}.offsets.npy: does not divide the {info.tokens} tokens; {_AGAIN}")
    if np.any(prompts < 0) or np.any(prompts > lengths):
        raise DataError(f"{name}.prompts.npy: a prompt is longer than its document; {_AGAIN}")
    for start in range(0, info.tokens if every_id else 0, _BLOCK_TOKENS):
        largest = int(tokens[start : start + _BLOCK_TOKENS].max())
        if largest >= tokenizer.vocab_size:
            raise DataError(
                f"{name}.tokens.npy: id {largest} is outside the vocabulary of "
                f"{tokenizer.vocab_size}; {_AGAIN}"
            )


def _domain(tree: dict[str, Any]) -> DomainInfo:
    checked_name(tree["name"])
    splits: dict[Split, SplitInfo] = {split: SplitInfo(**tree[split]) for split in SPLITS}
    for split in SPLITS:
        if sorted(splits[split].files) != sorted(f"{split}.{part}.npy" for part in PARTS):
            raise KeyError(f"files of {tree['name']}/{split}")
    return DomainInfo(
        name=tree["name"],
        train=splits["train"],
        validation=splits["validation"],
        sources=tuple(SourceInfo(**source) for source in tree["sources"]),
        rejected=tree["rejected"],
        duplicates=tree["duplicates"],
    )


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as what JSON knows; mappings in the order of their keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: value[key] for key in sorted(value)}
    return value


class TokenisedDocument(NamedTuple):
    """A document as a split stores it; `key` is the start of its hash."""

    ids: np.ndarray
    prompt: int
    num_bytes: int
    key: int


class SplitWriter:
    """Collects one split: tokens go to the disk as they come, lengths stay in memory.

    Attributes:
        keys: start of the hash of each document.
    """

    def __init__(self, folder: Path, split: Split, dtype: np.dtype[np.generic]) -> None:
        self.keys = array("Q")
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._lengths = array("q")
        self._prompts = array("q")
        self._bytes = array("q")
        self._raw = folder / f"{split}.raw"
        self._stream = self._raw.open("wb")
        self._hole = (0, 0)

    def add(self, document: TokenisedDocument) -> None:
        """Append a document."""
        self._stream.write(document.ids.astype(self._dtype).tobytes())
        self._lengths.append(document.ids.size)
        self._prompts.append(document.prompt)
        self._bytes.append(document.num_bytes)
        self.keys.append(document.key)

    def take(self, index: int) -> TokenisedDocument:
        """Remove a document; at most once."""
        self._stream.flush()
        start, size = sum(self._lengths[:index]), self._lengths.pop(index)
        self._hole = (start, start + size)
        offset = start * self._dtype.itemsize
        ids = np.fromfile(self._raw, self._dtype, count=size, offset=offset)
        return TokenisedDocument(
            ids, self._prompts.pop(index), self._bytes.pop(index), self.keys.pop(index)
        )

    def close(self) -> None:
        """Close the file; a split that is not finished is lost."""
        self._stream.close()

    def finish(self) -> SplitInfo:
        """Write the arrays of the split and remove what was only needed on the way."""
        self._stream.close()
        offsets = np.concatenate([[0], np.cumsum(np.asarray(self._lengths, np.int64))]).astype(
            np.int64
        )
        names = {
            "offsets": self._write("offsets", [offsets], offsets.size, np.dtype(np.int64)),
            "prompts": self._write(
                "prompts",
                [np.asarray(self._prompts, np.int64)],
                len(self._prompts),
                np.dtype(np.int64),
            ),
            "tokens": self._write("tokens", self._token_blocks(), int(offsets[-1]), self._dtype),
        }
        self._raw.unlink()
        return SplitInfo(
            documents=len(self.keys),
            tokens=int(offsets[-1]),
            bytes=sum(self._bytes),
            files={f"{self._split}.{part}.npy": sha256 for part, sha256 in names.items()},
        )

    def _token_blocks(self) -> Iterator[np.ndarray]:
        size = self._raw.stat().st_size // self._dtype.itemsize
        hole_start, hole_stop = self._hole
        for start, stop in ((0, hole_start), (hole_stop, size)):
            for at in range(start, stop, _BLOCK_TOKENS):
                count = min(_BLOCK_TOKENS, stop - at)
                yield np.fromfile(self._raw, self._dtype, count, offset=at * self._dtype.itemsize)

    def _write(
        self, part: str, blocks: Iterable[np.ndarray], size: int, dtype: np.dtype[np.generic]
    ) -> str:
        """Write a flat .npy file block by block. Returns its SHA-256."""
        path = self._folder / f"{self._split}.{part}.npy"
        header = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": (size,)}
        with path.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for block in blocks:
                stream.write(block.astype(dtype.newbyteorder("<"), copy=False).tobytes())
        return file_sha256(path)
