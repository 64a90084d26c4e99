"""Code: the standard libraries of Python, Java and Go, Boost, and TypeScript packages."""

from __future__ import annotations

import re
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

from cleaning import Document
from reading import name_of, names, read

_JAVA = (
    "java.base/", "java.net.http/", "java.sql/", "java.logging/", "jdk.jshell/",
    "java.desktop/javax/swing",
)  # fmt: skip


def code_python(work: Path) -> Iterator[Document]:
    """The standard library of the Python that runs this, with its tests where it has them."""
    del work
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in names(root, "**/*.py"):
        if "site-packages" not in name and not name.startswith("lib2to3/tests"):
            yield Document(f"stdlib/{name}", read(root / name))


def code_java(work: Path) -> Iterator[Document]:
    """Modules of OpenJDK, without the licence header that is the same in every file."""
    with zipfile.ZipFile(work / name_of(work, "x/openjdk-17-source/**/src.zip")) as archive:
        for name in archive.namelist():
            if name.endswith(".java") and name.startswith(_JAVA):
                text = archive.read(name).decode("utf-8", "replace")
                yield Document(name, re.sub(r"(?s)\A/\*.*?\*/\s*", "", text))


def code_go(work: Path) -> Iterator[Document]:
    """Go's own sources with their tests, without generated files and licence headers."""
    for name in names(work, "x/golang-1.19-src/usr/share/go-1.19/src/**/*.go"):
        text = read(work / name)
        if "//go:build ignore" not in text[:400] and "DO NOT EDIT" not in text[:600]:
            yield Document(name, re.sub(r"(?s)\A// Copyright.*?\n\n", "", text))


def code_cpp(work: Path) -> Iterator[Document]:
    """Boost headers that were not generated."""
    for name in names(work, "x/libboost1.74-dev/usr/include/boost/**/*.hpp"):
        if not any(part in name for part in ("/preprocessed/", "/aux_/", "/preprocessor/")):
            yield Document(name, read(work / name))


def code_typescript(work: Path) -> Iterator[Document]:
    """Three packages that ship their TypeScript; declarations say nothing that it does not."""
    sources = (f"xn/{package}/package/src/**/*.ts" for package in ("effect", "rxjs", "zod"))
    for name in names(work, *sources):
        if not name.endswith(".d.ts"):
            yield Document(name, read(work / name))
