"""Text cleaning shared by all domains: cutting, filtering, near-duplicate removal."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MIN_CHARS = 200
MAX_CHARS = 4_000
"""Documents are cut shorter than a model could use, so that a small shipped subset still has
hundreds of them and a split by document leaves enough on either side."""

ADDRESS = re.compile(r"[\w.+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,6}\b")
_HARMLESS_ADDRESS = re.compile(r"@(?:[\w-]+\.)*(?:example|invalid|localhost|test)\b", re.IGNORECASE)
_UNWANTED = re.compile(
    r"gutenberg|foldoc|<\|endoftext\|>|\ufffd|all rights reserved", re.IGNORECASE
)
_KEY_MATERIAL = re.compile(r"[A-Za-z0-9+/=]{60}")
_LICENCE_TEXT = re.compile(
    r"redistribution and use in source|permission is hereby granted|without warrant(?:y|ies) of",
    re.IGNORECASE,
)


class Document(NamedTuple):
    """One document of a domain.

    Attributes:
        source: Package and file it was read from, relative to the unpacked package.
        text: The text.
    """

    source: str
    text: str


def normalise(text: str) -> str:
    """Return `text` with LF line ends, no trailing blanks and at most one blank line in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").replace("\f", "\n")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n").rstrip()


def cut(text: str, limit: int = MAX_CHARS) -> Iterator[str]:
    """Yield consecutive pieces of `text` of at most `limit` characters.

    A piece ends, in this order of preference, before a blank line, at a line end, at the end of a
    sentence, or at the limit, but never before half of the limit.
    """
    while len(text) > limit:
        for mark, kept in (("\n\n", 0), ("\n", 0), (". ", 1), ("\u3002", 1)):
            end = text.rfind(mark, limit // 2, limit - 1)
            if end > 0:
                end += kept
                break
        else:
            end = limit
        yield text[:end].rstrip()
        text = text[end:].lstrip("\n") if text[end : end + 1] == "\n" else text[end:].lstrip(" ")
    yield text


def paragraphs(lines: Iterable[str]) -> str:
    """Join hard-wrapped lines into one line per paragraph; a blank line ends a paragraph."""
    joined: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            joined[-1].append(line.strip())
        elif joined[-1]:
            joined.append([])
    return "\n\n".join(" ".join(part) for part in joined if part)


def glue(entries: Iterable[str], size: int) -> Iterator[str]:
    """Join neighbouring short entries with blank lines into texts of about `size` characters."""
    group: list[str] = []
    length = 0
    for entry in entries:
        if group and length + len(entry) > size:
            yield "\n\n".join(group)
            group, length = [], 0
        group.append(entry)
        length += len(entry)
    if group:
        yield "\n\n".join(group)


def acceptable(text: str) -> bool:
    """Say whether a document may be used.

    Refused are fragments, licence texts, text with mail addresses or undecodable bytes, encoded
    keys, tables of numbers, and text that names a source which may not be redistributed.
    """
    if not MIN_CHARS <= len(text) <= MAX_CHARS:
        return False
    if any(pattern.search(text) for pattern in (_UNWANTED, _KEY_MATERIAL, _LICENCE_TEXT)):
        return False
    if any(not _HARMLESS_ADDRESS.search(match[0]) for match in ADDRESS.finditer(text)):
        return False
    digits = sum(character.isdigit() for character in text)
    return digits < 0.25 * len(text)


class NearDuplicates:
    """Refuses exact copies, and documents most of whose longer lines were seen before."""

    def __init__(self, min_line_chars: int = 24, share: float = 0.5) -> None:
        """Start with nothing seen.

        Args:
            min_line_chars: Shorter lines (closing brackets, `return None`) are not counted.
            share: A document with more than this share of seen lines is refused.
        """
        self._min_line_chars = min_line_chars
        self._share = share
        self._seen: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """Say whether `text` is new; its lines count as seen from now on if it is."""
        lines = {line.strip() for line in text.split("\n")}
        keys = {_digest(line) for line in lines if len(line) >= self._min_line_chars}
        keys = keys or {_digest(text)}
        if len(keys & self._seen) > self._share * len(keys):
            return False
        self._seen |= keys
        return True


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:12]
