"""All twenty-four domains: cut, freed of copies, split, shuffled and capped."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cleaning import Document
from readers import code, manuals, maths, prose

MIN_CHARS = 200
MAX_CHARS = 20_000
_MAX_UNDECODABLE = 3
"""Characters of a document that were not UTF-8."""
_BLOCK = 50
"""Neighbouring documents of one source that stay on one side of the split."""

DOMAINS: dict[str, Callable[[Path], Iterator[Document]]] = {
    reader.__name__: reader
    for reader in (
        manuals.biomed, prose.books, code.code_cpp, code.code_go, code.code_java, code.code_python,
        code.code_typescript, manuals.de_docs, prose.dictionary, prose.email, prose.encyclopedia,
        prose.essays, manuals.fr_docs, manuals.legal, maths.math_formal, maths.math_proofs,
        maths.math_qa, prose.recipes, manuals.security, prose.speeches, manuals.tech_docs,
        prose.wikipedia, manuals.zh_docs, prose.zh_poetry,
    )
}  # fmt: skip
"""Readers by domain name, sorted."""


class Written(NamedTuple):
    """What became of a domain.

    Attributes:
        size: Bytes of text written.
        documents: Documents written.
        found: Documents that there were, before the cap.
        short: Pieces dropped because they were too short.
        copies: Exact copies dropped.
        undecodable: Documents dropped because they were hardly UTF-8.
    """

    size: int
    documents: int
    found: int
    short: int
    copies: int
    undecodable: int


def pieces(text: str) -> Iterator[str]:
    """Yield `text` in pieces of at most 20,000 characters, cut at line ends where there are any.

    Line ends become LF, and runs of empty lines one empty line.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    while len(text) > MAX_CHARS:
        end = text.rfind("\n", MAX_CHARS // 2, MAX_CHARS)
        end = end if end > 0 else MAX_CHARS
        yield text[:end]
        text = text[end:].lstrip("\n")
    if text:
        yield text


def split_of(source: str, block: int) -> str:
    """Return the split of a block of documents of one source: about 5 % are for validation."""
    name = f"{source}#{block}".encode("utf-8", "replace")
    digest = hashlib.sha1(name, usedforsecurity=False).digest()
    return "validation" if digest[0] < 13 else "train"


def write_domain(
    domain: str, documents: Iterable[Document], folder: Path, cap_bytes: float
) -> Written:
    """Write `folder`/<domain>.jsonl: rows of text, source, domain and split.

    The order is a seeded shuffle, so that a capped domain is as mixed as the whole. The last
    document may go past the cap. What was there before stays there until all is read.

    Raises:
        FileNotFoundError: A package of this domain was not fetched.
        ModuleNotFoundError: A package that makes this domain is not installed.
    """
    rows: list[dict[str, str]] = []
    seen: set[bytes] = set()
    by_source: Counter[str] = Counter()
    short = copies = undecodable = 0
    for source, text in documents:
        for piece in pieces(text):
            digest = hashlib.sha256(piece.encode("utf-8", "surrogatepass")).digest()
            if len(piece) < MIN_CHARS:
                short += 1
            elif piece.count("\ufffd") > _MAX_UNDECODABLE:
                undecodable += 1
            elif digest in seen:
                copies += 1
            else:
                seen.add(digest)
                split = split_of(source, by_source[source] // _BLOCK)
                by_source[source] += 1
                rows.append({"text": piece, "source": source, "domain": domain, "split": split})
    random.Random(0).shuffle(rows)  # noqa: S311 (not for security)
    folder.mkdir(parents=True, exist_ok=True)
    size = count = 0
    target = folder / f"{domain}.jsonl"
    part = target.with_suffix(".part")
    with part.open("wb") as out:
        for row in rows:
            if size > cap_bytes:
                break
            out.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
            size += len(row["text"].encode("utf-8", "replace"))
            count += 1
    part.replace(target)
    return Written(size, count, len(rows), short, copies, undecodable)
