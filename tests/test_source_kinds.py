"""Kinds of sources besides text and JSONL, and what a source makes depend on fields."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.implementations.memory
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ddk_jax.config import FilterConfig, SharedSourceConfig, SourceConfig
from ddk_jax.data import sources
from ddk_jax.data.sources import (
    Document,
    Reject,
    Turn,
    check_source,
    documents_of,
    files_of,
    pieces_of,
    read_piece,
)
from ddk_jax.data.sources.fields import domain_of, passes
from ddk_jax.errors import DataError, UserError


def read(source: SourceConfig) -> list[Document | Reject]:
    found: list[Document | Reject] = []
    for piece in pieces_of(source):
        for row in read_piece(piece, source):
            found += [row] if isinstance(row, Reject) else documents_of(row, piece.name, source)
    return found


def texts(source: SourceConfig) -> list[str]:
    return [item.text for item in read(source) if isinstance(item, Document)]


def rejects(source: SourceConfig) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for item in read(source) if isinstance(item, Reject)]


def write_parquet(path: Path, columns: dict[str, Any], rows: int = 7) -> SourceConfig:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return SourceConfig(path=str(path))


def test_parquet_is_read_by_row_groups_and_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"text": [f"row {i}" for i in range(20)], "large": [b"\xff" * 999] * 20}
    source = write_parquet(tmp_path / "a.parquet", columns)
    assert texts(source) == columns["text"]
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    pieces = list(pieces_of(source))
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 1), (1, 2), (2, 3)]
    assert [item.line for item in read(source)] == list(range(1, 21))
    [first, *_] = read_piece(pieces[1], source)
    assert first == sources.Row(8, {"text": "row 7"})


def test_bad_parquet_values_are_reported(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"caf\xe9", None, b"\0", b" "], pyarrow.binary())
    broken = pyarrow.StringArray.from_buffers(5, *raw.buffers()[1:], raw.buffers()[0])
    source = write_parquet(tmp_path / "a.parquet", {"text": broken})
    assert texts(source) == ["good"]
    assert rejects(source) == [
        (2, "text: invalid UTF-8 at byte 3"),
        (3, "column 'text' must be text, found null"),
        (4, "text: NUL at character 0"),
        (5, "text: empty or blank"),
    ]
    nested = write_parquet(tmp_path / "b.parquet", {"a": [{"b": {"c": "deep"}}], "text": ["top"]})
    assert texts(SourceConfig(path=nested.path, text="a.b.c")) == ["deep"]
    assert rejects(SourceConfig(path=nested.path, text="none")) == [(1, "column 'none' is missing")]


def test_a_cut_or_damaged_parquet_file_is_reported(tmp_path: Path) -> None:
    text = [str(np.random.default_rng(i).bytes(40)) for i in range(600)]
    source = write_parquet(tmp_path / "a.parquet", {"text": text}, rows=100)
    whole = Path(source.path).read_bytes()
    for damaged in (whole[:-50], b"", b"PAR1"):
        Path(source.path).write_bytes(damaged)
        [(line, reason)] = rejects(source)
        assert line == 1 and "cut off or damaged" in reason
    hurt = bytearray(whole)
    hurt[len(whole) // 2 : len(whole) // 2 + 400] = b"\xff" * 400
    Path(source.path).write_bytes(hurt)
    kept = texts(source)
    assert kept == text[: len(kept)] or rejects(source)


def write_records(path: Path, records: list[bytes]) -> SourceConfig:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return SourceConfig(path=str(path))


def test_array_records_are_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_records(tmp_path / "a.array_record", [b"%d x" % i for i in range(600)])
    assert texts(source) == [f"{i} x" for i in range(600)]
    assert texts(SourceConfig(path=str(tmp_path)))[-1] == "599 x"
    monkeypatch.setattr(sources, "PIECE_BYTES", 30_000)
    assert len(list(pieces_of(source))) > 1
    assert [item.line for item in read(source)] == list(range(1, 601))
    bad = write_records(tmp_path / "bad.array_record", [b"ok", b"\xff", b"\0", b" "])
    assert [line for line, _ in rejects(bad)] == [2, 3, 4]


def test_a_damaged_array_record_file_gives_what_comes_before(tmp_path: Path) -> None:
    records = [b"%d " % i + np.random.default_rng(i).bytes(200).hex().encode() for i in range(600)]
    source = write_records(tmp_path / "a.array_record", records)
    whole = Path(source.path).read_bytes()
    hurt = bytearray(whole)
    hurt[40_000:40_100] = b"x" * 100
    Path(source.path).write_bytes(hurt)
    kept = texts(source)
    assert kept == [record.decode() for record in records[: len(kept)]] and kept
    [(line, reason)] = rejects(source)
    assert line == len(kept) + 1 and "cut off or damaged" in reason
    Path(source.path).write_bytes(whole[: len(whole) // 2])
    assert [line for line, _ in rejects(source)] == [1]


def test_text_files_in_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for encoding in ("latin-1", "gb18030", "utf-16"):
        text = "na\xefve" if encoding == "latin-1" else "\u4f60\u597d"
        path.write_bytes(text.encode(encoding))
        assert texts(SourceConfig(path=str(path), encoding=encoding)) == [text]
    for encoding in ("utf-8", "utf-16-le", "utf-32-be", "gb18030"):
        path.write_bytes("\ufeffa".encode(encoding))
        assert texts(SourceConfig(path=str(path), encoding=encoding)) == ["a"]
    path.write_bytes(b"\x81")
    [(_, reason)] = rejects(SourceConfig(path=str(path), encoding="gb18030"))
    assert reason == "invalid gb18030 at byte 0"
    with pytest.raises(UserError, match="encoding nothing"):
        check_source(SourceConfig(path="x", encoding="nothing"))
    for encoding in ("base64", "undefined"):
        with pytest.raises(UserError, match=f"encoding {encoding}"):
            check_source(SourceConfig(path="x", encoding=encoding))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.json", "one JSON object a line"),
        ("a.json.gz", "one JSON object a line"),
        ("a.csv", "JSON lines or Parquet"),
        ("a.CSV.xz", "JSON lines or Parquet"),
        ("a.jsonl.bz2", "gzip, xz or zstd"),
        ("a.tar.gz", "unpack it"),
    ],
)
def test_files_that_are_neither_text_nor_rows_are_refused_with_advice(
    tmp_path: Path, name: str, advice: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=advice):
        list(pieces_of(SourceConfig(path=str(tmp_path / name))))
    (tmp_path / "a.md").write_text("text")
    assert texts(SourceConfig(path=str(tmp_path))) == ["text"]


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def test_conversations_and_why_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = [
        ("x", "must be a list of messages, found str"),
        ([], "must be a list of messages, found list"),
        (["x"], "m[0] must have role and content, found str"),
        ([{"role": "user", "content": "Hi"}], "the assistant says nothing"),
        ([{"role": "tool", "content": "Hi"}], "m[0]: role 'tool' is not one of"),
        ([*CHAT, {"role": "user"}], "column 'm[2].content' is missing"),
        ([*CHAT, {"role": "user", "content": " "}], "m[2].content: empty or blank"),
        ([*CHAT, {"role": "user", "content": 5}], "must be text, found int"),
        ([*CHAT, {"role": "user", "content": "\0"}], "NUL at character 0"),
    ]
    rows = [{"m": CHAT}, *({"m": value} for value, _ in bad), {}]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = SourceConfig(path=str(path), messages="m")
    first, *others = read(source)
    assert isinstance(first, Document)
    assert first.turns == (Turn("user", "Hi"), Turn("assistant", "Yo"))
    assert first.num_bytes == 4
    reasons = [item.reason for item in others if isinstance(item, Reject)]
    assert len(reasons) == len(bad) + 1
    for reason, (_, expected) in zip(reasons, bad, strict=False):
        assert expected in reason
    assert reasons[-1] == "column 'm' is missing"


COLUMNS = {"meta": {"lang": "en", "score": 0.5, "ok": True}, "text": "hello", "n": 1}


@pytest.mark.parametrize(
    ("field", "test", "value", "passed"),
    [
        ("meta.lang", "equals", "en", True),
        ("meta.lang", "equals", "de", False),
        ("meta.ok", "equals", True, True),
        ("n", "equals", True, False),
        ("meta.lang", "in", ["de", "en"], True),
        ("meta.lang", "not_in", ["de", "en"], False),
        ("meta.lang", "matches", "e?", True),
        ("@file", "matches", "*/python/*", True),
        ("meta.score", "at_least", 0.5, True),
        ("meta.score", "at_most", 0.4, False),
        ("text", "min_chars", 6, False),
        ("text", "max_chars", 5, True),
    ],
)
def test_a_filter_passes_what_it_says(field: str, test: Any, value: Any, passed: bool) -> None:
    filters = (FilterConfig(field=field, test=test, value=value),)
    assert passes(filters, COLUMNS, "data/python/a.parquet") == passed


@pytest.mark.parametrize(
    ("field", "test", "value", "message"),
    [
        ("meta.none", "equals", 1, "field 'meta.none' is missing"),
        ("text", "at_least", 1, "must be a number for the filter at_least, found str"),
        ("meta.ok", "at_least", 1, "must be a number for the filter at_least, found bool"),
        ("meta", "max_chars", 1, "must be text for the filter max_chars, found dict"),
    ],
)
def test_a_field_that_does_not_fit_its_filter_is_a_bad_row(
    field: str, test: Any, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        passes((FilterConfig(field=field, test=test, value=value),), COLUMNS, "")


@pytest.mark.parametrize(
    ("test", "value"), [("in", "en"), ("in", []), ("at_least", "1"), ("matches", 1), ("equals", [])]
)
def test_a_filter_that_cannot_be_meant_is_refused(test: Any, value: Any) -> None:
    source = SourceConfig(path="x", filters=(FilterConfig(field="f", test=test, value=value),))
    with pytest.raises(UserError, match=f"source x: the filter {test} on f needs"):
        check_source(source)


def test_the_domain_of_a_row_follows_from_a_field() -> None:
    shared = SharedSourceConfig(
        source=SourceConfig(path="x"),
        field="meta.lang",
        domains={"en": "english", "z*": "chinese"},
    )
    assert domain_of(shared, COLUMNS, "") == "english"
    assert domain_of(shared, {"meta": {"lang": b"zh"}}, "") == "chinese"
    assert domain_of(shared, {"meta": {"lang": "fr"}}, "") == ""
    for columns, message in (({}, "missing"), ({"meta": {"lang": None}}, "found null")):
        with pytest.raises(ValueError, match=message):
            domain_of(shared, columns, "")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What `gs://` leads to: files in memory."""
    from etils.epath import backend

    class Memory(fsspec.implementations.memory.MemoryFileSystem):
        store: dict[str, Any] = {}  # noqa: RUF012
        pseudo_dirs: list[str] = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("gs://"))

    memory = Memory(skip_instance_cache=True)
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda *_: memory)
    yield memory
    Memory.store.clear()


