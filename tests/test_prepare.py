"""Prepared data: what is written, that it is whole, and that bad input cannot change it."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ddk_jax.config import (
    DataConfig,
    DomainConfig,
    FilterConfig,
    SharedSourceConfig,
    SourceConfig,
)
from ddk_jax.data import assemble, convert, merge, sources
from ddk_jax.data.prepare import prepare
from ddk_jax.data.rows import open_rows
from ddk_jax.data.shards import Manifest, checked_name, open_shards, read_manifest
from ddk_jax.data.tokenize import Tokenizer, same_tokens
from ddk_jax.data.workers import Pool
from ddk_jax.errors import DataError, StorageError, UserError

END = "<|endoftext|>"
WORDS = "the a cat dog runs over under blue green one two three four of and then".split()


def text(number: int, length: int = 12) -> str:
    rng = np.random.default_rng(number)
    return f"{number} " + " ".join(rng.choice(WORDS, length))


def train_tokenizer(vocabulary: int = 300) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(i) for i in range(50)], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    return path


@pytest.fixture
def config(tmp_path: Path, tokenizer_dir: Path) -> DataConfig:
    """Two domains; the second is prompts with responses."""
    write_rows(tmp_path / "a.jsonl", [text(i) for i in range(60)])
    rows = [{"q": f"what is {i}?", "a": f"it is {text(i, 3)}"} for i in range(40)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(
        dir=str(tmp_path / "data"),
        tokenizer=str(tokenizer_dir),
        validation_fraction=0.2,
        domains=(
            DomainConfig(name="a", sources=(SourceConfig(path=str(tmp_path / "a.jsonl")),)),
            DomainConfig(
                name="b",
                sources=(
                    SourceConfig(
                        path=str(tmp_path / "b.jsonl"), prompt="q", response="a", licence="CC0-1.0"
                    ),
                ),
            ),
        ),
    )


def run(config: DataConfig) -> tuple[Manifest, list[str]]:
    lines: list[str] = []
    return prepare(config, progress=lines.append), lines


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def documents(config: DataConfig, domain: str, split: Any) -> list[tuple[list[int], list[int]]]:
    """Ids of each document, and its turns."""
    directory = Path(config.dir)
    found = []
    for shard in open_shards(directory, read_manifest(directory), domain, split, verify=True):
        for start, stop in pairwise(shard.offsets.tolist()):
            # A turn at the end of one document and the start of the next may be at one place.
            inside = (shard.turns > start) & (shard.turns <= stop)
            turns = (shard.turns[inside] - start).tolist()
            found.append((shard.tokens[start:stop].tolist(), turns))
    return found


def test_shards_hold_every_document_once_with_its_end_token(config: DataConfig) -> None:
    manifest, _ = run(config)
    assert read_manifest(Path(config.dir)) == manifest
    tokenizer = Tokenizer(Path(config.tokenizer))
    found = {}
    for split in ("train", "validation"):
        for ids, turns in documents(config, "a", split):
            assert ids[-1] == tokenizer.end_id
            assert turns == []
            found[tokenizer.decode(ids[:-1])] = split
    expected = {
        text(i): "validation"
        if int.from_bytes(hashlib.sha256(text(i).encode()).digest()[:8], "big") < 0.2 * 2**64
        else "train"
        for i in range(60)
    }
    assert found == expected
    info = manifest.domains[0]
    assert info.train.documents + info.validation.documents == 60
    assert info.train.bytes + info.validation.bytes == sum(len(text(i)) for i in range(60))
    keys = [
        hashlib.sha256(tokenizer.decode(ids[:-1]).encode()).digest()[8:16]
        for ids, _ in documents(config, "a", "train")
    ]
    assert keys == sorted(keys)


def test_prompts_and_responses(config: DataConfig) -> None:
    manifest, _ = run(config)
    tokenizer = Tokenizer(Path(config.tokenizer))
    for ids, [prompt, end] in documents(config, "b", "train"):
        assert end == len(ids)
        assert tokenizer.decode(ids[:prompt]).startswith("what is ")
        assert tokenizer.decode(ids[:prompt]).endswith("?")
        assert tokenizer.decode(ids[prompt:]).startswith("it is ")
        assert tokenizer.decode(ids[prompt:]).endswith(END)
    [source] = manifest.domains[1].sources
    assert (source.licence, source.documents) == ("CC0-1.0", 40)
    [a, b] = open_rows(Path(config.dir), "train", 16)
    assert (a.name, a.domain, b.name, b.domain) == ("a", 0, "b", 1)
    roles = b[0].role
    assert set(roles.tolist()) == {1, 2}
    assert set(a[0].role.tolist()) == {1}


def test_multiple_choice_rows_become_prompts_and_responses(
    config: DataConfig, tmp_path: Path
) -> None:
    rows = [{"query": f"what is {i}?", "choices": ["no", text(i, 3)], "gold": 1} for i in range(40)]
    suffix = {"query": "I saw ", "choices": ["Al", "Bo"], "gold": 1, "suffix": "run"}
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, [*rows, suffix, {"query": "?"}])))
    source = SourceConfig(path=str(tmp_path / "b.jsonl"))
    domain = DomainConfig(name="b", sources=(source,))
    config = dataclasses.replace(config, domains=(domain,), max_rejected_fraction=0.1)
    manifest, _ = run(config)
    assert manifest.domains[0].left_out.rejected == 1
    tokenizer = Tokenizer(Path(config.tokenizer))
    splits = documents(config, "b", "train") + documents(config, "b", "validation")
    found = {tokenizer.decode(ids[:n]): tokenizer.decode(ids[n:]) for ids, [n, _] in splits}
    expected = {row["query"]: f" {row['choices'][1]}{END}" for row in rows}
    assert found == expected | {"I saw Bo": f" run{END}"}


def test_bytes_are_the_same_again_and_elsewhere(config: DataConfig, tmp_path: Path) -> None:
    run(config)
    run(dataclasses.replace(config, dir=str(tmp_path / "other")))
    assert contents(tmp_path / "data") == contents(tmp_path / "other")


def test_the_same_inputs_are_not_prepared_twice_and_others_are(
    config: DataConfig, tmp_path: Path
) -> None:
    manifest, _ = run(config)
    stamp = (tmp_path / "data/manifest.json").stat().st_mtime_ns
    again, lines = run(config)
    assert again == manifest
    assert lines[-1].endswith("is up to date")
    assert (tmp_path / "data/manifest.json").stat().st_mtime_ns == stamp
    changed, lines = run(dataclasses.replace(config, validation_fraction=0.5))
    assert lines[-1].startswith("wrote")
    assert changed.inputs_digest != manifest.inputs_digest
    write_rows(tmp_path / "a.jsonl", [text(i) for i in range(61)])
    grown, lines = run(config)
    assert lines[-1].startswith("wrote")
    assert grown.domains[0].train.documents + grown.domains[0].validation.documents == 61
    (tmp_path / "data/a/train-00000-of-00001.tokens.npy").unlink()
    _, lines = run(config)
    assert lines[-1].startswith("wrote")


def test_adding_documents_moves_none_to_the_other_side(config: DataConfig, tmp_path: Path) -> None:
    run(config)
    before = {split: documents(config, "a", split) for split in ("train", "validation")}
    write_rows(tmp_path / "a.jsonl", [text(i) for i in range(200, 0, -1)] + [text(0)])
    run(config)
    for split, known in before.items():
        now = {tuple(ids) for ids, _ in documents(config, "a", split)}
        assert {tuple(ids) for ids, _ in known} < now


BAD_ROWS = (
    b'{"text": "caf\xe9"}',
    b'{"text": "a \\ud800 b"}',
    b'{"text": "a\\u0000b"}',
    b'{"text": "  "}',
    b'{"txt": "x"}',
    b'{"text": 1}',
    b'{"text": "cut',
)


def test_bad_rows_are_listed_and_change_no_token(config: DataConfig, tmp_path: Path) -> None:
    run(config)
    clean = contents(tmp_path / "data")
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines()
    for i, bad in enumerate(BAD_ROWS):
        lines.insert(9 * i, bad)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    manifest, _ = run(dataclasses.replace(config, max_rejected_fraction=0.2))
    dirty = contents(tmp_path / "data")
    for name in clean:
        assert name in ("manifest.json", "rejects.jsonl") or dirty[name] == clean[name]
    assert manifest.domains[0].left_out.rejected == len(BAD_ROWS)
    listed = [json.loads(line) for line in dirty["rejects.jsonl"].splitlines()]
    assert [row["line"] for row in listed] == [9 * i + 1 for i in range(len(BAD_ROWS))]
    assert {row["file"] for row in listed} == {str(tmp_path / "a.jsonl")}
    assert {row["domain"] for row in listed} == {"a"}
    assert all(row["reason"] for row in listed)


def test_too_many_bad_rows_are_refused_and_listed(config: DataConfig, tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("ab") as stream:
        stream.write(b"{}\n" * 2)
    with pytest.raises(DataError, match=r"domain a: 2 of 62 .*3\.2%.*is 1\.0%.*rejects\.jsonl"):
        run(config)
    assert not (tmp_path / "data").exists()
    listed = (tmp_path / "data.rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in listed] == [61, 62]
    manifest, _ = run(dataclasses.replace(config, max_rejected_fraction=0.05))
    assert manifest.domains[0].left_out.rejected == 2


def test_exact_duplicates_are_dropped_within_and_across_domains(
    config: DataConfig, tmp_path: Path
) -> None:
    rows = [text(i) for i in (*range(60), 3, 3, 4)]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "c.jsonl", [text(i) for i in range(50, 90)])
    extra = DomainConfig(name="c", sources=(SourceConfig(path=str(tmp_path / "c.jsonl")),))
    manifest, _ = run(dataclasses.replace(config, domains=(*config.domains, extra)))
    assert [domain.left_out.duplicates for domain in manifest.domains] == [3, 0, 10]
    seen = [
        tuple(ids)
        for domain in ("a", "c")
        for split in ("train", "validation")
        for ids, _ in documents(config, domain, split)
    ]
    assert len(seen) == len(set(seen)) == 90


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_two_documents_are_one_for_each_split(
    config: DataConfig, tmp_path: Path, fraction: float
) -> None:
    write_rows(tmp_path / "a.jsonl", [text(1), text(2)])
    write_rows(tmp_path / "c.jsonl", [text(i) for i in range(10, 20)])
    domain = DomainConfig(name="c", sources=(SourceConfig(path=str(tmp_path / "c.jsonl")),))
    config = dataclasses.replace(
        config, domains=(config.domains[0], domain), validation_fraction=fraction
    )
    manifest, _ = run(config)
    assert manifest.domains[0].train.documents == manifest.domains[0].validation.documents == 1
    tokenizer = Tokenizer(Path(config.tokenizer))
    found = {
        split: [tokenizer.decode(ids[:-1]) for ids, _ in documents(config, "c", split)]
        for split in ("train", "validation")
    }
    ordered = sorted((hashlib.sha256(text(i).encode()).digest(), i) for i in range(10, 20))
    cut = 1 if fraction < 0.5 else 9
    held_out = {i for _, i in ordered[:cut]}
    assert set(found["validation"]) == {text(i) for i in held_out}
    assert set(found["train"]) == {text(i) for i in range(10, 20) if i not in held_out}


def test_one_document_is_refused_with_advice(config: DataConfig, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [text(1), text(1)])
    with pytest.raises(DataError, match=r"domain a: 1 usable documents.*cut the text"):
        run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_special_tokens_in_text_stay_text(config: DataConfig, tmp_path: Path) -> None:
    hostile = [f"{text(i)} {END} <|user|> hi" for i in range(5)]
    write_rows(tmp_path / "a.jsonl", hostile)
    run(config)
    tokenizer = Tokenizer(Path(config.tokenizer))
    control = {tokenizer.vocabulary[END], tokenizer.vocabulary["<|user|>"]}
    for split in ("train", "validation"):
        for ids, _ in documents(config, "a", split):
            assert not control & set(ids[:-1])
            assert tokenizer.decode(ids[:-1]) in hostile


def test_a_killed_run_leaves_nothing_that_looks_whole(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal, sys\n"
        "from ddk_jax.config import DataConfig, DomainConfig, SourceConfig\n"
        "from ddk_jax.data import prepare\n"
        "prepare._replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare.prepare({config!r}, progress=print)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert done.returncode == -9
    assert not (tmp_path / "data").exists()
    assert (tmp_path / ".data.partial/out/manifest.json").exists()
    run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "data"]


def test_an_error_on_the_way_keeps_what_was_there(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)
    before = contents(tmp_path / "data")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(assemble.merge, "write_shard", full)
        with pytest.raises(StorageError, match=r"data: cannot be written \(No space left.*goes on"):
            run(dataclasses.replace(config, validation_fraction=0.5))
    assert contents(tmp_path / "data") == before
    _, lines = run(dataclasses.replace(config, validation_fraction=0.5))
    assert "going on: 2 of 2 parts were finished" in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "data"]


def test_two_at_once_are_refused(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / ".data.partial").mkdir()
    held = os.open(tmp_path / ".data.partial", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another process is preparing it"):
            run(config)
    finally:
        os.close(held)
    run(config)


def test_a_directory_of_something_else_is_not_touched(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    run(config)  # an empty one is fine
    for name, content in (("thesis.tex", "mine"), ("manifest.json", '{"name": "my web app"}')):
        other = tmp_path / name.split(".")[0]
        other.mkdir()
        (other / name).write_text(content)
        with pytest.raises(StorageError, match="something else than prepared data"):
            run(dataclasses.replace(config, dir=str(other)))
        assert contents(other) == {name: content.encode()}


def edit(config: DataConfig, **changes: object) -> DataConfig:
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: edit(c, domains=()), "at least one domain"),
        (lambda c: edit(c, tokenizer=""), "data.tokenizer"),
        (lambda c: edit(c, tokenizer="nowhere"), "nowhere.*no such file"),
        (lambda c: edit(c, validation_fraction=0.0), "not between 0 and 1"),
        (lambda c: edit(c, domains=(edit(c.domains[0], max_tokens=-1),)), "a limit is negative"),
        (lambda c: edit(c, domains=(c.domains[0], c.domains[0])), "used twice"),
        (lambda c: edit(c, domains=(edit(c.domains[0], name="../a"),)), "domain name '../a'"),
        (lambda c: edit(c, domains=(edit(c.domains[0], sources=()),)), "at least one source"),
        (
            lambda c: edit(
                c, domains=(edit(c.domains[0], sources=(SourceConfig(path="x", prompt="q"),)),)
            ),
            "prompt and response",
        ),
    ],
)
def test_options_that_cannot_be_meant(
    config: DataConfig, change: Callable[[Any], DataConfig], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(change(config))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "/a", "a\\b", "-a", "tokenizer", "manifest.json", "a\n", "x" * 101],
)
def test_names_that_are_no_plain_folder(name: str) -> None:
    with pytest.raises(DataError, match="domain name"):
        checked_name(name)


def test_damage_is_found(config: DataConfig, tmp_path: Path) -> None:
    manifest, _ = run(config)
    data = tmp_path / "data"
    tokens = data / "a/train-00000-of-00001.tokens.npy"
    whole = tokens.read_bytes()

    def opened(verify: bool = False) -> None:
        open_shards(data, read_manifest(data), "a", "train", verify=verify)

    opened(verify=True)
    with pytest.raises(DataError, match="no domain 'z'; there are a, b"):
        open_shards(data, manifest, "z", "train")
    for damaged in (b"", whole[:50], whole[:-2], b"\0" * len(whole)):
        tokens.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-00000-of-00001\.tokens\.npy"):
            opened()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    tokens.write_bytes(bytes(flipped))
    with pytest.raises(DataError, match=r"does not have the content"):
        opened(verify=True)
    np.save(tokens, np.asarray([{"an": "object"}], dtype=object))
    with pytest.raises(DataError, match="damaged"):
        opened()
    tokens.unlink()
    with pytest.raises(DataError, match="missing; run ddk prepare again"):
        opened()


def test_ids_outside_the_vocabulary_are_found(config: DataConfig, tmp_path: Path) -> None:
    manifest, _ = run(config)
    tokens = tmp_path / "data/a/train-00000-of-00001.tokens.npy"
    array = np.load(tokens)
    array[7] = manifest.tokenizer.vocab_size
    np.save(tokens, array)
    tree = json.loads((tmp_path / "data/manifest.json").read_text())
    digest = hashlib.sha256(tokens.read_bytes()).hexdigest()
    tree["domains"][0]["train"]["shards"][0]["files"]["train-00000-of-00001.tokens.npy"] = digest
    (tmp_path / "data/manifest.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="outside the vocabulary"):
        open_shards(tmp_path / "data", read_manifest(tmp_path / "data"), "a", "train", verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(version=99), "format version 99"),
        (lambda t: t.update(format="other"), "not a manifest"),
        (lambda t: t.update(unknown=1), "damaged"),
        (lambda t: t.pop("tokenizer"), "damaged"),
        (lambda t: t["domains"][0].update(name="../../etc"), "domain name"),
        (lambda t: t["domains"][0]["train"]["shards"][0].update(files={"../x": "0"}), "damaged"),
        (lambda t: t["domains"][0].pop("validation"), "damaged"),
    ],
)
def test_a_foreign_or_damaged_manifest_is_refused(
    config: DataConfig, tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    run(config)
    path = tmp_path / "data/manifest.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path / "data")


def test_no_manifest_and_a_torn_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run ddk prepare"):
        read_manifest(tmp_path / "none")
    (tmp_path / "manifest.json").write_text('{"format": ')
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path)


def test_another_tokenizer_in_the_same_place_is_seen(config: DataConfig, tmp_path: Path) -> None:
    first, _ = run(config)
    train_tokenizer(280).save(str(tmp_path / "tokenizer.json"))
    second, _ = run(dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json")))
    assert second.tokenizer.digest != first.tokenizer.digest
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    texts = {tokenizer.decode(ids[:-1]) for ids, _ in documents(config, "a", "train")}
    assert texts <= {text(i) for i in range(60)}


def test_tokenizer_digest_ignores_layout_and_sees_content(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    original = Tokenizer(tokenizer_dir)
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    shuffled = dict(reversed(content.items()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(shuffled, indent=3, ensure_ascii=True))
    # Without a configuration beside it: a special token of a known name.
    again = Tokenizer(tmp_path / "tokenizer.json")
    assert (again.digest, again.end_id) == (original.digest, original.end_id)
    assert same_tokens(original, again) == []
    shuffled["model"]["merges"] = shuffled["model"]["merges"][:-5]
    (tmp_path / "tokenizer.json").write_text(json.dumps(shuffled))
    fewer = Tokenizer(tmp_path)
    assert fewer.digest != original.digest
    assert fewer.vocab_size == original.vocab_size


def test_same_tokens_names_the_first_differences(tokenizer_dir: Path, tmp_path: Path) -> None:
    one = Tokenizer(tokenizer_dir)
    train_tokenizer(280).save(str(tmp_path / "tokenizer.json"))
    smaller = Tokenizer(tmp_path)
    found = same_tokens(one, smaller)
    assert found[0] == "vocabulary of 300 against 280"
    assert len(found) == 5
    assert all("against None" in line for line in found[1:])
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    [*differences] = same_tokens(one, Tokenizer(tmp_path))
    assert differences
    assert all(" becomes " in line for line in differences)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|user|>"}}')
    assert same_tokens(one, Tokenizer(tmp_path))[0] == (
        "end token '<|endoftext|>' (id 0) against '<|user|>' (id 1)"
    )


def test_tokenizers_that_cannot_be_used(tokenizer_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    for raw, message in (
        ("not json", "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
        (json.dumps({**content, "added_tokens": []}), "no end token; name it as eos_token"),
        (json.dumps({**content, "model": {}}), "not a tokenizer"),
    ):
        file.write_text(raw)
        with pytest.raises(DataError, match=message):
            Tokenizer(tmp_path)
    file.write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    with pytest.raises(DataError, match="'<stop>' is not in the vocabulary"):
        Tokenizer(tmp_path)


def test_truncation_and_padding_of_the_file_are_ignored(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    long, short = Tokenizer(tmp_path).encode([text(1, 40), "a"])
    assert (long.size > 40, short.size) == (True, 1)
    assert long.dtype == np.uint32


def test_text_that_becomes_the_end_token_or_nothing_is_rejected(
    config: DataConfig, tmp_path: Path
) -> None:
    """A vocabulary of words in which the end token is an ordinary word."""
    vocabulary = {word: i for i, word in enumerate(["stop", "[UNK]", *WORDS])}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.normalizer = tokenizers.normalizers.Replace("gone", "")
    folder = tmp_path / "words"
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "stop"}')
    write_rows(tmp_path / "a.jsonl", ["the cat", "a dog", "the dog", "stop the dog", "gone"])
    manifest, _ = run(
        dataclasses.replace(
            config,
            tokenizer=str(folder),
            domains=config.domains[:1],
            max_rejected_fraction=0.5,
        )
    )
    assert manifest.domains[0].left_out.rejected == 2
    listed = [json.loads(x) for x in (tmp_path / "data/rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in listed] == [
        (4, "the tokenizer takes a part of it for the end token"),
        (5, "the tokenizer makes no token of it"),
    ]


def corpus(config: DataConfig, tmp_path: Path, count: int = 400) -> DataConfig:
    """Many small text files, a table, compressed lines and pairs; some of it twice, some broken."""
    first = 1000  # the domains of the fixture hold lower numbers
    (tmp_path / "texts").mkdir()
    for i in range(count):
        (tmp_path / f"texts/{i}.txt").write_bytes(
            b"\xff" if i % 97 == 0 else text(first + i).encode()
        )
    lines = [json.dumps({"text": text(first + i)}) for i in range(count // 2, count)]
    whole = gzip.compress("\n".join(lines).encode())
    (tmp_path / "lines.jsonl.gz").write_bytes(whole[:-9])
    table = pyarrow.table({"text": [text(first + i, 90) for i in range(count)]})
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet", row_group_size=50)
    texts, table, lines = (
        DomainConfig(name=name.split(".")[0], sources=(SourceConfig(path=str(tmp_path / name)),))
        for name in ("texts", "table.parquet", "lines.jsonl.gz")
    )
    write_rows(tmp_path / "extra.jsonl", [text(i) for i in range(5000, 5050)])
    extra = (*lines.sources, SourceConfig(path=str(tmp_path / "extra.jsonl")))
    return dataclasses.replace(
        config,
        max_rejected_fraction=0.5,
        domains=(texts, table, dataclasses.replace(lines, sources=extra), *config.domains),
    )


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tasks, runs, ranges of keys and shards."""
    monkeypatch.setattr(convert, "_TASK_BYTES", 2000)
    monkeypatch.setattr(sources, "PIECE_BYTES", 3000)
    monkeypatch.setattr(merge, "_BUCKET_DOCUMENTS", 64)
    monkeypatch.setattr(assemble, "SHARD_TOKENS", 1000)
    small_runs = functools.partial(convert.Workshop, run_bytes=4000)
    monkeypatch.setattr(assemble, "Workshop", small_runs)


