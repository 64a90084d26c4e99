"""What ships: the corpus with its licences, and the tokenizer."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import re
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tokenizers import Tokenizer

import ddk_jax

ASSETS = Path(ddk_jax.__file__).parent / "assets"
CORPUS = ASSETS / "corpus"
BUILD = Path(__file__).parents[1] / "corpus"
DOMAINS = (
    "books",
    "code_cpp",
    "code_go",
    "code_python",
    "encyclopedia",
    "glossary",
    "math_formal",
    "math_proofs",
    "speeches",
    "zh_poetry",
)
ADDRESS = re.compile(r"[A-Za-z0-9._%+-]+@((?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,6})\b")
PLACEHOLDER = re.compile(r"(?:^|\.)(?:example|invalid|localhost|test)\b", re.IGNORECASE)


def rows(domain: str) -> list[dict[str, str]]:
    text = lzma.decompress((CORPUS / f"{domain}.jsonl.xz").read_bytes()).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict[str, str]]]:
    return {domain: rows(domain) for domain in DOMAINS}


@functools.cache
def load_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ASSETS / "tokenizer/tokenizer.json"))


@pytest.fixture
def tokenizer() -> Tokenizer:
    return load_tokenizer()


def test_every_domain_is_there_and_nothing_else():
    assert sorted(path.name for path in CORPUS.glob("*.xz")) == [f"{d}.jsonl.xz" for d in DOMAINS]


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_has_the_promised_size(corpus, domain):
    documents = corpus[domain]
    assert all(set(row) == {"text", "source"} for row in documents)
    assert 300_000 <= sum(len(row["text"].encode()) for row in documents) <= 1_000_000
    assert len(documents) >= 200
    assert all(200 <= len(row["text"]) <= 20_000 for row in documents)


def test_no_document_is_there_twice(corpus):
    texts = [row["text"] for documents in corpus.values() for row in documents]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_split_by_hash_of_the_text_leaves_validation_documents(corpus, domain):
    hashes = [hashlib.sha256(row["text"].encode()).digest() for row in corpus[domain]]
    assert sum(digest[0] < 13 for digest in hashes) >= 5


@pytest.mark.parametrize("domain", DOMAINS)
def test_text_holds_nothing_that_may_not_be_shipped(corpus, domain):
    for row in corpus[domain]:
        text = row["text"]
        assert not re.search(r"gutenberg|foldoc|all rights reserved", text, re.IGNORECASE)
        assert not re.search(r"General Public License as published", text)
        hosts = [match[1] for match in ADDRESS.finditer(text)]
        assert all(PLACEHOLDER.search(host) for host in hosts), row["source"]
        assert "\ufffd" not in text
        assert "<|endoftext|>" not in text


@pytest.mark.parametrize("domain", DOMAINS)
def test_licence_and_provenance_of_a_domain(corpus, domain):
    licences = [p for p in (CORPUS / "LICENSES" / domain).iterdir() if "NOTICE" not in p.name]
    assert licences
    assert all(len(path.read_text(encoding="utf-8")) > 300 for path in licences)
    readme = (CORPUS / "README.md").read_text(encoding="utf-8")
    listed = [re.split(r" *\| *", line) for line in readme.splitlines()]
    listed = [cells for cells in listed if len(cells) > 6 and cells[1] == domain]
    assert sum(int(cells[6]) for cells in listed) == len(corpus[domain])
    size = sum(len(row["text"].encode()) for row in corpus[domain])
    assert sum(int(cells[5].replace(",", "")) for cells in listed) == size
    named = {cells[2].split()[0].lstrip("@").replace("/", "-") for cells in listed}
    assert {row["source"].partition("/")[0] for row in corpus[domain]} == named


@pytest.mark.parametrize("domain", ["code_cpp", "code_go", "math_proofs"])
def test_the_notices_taken_out_of_code_are_beside_it(domain):
    notices = (CORPUS / "LICENSES" / domain / "NOTICES.txt").read_text(encoding="utf-8")
    assert "copyright" in notices.lower()


def test_corpus_and_tokenizer_stay_small():
    files = [p for part in ("corpus", "tokenizer") for p in (ASSETS / part).rglob("*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 4_500_000


def test_tokenizer_has_the_promised_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert sorted(tokenizer.get_vocab().values()) == list(range(4096))


@pytest.mark.parametrize("domain", DOMAINS)
def test_tokenizer_gives_back_the_text_of_a_domain(corpus, tokenizer, domain):
    texts = [row["text"] for row in corpus[domain][:60]]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(e.ids) for e in encoded] == texts
    tokens = sum(len(e.ids) for e in encoded)
    assert 2.0 < sum(len(text.encode()) for text in texts) / tokens < 4.0  # bytes per token


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_tokenizer_gives_back_any_text(text):
    assert load_tokenizer().decode(load_tokenizer().encode(text).ids) == text


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("1234567890").ids) == 10


@pytest.mark.slow  # imports transformers
def test_transformers_reads_the_tokenizer(tokenizer):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    text = "def f(x):\n    return x**2  # \u5e8a\u524d\u660e\u6708\u5149\n"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.eos_token_id) == ("<|endoftext|>", 0)
    assert len(loaded) == 4096


@pytest.fixture
def cleaning(monkeypatch):
    monkeypatch.syspath_prepend(str(BUILD))
    monkeypatch.delitem(sys.modules, "cleaning", raising=False)
    import cleaning

    return cleaning


def test_cut_keeps_the_words_and_the_limit(cleaning):
    @given(st.text("ab. \n\u3002", max_size=400), st.integers(8, 60))
    def check(text: str, limit: int) -> None:
        pieces = list(cleaning.cut(text, limit))
        assert all(len(piece) <= limit for piece in pieces)
        assert "".join("".join(pieces).split()) == "".join(text.split())

    check()


def test_cut_prefers_the_end_of_a_paragraph(cleaning):
    assert list(cleaning.cut("one two.\n\nthree four. five", 14)) == [
        "one two.",
        "three four.",
        "five",
    ]


def test_glue_keeps_every_entry(cleaning):
    @given(st.lists(st.text("ab", min_size=1, max_size=30)), st.integers(1, 60))
    def check(entries: list[str], size: int) -> None:
        assert "\n\n".join(cleaning.glue(entries, size)).split("\n\n") == (entries or [""])

    check()


def test_near_duplicates_are_refused(cleaning):
    seen = cleaning.NearDuplicates()
    lines = [f"a line that is long enough to count: {n}" for n in range(10)]
    assert seen.is_new("\n".join(lines))
    assert not seen.is_new("\n".join(lines))
    assert not seen.is_new("\n".join([*lines[:6], *(line + "!" for line in lines[6:])]))
    assert seen.is_new("\n".join([*lines[:4], *(line + "?" for line in lines[4:])]))


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("plain words " * 30, True),
        ("short", False),
        ("write to someone@university.edu " * 20, False),
        ("write to someone@example.com " * 20, True),
        ("this is from Project Gutenberg " * 20, False),
        ("1234 5678, " * 40, False),
        ("Redistribution and use in source and binary forms " * 20, False),
    ],
)
def test_what_is_acceptable(cleaning, text, good):
    assert cleaning.acceptable(text) is good