def test_a_bucket_is_read_like_a_folder(bucket: Any, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["in", "a", "table"]})
    bucket.pipe("/b/data/a.parquet", (tmp_path / "a.parquet").read_bytes())
    bucket.pipe("/b/data/sub/b.jsonl", b'{"text": "line"}\n{"text": 1}')
    bucket.pipe("/b/data/c.txt", b"text")
    source = SourceConfig(path="gs://b/data")
    assert [file.name for file in files_of(source)] == [
        "gs://b/data/a.parquet",
        "gs://b/data/c.txt",
        "gs://b/data/sub/b.jsonl",
    ]
    assert texts(source) == ["in", "a", "table", "text", "line"]
    assert texts(SourceConfig(path="gs://b/data/*.txt")) == ["text"]
    assert [sources.file_size(file.path) for file in files_of(source)][1] == 4
    with pytest.raises(DataError, match="no such file"):
        files_of(SourceConfig(path="gs://b/none.txt"))
    with pytest.raises(DataError, match="does not work in a bucket"):
        files_of(SourceConfig(path="gs://b/**/*.txt"))


def test_a_bucket_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from etils.epath import backend

    def missing(*_: object) -> None:
        raise ImportError("install gcsfs")

    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", missing)
    with pytest.raises(DataError, match=r"needs pip install 'ddk_jax\[gcs\]'"):
        files_of(SourceConfig(path="gs://b/data"))


