"""Files of unpacked packages, and joining short passages to documents."""

from __future__ import annotations

import glob
import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path

from cleaning import Document


def files(root: Path, pattern: str) -> list[Path]:
    """Return the regular files under `root`, in a fixed order.

    Raises:
        FileNotFoundError: Nothing matches, so the package was not fetched.
    """
    found = sorted(p for p in root.glob(pattern) if p.is_file() and not p.is_symlink())
    if not found:
        raise FileNotFoundError(f"nothing matches {pattern} in {root}: run fetch.sh first")
    return found


def names(root: Path, *patterns: str) -> Iterator[str]:
    """Yield the regular files under `root` by name relative to it, sorted as text.

    Unlike `files`, it follows folders that are links, passes over hidden ones, and takes several
    patterns, one after the other.

    Raises:
        FileNotFoundError: Nothing matches one of the patterns, so its package was not fetched.
    """
    for pattern in patterns:
        paths = ((name, root / name) for name in glob.glob(pattern, root_dir=root, recursive=True))
        found = sorted(name for name, path in paths if path.is_file() and not path.is_symlink())
        if not found:
            raise FileNotFoundError(
                f"nothing matches {pattern} in {root}: run fetch.sh {root} --all first"
            )
        yield from found


def name_of(root: Path, pattern: str) -> str:
    """Return the first name that `names` finds."""
    return next(names(root, pattern))


def read(path: Path) -> str:
    """Return the text of a file in UTF-8, unpacked; what is not UTF-8 becomes U+FFFD."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", "replace")


def gathered(parts: Iterable[str], size: int, mark: str) -> Iterator[str]:
    """Join neighbouring parts with `mark` until a text has more than `size` characters."""
    group: list[str] = []
    length = 0
    for part in parts:
        group.append(part)
        length += len(part)
        if length > size:
            yield mark.join(group)
            group, length = [], 0
    if group:
        yield mark.join(group)


def in_groups(parts: Iterable[Document], count: int, mark: str) -> Iterator[Document]:
    """Join every `count` neighbouring parts with `mark`; an incomplete last group is dropped."""
    group: list[str] = []
    for source, text in parts:
        group.append(text)
        if len(group) == count:
            yield Document(source, mark.join(group))
            group = []
