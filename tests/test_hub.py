"""Models by the id of a repository, against a hub on this machine and the client as it is."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import buckets
import fake_hub
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from huggingface_hub import constants

from ddk_jax.advice import advise, spec_size
from ddk_jax.errors import StorageError, UserError
from ddk_jax.inspection import describe
from ddk_jax.models import hf, hub
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.families import canonical
from ddk_jax.models.hub import Resolved, resolve
from ddk_jax.places import resolve_path
from ddk_jax.training.build import Job
from ddk_jax.training.rundir import open_run

REPO = "someone/a-model"


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    for known in (hub._snapshot, hub._fetch_weights, hub._local_tokenizer):
        known.cache_clear()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.FakeHub]:
    """The hub that the client asks, and an empty cache at `tmp_path / "cache"`."""
    with fake_hub.serving() as (hub, address):
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        yield hub
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> dict[str, bytes]:
    """A repository: a model in shards, and much that is not read."""
    directory = tmp_path_factory.mktemp("files") / "model"
    params = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype), Decoder(spec=tiny.TEACHER).abstract()
    )
    hf.export(
        params, tiny.TEACHER, directory,
        tokenizer_dir=tiny_root / "tokenizer", max_shard_bytes=20_000, card="A card.\n",
    )  # fmt: skip
    model = {path.name: path.read_bytes() for path in directory.iterdir()}
    more = ("pytorch_model.bin", "modeling.py", "original/consolidated.safetensors", "x.pt")
    return model | dict.fromkeys([*more, "model.fp16.safetensors", "README.md"], b"not read")


def cached(cache: Path, files: dict[str, bytes], *, commit: str = "ab" * 20) -> Path:
    """A repository in the hub's cache, as another program has left it."""
    root = cache / f"models--{REPO.replace('/', '--')}"
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    for number, (name, content) in enumerate(files.items()):
        (root / "blobs" / str(number)).write_bytes(content)
        (root / "snapshots" / commit / name).symlink_to(Path("..", "..", "blobs", str(number)))
    return root / "snapshots" / commit


def model_files(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if content != b"not read"}


def test_a_directory_wins_over_a_repository_of_its_name(
    server: fake_hub.FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, {"config.json": b"{}"})
    (tmp_path / REPO).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(REPO, "v1") == Resolved(Path(REPO))
    assert str(resolve(REPO)) == REPO and resolve(REPO).fetch() == Path(REPO)
    assert resolve("assets:teacher").directory == resolve_path("assets:teacher")
    assert os.fspath(resolve("gs://bucket/model").directory) == "gs://bucket/model"
    assert server.asked == []


def test_a_repository_is_fetched_as_far_as_it_is_read(
    server: fake_hub.FakeHub, files: dict[str, bytes]
) -> None:
    server.add(REPO, {"config.json": b"an older commit"})
    commit = server.add(REPO, files)
    model = resolve(REPO)
    assert (model.repo, model.commit) == (REPO, commit)
    assert str(model) == f"{REPO} (commit {commit})"
    assert hf.read_spec(model.directory) == canonical(tiny.TEACHER)
    assert (model.tokenizer_dir() / "tokenizer.json").is_file()
    assert not any(name.endswith(".safetensors") for name in server.downloaded())

    params = hf.load(model.fetch())
    assert np.asarray(params["embed"]["table"]).all()
    shards = {name for name in files if name.startswith("model-0")}
    assert {name for name in server.downloaded() if name.endswith(".safetensors")} == shards
    assert not server.downloaded() & {"pytorch_model.bin", "modeling.py", "x.pt", "README.md"}


def test_advice_reads_the_size_and_nothing_more(
    server: fake_hub.FakeHub, files: dict[str, bytes]
) -> None:
    server.add(REPO, files)
    student = advise(student=REPO).student
    assert student == spec_size(REPO, canonical(tiny.TEACHER))
    assert not any(name.endswith(".safetensors") for name in server.downloaded())