def test_hugging_face_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'ddk_jax\[hf-datasets\]'"):
        list(pieces_of(SourceConfig(path=f"hf:{tmp_path}")))
    with pytest.raises(DataError, match="pin its commit"):
        list(pieces_of(SourceConfig(path="hf:owner/name")))


class FakeSet:
    """As much of an `IterableDataset` as is used."""

    num_shards = 2

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def shard(self, num_shards: int, index: int) -> Iterator[dict[str, Any]]:
        yield from self.rows[index::num_shards]
        if index:
            raise RuntimeError("connection lost")


def test_hugging_face_sets_are_streamed_by_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def load(name: str, **options: Any) -> FakeSet:
        asked.update(options, name=name)
        return FakeSet([{"text": f"{i}"} for i in range(4)])

    fake = types.SimpleNamespace(
        load_dataset=load, exceptions=types.SimpleNamespace(DatasetsError=RuntimeError)
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = SourceConfig(path="hf:owner/name", revision="abc", split="test")
    assert texts(source) == ["0", "2", "1", "3"]
    assert asked == {"name": "owner/name", "split": "test", "streaming": True, "revision": "abc"}
    assert rejects(source) == [(3, "cannot be read further: connection lost")]
    assert files_of(source) == []
    (tmp_path / "a.jsonl").write_text("{}")
    assert [f.name for f in files_of(SourceConfig(path=f"hf:{tmp_path}"))] == [
        f"{tmp_path}/a.jsonl"
    ]


def test_hugging_face_folders_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"row {i}", "meta": {"n": i}} for i in range(30)]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for name in ("lines", "saved"):
        assert texts(SourceConfig(path=f"hf:{tmp_path}/{name}")) == [row["text"] for row in rows]
    with pytest.raises(DataError, match="hf:"):
        list(pieces_of(SourceConfig(path=f"hf:{tmp_path}/lines", split="none")))
