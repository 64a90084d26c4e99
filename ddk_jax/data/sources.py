"""Documents from JSONL and text files, one at a time, and why others are refused.

A document's text is what the file holds, with two exceptions: a byte order mark at the start of a
file is dropped, and CRLF becomes LF, so that the same text is the same document on every system.
Blank lines of a JSONL file hold no row and are passed over. Everything else that cannot be used is
reported as a `Reject`; nothing is repaired.

A row of JSONL is a text, a prompt with its response, or a multiple-choice question, which is read
as the prompt and the response that spell out the right option.

Memory is bounded by the longest document: at most `MAX_DOCUMENT_BYTES`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ddk_jax.config import SourceConfig, resolve_path
from ddk_jax.errors import DataError, StorageError

MAX_DOCUMENT_BYTES = 64 * 2**20
"""A line of JSONL or a text file that is longer is rejected."""

JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .tex .html .py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js .jsx"
    " .ts .tsx .rb .pl .php .cs .swift .m .r .jl .lua .hs .ml .lean .sql .sh .f90 .zig .v".split()
)
"""Files in a folder that are read as one document each; other files of a folder are passed over."""

_COMPRESSED = frozenset({".gz", ".xz"})
_MAGIC = frozenset("*?[")
_BOM = b"\xef\xbb\xbf"
_BLOCK = 2**20


class Document(NamedTuple):
    """One accepted document.

    Attributes:
        text: the whole text, or the prompt when there is a response. Not blank.
        response: the response to the prompt; empty for plain text.
        file: where it comes from, as the user would write it.
        line: its line in `file`, from 1; 1 for a text file.
    """

    text: str
    response: str
    file: str
    line: int

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text. Equal for equal documents, wherever they come from."""
        parts = (self.text, self.response) if self.response else (self.text,)
        # NUL separates without ambiguity: no document holds one.
        return hashlib.sha256("\0".join(parts).encode("utf-8")).digest()

    @property
    def num_bytes(self) -> int:
        """Bytes of the text and the response in UTF-8."""
        return len(self.text.encode("utf-8")) + len(self.response.encode("utf-8"))


class MultipleChoice(NamedTuple):
    """A question with its options.

    Attributes:
        query: what stands before an option; blank only where there is a suffix.
        choices: the options, at least two.
        gold: number of the right option, from 0.
        suffix: what follows each of the options; empty where nothing does.
    """

    query: str
    choices: tuple[str, ...]
    gold: int
    suffix: str

    def parts(self, choice: int) -> tuple[str, str]:
        """Context, and the text that a model predicts after it if it takes this option.

        That text is the option, with a space before it. Where there is a suffix, the option is
        filled in after the query and the suffix is predicted, with a space before it.
        """
        option = self.choices[choice]
        if self.suffix:
            return self.query + option, " " + self.suffix
        return self.query, " " + option


class Row(NamedTuple):
    """One JSON object of a JSONL file. `line` counts from 1."""

    line: int
    columns: dict[str, Any]


class Reject(NamedTuple):
    """One row or file that cannot be used. `line` counts from 1."""

    file: str
    line: int
    reason: str


T = TypeVar("T", Document, Row)


class SourceFile(NamedTuple):
    """A file of a source: its name as the user would write it, and where it is."""

    name: str
    path: Path