def test_the_commit_is_looked_up_once_and_how_to_pin_it_is_said(
    server: fake_hub.FakeHub, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    commit = server.add(REPO, files)
    with caplog.at_level(logging.WARNING, "ddk_jax"):
        first = resolve(REPO)
        server.add(REPO, {"config.json": b"newer"})
        assert resolve(REPO) == first and first.commit == commit
    (said,) = (record.getMessage() for record in caplog.records)
    assert f"{REPO}: no revision is named" in said and f"set revision to {commit}" in said


def test_a_tag_or_a_commit_pins_a_repository(
    server: fake_hub.FakeHub, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    commit = server.add(REPO, files)
    server.add(REPO, {"config.json": b"newer"})
    server.tags[REPO, "v1"] = commit
    with caplog.at_level(logging.WARNING, "ddk_jax"):
        assert (
            resolve(REPO, "v1")
            == resolve(REPO, commit)
            == Resolved(resolve(REPO, commit).directory, REPO, commit)
        )
    assert caplog.records == []


def test_a_single_file_is_fetched(server: fake_hub.FakeHub, files: dict[str, bytes]) -> None:
    shard = next(content for name, content in files.items() if name.startswith("model-0"))
    server.add(REPO, {"config.json": files["config.json"], "model.safetensors": shard})
    assert (resolve(REPO).fetch() / "model.safetensors").read_bytes() == shard


def test_without_a_network_the_cache_is_read(
    server: fake_hub.FakeHub,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshot = cached(tmp_path / "cache", model_files(files))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in ("", "main", "ab" * 20):
        model = resolve(REPO, revision)
        assert model == Resolved(snapshot, REPO, "ab" * 20)
        assert hf.read_spec(model.fetch()) == canonical(tiny.TEACHER)
    assert np.asarray(hf.load(resolve(REPO).fetch())["norm"]["scale"]).all()
    assert hf.file_digest(snapshot)
    assert server.asked == []


def test_what_is_not_in_the_cache_and_cannot_be_fetched_is_said(
    server: fake_hub.FakeHub,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = rf"{REPO}: no such directory here; and of a repository .* cannot be reached"
    server.down = True
    with pytest.raises(StorageError, match=both + r" .*500.* `hf download someone/a-model` fills"):
        resolve(REPO)
    server.down = False
    commit = server.add(REPO, files)
    model = resolve(REPO, commit)  # the weights are still to come
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match=both + rf".*`hf download {REPO} --revision {commit}`"):
        model.fetch()
    with pytest.raises(StorageError, match=r"someone/else: no such directory here"):
        resolve("someone/else")


def test_errors_of_the_hub_say_what_to_do(
    server: fake_hub.FakeHub, files: dict[str, bytes]
) -> None:
    server.add(REPO, files)
    with pytest.raises(UserError, match=r"no/one: no such directory here, and no such repository"):
        resolve("no/one")
    with pytest.raises(UserError, match=rf"{REPO}: has no revision 'v9'"):
        resolve(REPO, "v9")
    server.gated.add(REPO)
    terms = rf"{REPO}: is gated: accept its terms at https://huggingface.co/{REPO}, .*hf auth login"
    with pytest.raises(UserError, match=terms):
        resolve(REPO)


@pytest.mark.parametrize("path", ["gpt2", "./a/b", "/no/where", "a/b/c", "~/no-model", "a/.."])
def test_what_is_no_id_is_not_looked_up(server: fake_hub.FakeHub, path: str) -> None:
    with pytest.raises(
        UserError, match=r"no such directory; nor .*hub, which is owner/name|and not the id"
    ):
        resolve(path)
    assert server.asked == []


def test_a_repository_of_pickles_is_refused(
    server: fake_hub.FakeHub, files: dict[str, bytes]
) -> None:
    config = {"config.json": files["config.json"]}
    server.add("some/pickles", config | {"pytorch_model.bin": b"cos\nsystem\n(S'false'\ntR."})
    with pytest.raises(UserError, match=r"some/pickles .*pickle files only .pytorch_model.bin."):
        resolve("some/pickles").fetch()
    assert "pytorch_model.bin" not in server.downloaded()
    server.add("some/thing", config)
    with pytest.raises(UserError, match=r"some/thing .*has no safetensors"):
        resolve("some/thing").fetch()


def test_an_index_cannot_name_what_lies_elsewhere(
    server: fake_hub.FakeHub, files: dict[str, bytes]
) -> None:
    for name in ("../../x.safetensors", "modeling.py"):
        index = json.dumps({"weight_map": {"a": name}}).encode()
        server.add(REPO, files | {"model.safetensors.index.json": index})
        hub._snapshot.cache_clear()
        with pytest.raises(StorageError, match="not a safetensors file in this directory"):
            resolve(REPO).fetch()


def test_names_in_an_index_are_no_patterns(
    server: fake_hub.FakeHub, files: dict[str, bytes]
) -> None:
    index = json.dumps({"weight_map": {"a": "model-*.safetensors"}}).encode()
    server.add(REPO, files | {"model.safetensors.index.json": index})
    model = resolve(REPO)
    model.fetch()
    assert not any(name.endswith(".safetensors") for name in server.downloaded())
    with pytest.raises(StorageError, match=r"model-\*.safetensors: named in .* but missing"):
        hf.load(model.directory)


def test_a_repository_is_described_without_its_weights(
    server: fake_hub.FakeHub, files: dict[str, bytes]
) -> None:
    commit = server.add(REPO, files)
    text = describe(REPO)
    assert f"{REPO} (commit {commit})" in text and "not (all) downloaded" in text
    resolve(REPO).fetch()
    assert " files, " in describe(REPO)


def test_a_run_takes_its_models_from_the_hub_and_records_the_commits(
    server: fake_hub.FakeHub, tiny_root: Path, tmp_path: Path
) -> None:
    teacher = tiny_root / "teacher"
    commit = server.add(REPO, {path.name: path.read_bytes() for path in teacher.iterdir()})
    server.add(REPO, {"config.json": b"newer"})
    server.tags[REPO, "v1"] = commit
    named = {"teacher.path": REPO, "teacher.revision": "v1"}
    named |= {"student.path": REPO, "student.revision": commit, "student.spec": {}}
    config = tiny.config(tiny_root, tmp_path / "run", **named)
    job = Job(config)
    job.check()
    assert not any(name.endswith(".safetensors") for name in server.downloaded())
    (loaded,) = job.teachers.loaded
    assert loaded.origin == resolve(REPO, "v1") == job.teachers.origins[0]
    assert loaded.digest == hf.file_digest(teacher)
    assert job.commits() == {REPO: commit}
    (tmp_path / "run").mkdir()
    open_run(config, tmp_path / "run", job.commits())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["models"] == {REPO: commit}


def test_a_tokenizer_in_a_bucket_is_copied_once(bucket: Any, tiny_root: Path) -> None:
    place = buckets.upload(tiny_root / "teacher", "gs://b/model")
    model = resolve(place)
    directory = model.tokenizer_dir()
    assert {path.name for path in directory.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert model.tokenizer_dir() == directory