def streams(config: DataConfig) -> dict[tuple[str, str], list[tuple[list[int], list[int]]]]:
    names = read_manifest(Path(config.dir)).names
    return {
        (name, split): documents(config, name, split)
        for name in names
        for split in ("train", "validation")
    }


@pytest.mark.slow
def test_how_the_work_is_cut_changes_nothing_but_the_number_of_shards(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = corpus(config, tmp_path)
    whole, _ = run(config)
    expected, rows = streams(config), open_rows(tmp_path / "data", "train", 33)
    small = dataclasses.replace(config, dir=str(tmp_path / "small"))
    small_parts(monkeypatch)
    manifest, _ = run(small)
    assert streams(small) == expected
    assert len(manifest.domains[1].train.shards) > 8
    assert manifest.leaks == whole.leaks
    for one, other in zip(rows, open_rows(tmp_path / "small", "train", 33), strict=True):
        assert len(one) == len(other)
        for i in range(0, len(one), 7):
            for a, b in zip(one[i], other[i], strict=True):
                np.testing.assert_array_equal(a, b)
    assert (
        contents(tmp_path / "data")["rejects.jsonl"]
        == (contents(tmp_path / "small")["rejects.jsonl"])
    )
    assert [domain.left_out for domain in manifest.domains] == [
        domain.left_out for domain in whole.domains
    ]


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_TASK_BYTES", 8000)
    config = corpus(config, tmp_path)
    run(config)
    other = dataclasses.replace(config, dir=str(tmp_path / "other"))
    prepare(other, progress=lambda _: None, workers=3)
    assert contents(tmp_path / "data") == contents(tmp_path / "other")


KILLED = """
import os, signal, sys, threading
from ddk_jax.config import *
from ddk_jax.data import assemble, convert, merge, prepare

count, limit = 0, int(sys.argv[1])
convert._TASK_BYTES = 2000
assemble.SHARD_TOKENS = 1000

def dying(function):
    def wrapped(*args, **kwargs):
        global count
        count += 1
        if count == limit:
            # At any moment within what this call does.
            threading.Timer(0.0005 * (limit % 7), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*args, **kwargs)
    return wrapped

assemble.convert = dying(convert.convert)
merge.write_shard = dying(merge.write_shard)
prepare._replace = dying(prepare._replace)
prepare.prepare(CONFIG, progress=print)
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = corpus(config, tmp_path, count=200)
    killed = dataclasses.replace(config, dir=str(tmp_path / "killed"))
    code, seen = KILLED.replace("CONFIG", repr(killed)), []
    for limit in (9, 17, 30, 100_000):
        command = [sys.executable, "-c", code, str(limit)]
        done = subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)
        seen.append(done.stdout)
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        assert not (tmp_path / "killed").exists()
    assert any("going on" in said for said in seen[1:])
    monkeypatch.setattr(assemble, "SHARD_TOKENS", 1000)
    run(config)
    assert contents(tmp_path / "data") == contents(tmp_path / "killed")
    assert not list(tmp_path.glob(".*"))


def test_a_worker_that_is_killed_is_an_error() -> None:
    with Pool(2) as pool, pytest.raises(StorageError, match="a worker was killed"):
        list(pool.run(_die, [1, 2, 3], lambda _: None))


def _die(_: int) -> None:
    os.kill(os.getpid(), 9)


def one_domain(config: DataConfig, **changes: Any) -> DataConfig:
    return dataclasses.replace(config, domains=(dataclasses.replace(config.domains[0], **changes),))


def sided(config: DataConfig) -> set[tuple[str, tuple[int, ...]]]:
    """The documents of domain a, each with its split."""
    return {
        (split, tuple(ids))
        for split in ("train", "validation")
        for ids, _ in documents(config, "a", split)
    }


def test_limits_keep_the_same_documents_and_move_none(config: DataConfig, tmp_path: Path) -> None:
    run(one_domain(config))
    everything = sided(config)
    kept: set[Any] = set()
    for limit in (12, 30):
        manifest, _ = run(one_domain(config, max_documents=limit))
        [info] = manifest.domains
        assert info.train.documents + info.validation.documents == limit
        assert info.left_out.over_limit == 60 - limit
        now = sided(config)
        assert kept <= now <= everything
        kept = now
    manifest, _ = run(one_domain(config, max_tokens=400))
    [info] = manifest.domains
    assert 300 < info.train.tokens + info.validation.tokens <= 400
    assert sum(one.documents for one in info.sources) + info.left_out.over_limit == 60


def test_filters_leave_rows_out_and_count_them(config: DataConfig, tmp_path: Path) -> None:
    rows = [{"text": text(i), "meta": {"lang": "en" if i % 3 else "de"}} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": "x"}])))
    test = FilterConfig(field="meta.lang", test="equals", value="en")
    source = dataclasses.replace(config.domains[0].sources[0], filters=(test,))
    config = dataclasses.replace(config, max_rejected_fraction=0.1)
    manifest, _ = run(one_domain(config, sources=(source,)))
    [info] = manifest.domains
    assert (info.left_out.filtered, info.left_out.rejected) == (20, 1)
    assert info.train.documents + info.validation.documents == 40
    [reject] = (tmp_path / "data/rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["reason"] == "field 'meta.lang' is missing"


def test_one_source_is_divided_among_domains_by_a_field(config: DataConfig, tmp_path: Path) -> None:
    names = ["RedPajamaC4", "RedPajamaBook", "Else"]
    rows = [{"text": text(i), "meta": {"set": names[i % 3]}} for i in range(90)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": "x"}])))
    shared = SharedSourceConfig(
        source=SourceConfig(path=str(tmp_path / "mixed.jsonl"), licence="various"),
        field="meta.set",
        domains={"RedPajamaC4": "c4", "*Book": "book"},
    )
    more = SourceConfig(path=str(tmp_path / "a.jsonl"))
    config = dataclasses.replace(
        config,
        max_rejected_fraction=0.5,
        domains=(DomainConfig(name="c4"), DomainConfig(name="book", sources=(more,))),
        shared=(shared,),
    )
    manifest, _ = run(config)
    c4, book = manifest.domains
    assert [(one.path, one.documents) for one in c4.sources] == [(shared.source.path, 30)]
    # 20 of the 60 in a.jsonl belong to c4, which comes first; 20 are in both of book's sources.
    assert [one.documents for one in book.sources] == [40, 10]
    assert book.left_out.duplicates == 40
    assert manifest.not_routed == {shared.source.path: 30}
    [reject] = (tmp_path / "data/rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["domain"] == ""
    with pytest.raises(DataError, match="shared sources: 1 of"):
        run(dataclasses.replace(config, max_rejected_fraction=0.0))
    with pytest.raises(UserError, match="no domain is called book"):
        run(dataclasses.replace(config, domains=config.domains[:1]))


def test_a_near_copy_of_validation_text_in_training_is_reported(
    config: DataConfig, tmp_path: Path
) -> None:
    long = [text(i, 200) for i in range(60)]
    write_rows(tmp_path / "a.jsonl", long)
    write_rows(tmp_path / "c.jsonl", [f"Once more: {one} The end." for one in long[:30]])
    other = DomainConfig(name="c", sources=(SourceConfig(path=str(tmp_path / "c.jsonl")),))
    config = dataclasses.replace(config, domains=(config.domains[0], other))
    manifest, _ = run(config)
    tokenizer = Tokenizer(Path(config.tokenizer))
    train = {
        tokenizer.decode(ids[:-1]).removeprefix("Once more: ").removesuffix(" The end.")
        for name in ("a", "c")
        for ids, _ in documents(config, name, "train")
    }
    for name in ("a", "c"):
        held = [
            tokenizer.decode(ids[:-1]).removeprefix("Once more: ").removesuffix(" The end.")
            for ids, _ in documents(config, name, "validation")
        ]
        assert manifest.leaks[name].documents == sum(one in train for one in held) > 0
    assert manifest.leaks["a"].ngrams["c"] > 0.2
    assert manifest.leaks["a"].ngrams["a"] < 0.01
    assert read_manifest(Path(config.dir)).leaks == manifest.leaks
