"""Documents from files: what is accepted, and the reason for everything that is not."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_jax.config import SourceConfig
from ddk_jax.data.sources import (
    Document,
    Reject,
    documents,
    documents_of,
    jsonl,
    pieces_of,
    read_piece,
    textfile,
)
from ddk_jax.errors import DataError, StorageError


def read(path: Path | str, **columns: str) -> list[Document | Reject]:
    source = SourceConfig(path=str(path), **columns)
    found: list[Document | Reject] = []
    for piece in pieces_of(source):
        for row in read_piece(piece, source):
            found += [row] if isinstance(row, Reject) else documents_of(row, piece.name, source)
    return found


def rejects(path: Path, **columns: str) -> list[tuple[int, str]]:
    return [(i.line, i.reason) for i in read(path, **columns) if isinstance(i, Reject)]


def texts(path: Path, **columns: str) -> list[str]:
    return [item.text for item in read(path, **columns) if isinstance(item, Document)]


BAD_LINES = [
    (b'{"text": "caf\xe9"}', "invalid UTF-8 at byte 13"),
    (b'{"text": "a \\ud800 b"}', "lone surrogate at character 2"),
    (b'{"text": "a\\u0000b"}', "NUL at character 1"),
    (b'{"text": ""}', "empty or blank"),
    (b'{"text": " \\n\\t \\u00a0"}', "empty or blank"),
    (b'{"body": "x"}', "column 'text' is missing"),
    (b'{"text": 5}', "must be text, found int"),
    (b'{"text": null}', "must be text, found null"),
    (b'{"text": ["x"]}', "must be text, found list"),
    (b'["text"]', "expected a JSON object, found list"),
    (b'{"text": "cut of', "broken JSON"),
    (b'{"text": "a"} {"text": "b"}', "broken JSON"),
    (b"\xef\xbb\xbf{}", "broken JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"n": ' + b"9" * 10_000 + b"}", "broken JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_reported_and_its_neighbours_are_kept(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    assert texts(path) == ["before", "after"]
    [(number, found)] = rejects(path)
    assert number == 2
    assert reason in found


def test_line_ends_byte_order_marks_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    bom = b"\xef\xbb\xbf"
    path.write_bytes(
        bom
        + bom
        + b'{"text": "a\\r\\nb\\rc"}\r\n\r\n  \n{"text": " kept  \\n"}'  # no final newline
    )
    assert texts(path) == ["a\nb\rc", " kept  \n"]
    assert rejects(path) == []
    assert [item.line for item in read(path)] == [1, 4]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"))))
def test_text_is_not_altered(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("s") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for i, text in enumerate(lines):
            stream.write(json.dumps({"text": text}, ensure_ascii=i % 2 == 0) + "\n")
    assert texts(path) == [text for text in lines if text.strip()]
    assert len(rejects(path)) == sum(not text.strip() for text in lines)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    folder = tmp_path_factory.mktemp("s")
    for name in ("a.jsonl", "a.txt", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"):
        (folder / name).write_bytes(raw)
        for item in read(folder / name):
            assert isinstance(item, Reject) or item.text.strip()


def zstd(raw: bytes) -> bytes:
    return pyarrow.compress(raw, "zstd", asbytes=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_a_cut_compressed_file_gives_what_came_before(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    # Incompressible, so that there are several blocks.
    lines = [
        json.dumps({"text": hashlib.sha512(str(i).encode()).hexdigest() * 2}) for i in range(3_000)
    ]
    whole = compress("\n".join(lines).encode())
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(whole)
    assert len(texts(path)) == 3_000
    path.write_bytes(whole[: len(whole) * 2 // 3])
    kept = texts(path)
    assert kept
    assert kept == [json.loads(line)["text"] for line in lines[: len(kept)]]
    [(line, reason)] = rejects(path)
    assert line == len(kept) + 1
    assert "cut off or damaged" in reason
    path.write_bytes(b"this is not compressed")
    assert [r.line for r in read(path)] == [1]


def test_prompt_and_response(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"q": "2 + 2?", "a": "4"}, {"q": "2 + 2?"}, {"q": " ", "a": "4"}, {"a": "4", "q": "\0"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, *rest = read(path, prompt="q", response="a")
    assert isinstance(first, Document)
    assert (first.text, first.response, first.num_bytes) == ("2 + 2?", "4", 7)
    assert [item.reason for item in rest if isinstance(item, Reject)] == [
        "column 'a' is missing",
        "q: empty or blank",
        "q: NUL at character 0",
    ]
    assert first.digest != Document("2 + 2?4", "", "", 1).digest
    assert first.digest == Document("2 + 2?", "4", "elsewhere", 9).digest


QUESTION = {"id": "1", "query": "Is it?", "choices": ["no", "yes"], "gold": 1, "raw": {"text": 5}}


def test_a_multiple_choice_row_is_a_prompt_and_its_right_answer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    filled = {"query": " ", "choices": ["Al", "Bo"], "gold": 0, "suffix": "ran.\r\n"}
    path.write_text("\n".join(map(json.dumps, [QUESTION, filled, QUESTION | {"text": "plain"}])))
    found = [(item.text, item.response) for item in read(path) if isinstance(item, Document)]
    assert found == [("Is it?", " yes"), (" Al", " ran.\n"), ("plain", "")]
    # A source that names its columns is taken at its word.
    assert [line for line, _ in rejects(path, prompt="query", response="gold")] == [1, 2, 3]
    assert texts(path, text="id") == ["1", " Al", "1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gold": 2}, "gold is 2, but the 2 choices are numbered from 0"),
        ({"gold": -1}, "gold is -1, but the 2 choices are numbered from 0"),
        ({"gold": True}, "column 'gold' must be the number of a choice, found bool"),
        ({"gold": "1"}, "column 'gold' must be the number of a choice, found str"),
        ({"choices": "yes"}, "column 'choices' must be a list of two texts or more, found str"),
        ({"choices": ["yes"]}, "column 'choices' must be a list of two texts or more, found 1 tex"),
        ({"choices": ["no", 1]}, "column 'choices[1]' must be text, found int"),
        ({"choices": ["\t", "yes"]}, "choices[0]: empty or blank"),
        ({"choices": ["no", "a\0"]}, "choices[1]: NUL at character 1"),
        ({"query": ""}, "query: empty or blank"),
        ({"query": None}, "column 'query' must be text, found null"),
        ({"query": "\ud800", "suffix": "s"}, "query: lone surrogate at character 0"),
        ({"suffix": ""}, "suffix: empty or blank"),
        ({"suffix": 1}, "column 'suffix' must be text, found int"),
    ],
)
def test_a_bad_question_is_reported(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n" + json.dumps(QUESTION | change))
    assert texts(path) == ["Is it?"]
    [(number, found)] = rejects(path)
    assert number == 2
    assert reason in found


def test_a_question_without_an_answer_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"query": "Is it?", "choices": ["no", "yes"]}, {"query": "Is it?", "gold": 1}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert rejects(path) == [(1, "column 'gold' is missing"), (2, "column 'text' is missing")]


def test_folders_globs_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "c/b.txt": "bee",
        "c/sub/a.md": "ay",
        "c/sub/code.py": "pass",
        "c/rows.jsonl": '{"text": "row"}',
        "c/more.txt.gz": "",
        "c/skipped.bin": "\0",
        "c/.hidden/x.txt": "no",
        "c/package.json": "{}",
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    Path("c/more.txt.gz").write_bytes(gzip.compress(b"zipped"))

    def found(path: str) -> dict[str, str]:
        return {item.file: item.text for item in read(path) if isinstance(item, Document)}

    folder = found("c")
    assert folder == {
        "c/b.txt": "bee",
        "c/more.txt.gz": "zipped",
        "c/rows.jsonl": "row",
        "c/sub/a.md": "ay",
        "c/sub/code.py": "pass",
    }
    assert list(folder) == sorted(folder)
    assert found("c/*.txt") == {"c/b.txt": "bee"}
    assert found("c/**/*.m[d]") == {"c/sub/a.md": "ay"}
    assert found("*/b.txt") == {"c/b.txt": "bee"}
    assert found(f"{tmp_path}/*/b.txt") == {f"{tmp_path}/c/b.txt": "bee"}
    assert found("c/b.txt") == {"c/b.txt": "bee"}
    for path, message in {
        "c/none.txt": "no such file",
        "c/*.rs": "no file matches",
        "c/package.json": "one JSON object a line",
    }.items():
        with pytest.raises(DataError, match=message):
            read(path)
    Path("empty").mkdir()
    with pytest.raises(DataError, match="holds no text or rows"):
        read("empty")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert texts(path) == ["one\ntwo\n"]
    path.write_bytes(b"\xff\xfe")
    assert rejects(path) == [(1, "invalid UTF-8 at byte 0")]
    path.write_bytes(b" \n")
    assert rejects(path) == [(1, "text: empty or blank")]
    [(_, reason)] = rejects(path, prompt="q", response="a")
    assert "no columns" in reason


def test_what_is_too_long_is_rejected_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 40)
    monkeypatch.setattr(textfile, "MAX_FILE_BYTES", 40)
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "short"}', json.dumps({"text": "x" * 200}), '{"text": "after"}']
    path.write_text("\n".join(lines))
    assert texts(path) == ["short", "after"]
    assert [line for line, _ in rejects(path)] == [2]
    text = tmp_path / "a.txt"
    text.write_text("x" * 41)
    assert len(rejects(text)) == 1


def test_a_long_document_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "long " * 2_000_000}))
    assert [len(text) for text in texts(path)] == [10_000_000]


def test_an_unreadable_file_is_a_storage_error(tmp_path: Path) -> None:
    source = SourceConfig(path=str(tmp_path / "a.txt"))
    Path(source.path).write_text("x")
    [piece] = pieces_of(source)
    Path(source.path).unlink()
    with pytest.raises(StorageError, match=r"a\.txt: cannot be read"):
        list(read_piece(piece, source))


def test_a_very_long_document_is_cut_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_CHARS", 40)
    path = tmp_path / "a.jsonl"
    long = "one two three\n" * 9 + "x" * 90 + " end" + "four " * 20
    path.write_text(json.dumps({"text": long}) + "\n" + json.dumps({"text": "short"}))
    *pieces, short = read(path)
    assert "".join(piece.text for piece in pieces if isinstance(piece, Document)) == long
    assert all(isinstance(piece, Document) and len(piece.text) <= 40 for piece in pieces)
    assert {piece.whole for piece in pieces if isinstance(piece, Document)} == {
        Document(long, "", "", 1).digest
    }
    assert isinstance(short, Document) and short.whole == b""
    assert [p.text for p in pieces[:3] if isinstance(p, Document)] == ["one two three\n" * 2] * 3
    path.write_text(json.dumps({"q": long, "a": "yes"}))
    assert rejects(path, prompt="q", response="a") == [
        (1, "prompt and response: over 40 characters")
    ]