def source_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source in the order in which they are read: sorted by name.

    Raises:
        DataError: nothing is there, or a file is of a kind that is not read.
    """
    head, pattern = _split_glob(source.path)
    root = resolve_path(head)
    if pattern:
        found = [path for path in sorted(root.glob(pattern)) if path.is_file()]
    elif root.is_dir():
        found = [path for path in sorted(root.rglob("*")) if _is_wanted(path, root)]
    elif root.is_file():
        found = [root]
    else:
        raise DataError(f"source {source.path}: no such file or folder")
    if not found:
        advice = "no file matches" if pattern else "the folder holds no text or JSONL file"
        raise DataError(f"source {source.path}: {advice}")
    files = [SourceFile(_name(head, path, root), path) for path in found]
    for name, path in files:
        if _inner_suffix(path) == ".json":
            raise DataError(f"source {name}: write one JSON object a line and call it .jsonl")
    return files


def read_file(file: SourceFile, source: SourceConfig) -> Iterator[Document | Reject]:
    """The documents of one file in order, with a `Reject` in place of each that cannot be used.

    A row without the column `source.text` that has `query` and `choices` is a multiple-choice
    question; its document is the context and the right continuation (`MultipleChoice.parts`).

    A compressed file that is cut off or damaged gives the rows before the damage, then a reject.

    Raises:
        StorageError: the file cannot be read at all.
    """
    if is_jsonl(file.path):
        for item in read_rows(file):
            yield item if isinstance(item, Reject) else _document(item, file.name, source)
    else:
        yield from _guarded(file, lambda stream, name: _whole_text(stream, name, source))


def read_rows(file: SourceFile) -> Iterator[Row | Reject]:
    """The JSON objects of a JSONL file in order, with a `Reject` in place of what is none.

    Raises:
        StorageError: the file cannot be read at all.
    """
    yield from _guarded(file, _jsonl_rows)


def is_jsonl(path: Path) -> bool:
    """Whether the name is that of a JSONL file, compressed or not."""
    return _inner_suffix(path) in JSONL_SUFFIXES


def is_multiple_choice(columns: Mapping[str, Any]) -> bool:
    """Whether a row is meant as a multiple-choice question."""
    return "query" in columns and "choices" in columns


def multiple_choice(columns: Mapping[str, Any]) -> MultipleChoice:
    """The question in the columns `query`, `choices`, `gold` and, optionally, `suffix` of a row.

    Raises:
        ValueError: the reason why there is none.
    """
    suffix = text_of(columns, "suffix") if "suffix" in columns else ""
    query = text_of(columns, "query", may_be_blank=bool(suffix))
    for column in ("choices", "gold"):
        if column not in columns:
            raise ValueError(f"column {column!r} is missing")
    choices, gold = columns["choices"], columns["gold"]
    if not isinstance(choices, list) or len(choices) < 2:
        found = f"{len(choices)} texts" if isinstance(choices, list) else _kind(choices)
        raise ValueError(f"column 'choices' must be a list of two texts or more, found {found}")
    named = {f"choices[{i}]": choice for i, choice in enumerate(choices)}
    options = tuple(text_of(named, name) for name in named)
    if not isinstance(gold, int) or isinstance(gold, bool):
        raise ValueError(f"column 'gold' must be the number of a choice, found {_kind(gold)}")
    if not 0 <= gold < len(options):
        raise ValueError(f"gold is {gold}, but the {len(options)} choices are numbered from 0")
    return MultipleChoice(query, options, gold, suffix)


def text_of(columns: Mapping[str, Any], column: str, *, may_be_blank: bool = False) -> str:
    """The text in a column of a row, with LF line ends.

    Raises:
        ValueError: the reason why there is none that can be used.
    """
    if column not in columns:
        raise ValueError(f"column {column!r} is missing")
    value = columns[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must be text, found {_kind(value)}")
    value = value.replace("\r\n", "\n")
    problem = _problem(value)
    if problem and not (may_be_blank and not value.strip()):
        raise ValueError(f"{column}: {problem}")
    return value


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Raises:
        StorageError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def _split_glob(path: str) -> tuple[str, str]:
    """The part before the first component with a wildcard, and the rest ("" if there is none)."""
    if not _MAGIC & set(path):
        return path, ""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC & set(part))
    prefix, colon, rest = parts[first].rpartition(":")
    if first == 0 and prefix == "assets":
        return prefix + colon, "/".join([rest, *parts[1:]])
    head = "/".join(parts[:first])
    return head or ("/" if path.startswith("/") else "."), "/".join(parts[first:])


def _name(head: str, path: Path, root: Path) -> str:
    if path == root:
        return head
    inside = path.relative_to(root).as_posix()
    return inside if head == "." else head + ("" if head[-1] in "/:" else "/") + inside


def _inner_suffix(path: Path) -> str:
    """The suffix without that of the compression: `.jsonl` of `a.jsonl.xz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _is_wanted(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.is_file() and _inner_suffix(path) in TEXT_SUFFIXES | JSONL_SUFFIXES


def _open(path: Path) -> io.BufferedIOBase:
    match path.suffix.lower():
        case ".gz":
            return gzip.GzipFile(path)
        case ".xz":
            return lzma.LZMAFile(path)
        case _:
            return path.open("rb")


def _without_bom(raw: bytes) -> bytes:
    while raw.startswith(_BOM):
        raw = raw[len(_BOM) :]
    return raw


def _guarded(
    file: SourceFile, reader: Callable[[io.BufferedIOBase, str], Iterator[T | Reject]]
) -> Iterator[T | Reject]:
    """What a reader finds in a file, with a `Reject` where a compressed file is damaged."""
    line = 0
    try:
        with _open(file.path) as stream:
            for item in reader(stream, file.name):
                line = item.line
                yield item
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        yield Reject(file.name, line + 1, f"the compressed file is cut off or damaged: {error}")
    except OSError as error:
        raise StorageError(f"{file.name}: cannot be read ({error.strerror or error})") from error


def _whole_text(
    stream: io.BufferedIOBase, name: str, source: SourceConfig
) -> Iterator[Document | Reject]:
    if source.prompt:
        yield Reject(name, 1, "a text file has no columns, and the source names a prompt column")
        return
    raw = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(raw) > MAX_DOCUMENT_BYTES:
        yield Reject(name, 1, _too_long())
        return
    try:
        text = _without_bom(raw).decode("utf-8")
    except UnicodeDecodeError as error:
        yield Reject(name, 1, f"invalid UTF-8 at byte {error.start}")
        return
    try:
        yield Document(text_of({"the file": text}, "the file"), "", name, 1)
    except ValueError as error:
        yield Reject(name, 1, str(error))


def _jsonl_rows(stream: io.BufferedIOBase, name: str) -> Iterator[Row | Reject]:
    number = 0
    while raw := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(raw) > MAX_DOCUMENT_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_DOCUMENT_BYTES)
            yield Reject(name, number, _too_long())
            continue
        if number == 1:
            raw = _without_bom(raw)
        if raw.strip():
            yield _json_row(raw, name, number)


def _json_row(raw: bytes, name: str, number: int) -> Row | Reject:
    try:
        row: Any = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Reject(name, number, f"invalid UTF-8 at byte {error.start} of the line")
    except RecursionError:
        return Reject(name, number, "broken JSON: nested too deeply")
    except ValueError as error:
        return Reject(name, number, f"broken JSON: {error}")
    if not isinstance(row, dict):
        return Reject(name, number, f"expected a JSON object, found {_kind(row)}")
    return Row(number, row)


def _document(row: Row, name: str, source: SourceConfig) -> Document | Reject:
    """The document in a row of JSONL, as the source says where it is."""
    columns = row.columns
    response = ""
    try:
        if source.prompt:
            text = text_of(columns, source.prompt)
            response = text_of(columns, source.response)
        elif source.text not in columns and is_multiple_choice(columns):
            question = multiple_choice(columns)
            text, response = question.parts(question.gold)
        else:
            text = text_of(columns, source.text)
    except ValueError as error:
        return Reject(name, row.line, str(error))
    return Document(text, response, name, row.line)


def _problem(text: str) -> str:
    """Why the text cannot be a document; empty if it can."""
    if not text.strip():
        return "empty or blank"
    if "\0" in text:
        return f"NUL at character {text.index(chr(0))}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"lone surrogate at character {error.start}"
    return ""


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _too_long() -> str:
    return f"longer than {MAX_DOCUMENT_BYTES // 2**20} MiB: split it into several documents"
