"""A run directory in a bucket: its files, its lease, its checkpoints, and a whole run.

The bucket is `buckets.FakeBucket`; what orbax writes gets there through `gcs_server`. No real one
has been seen.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import buckets
import gcs_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from tiny import Finished

from ddk_jax import cli, doctor
from ddk_jax.analysis.report import write_report
from ddk_jax.analysis.runs import load_run
from ddk_jax.config import Config, RunConfig, load_config
from ddk_jax.data.rows import HostBatch
from ddk_jax.errors import RunHeldError, StorageError, UserError
from ddk_jax.inspection import describe
from ddk_jax.places import resolve_place
from ddk_jax.training import bucket as module
from ddk_jax.training.bucket import BucketLease, RunFiles, run_lease
from ddk_jax.training.checkpoint import Checkpoints, read_latest
from ddk_jax.training.checkpoint_files import saved_steps
from ddk_jax.training.export import export_run
from ddk_jax.training.lease import FILE_NAME, RunLease
from ddk_jax.training.loop import train

PLACE = "gs://bucket/runs/one"


@pytest.fixture(autouse=True)
def place(bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> epath.Path:
    """An empty run directory in an empty bucket, and short waits."""
    gcs_server.serve()
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "STALE_SECONDS", 0.1)
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    found = resolve_place(PLACE)
    assert isinstance(found, epath.Path)
    return found


def copies(directory: Path) -> list[Path]:
    return list(directory.glob("ddk_run_*"))


# The small files.


def test_a_folder_is_its_own_place(tmp_path: Path) -> None:
    assert resolve_place("runs/x") == Path("runs/x")
    assert isinstance(run_lease(tmp_path), RunLease)
    with RunFiles(tmp_path) as files:
        assert files.directory == tmp_path
        files.push()
    assert list(tmp_path.iterdir()) == []


def test_files_are_fetched_and_what_is_new_is_copied(
    place: epath.Path, bucket: type[buckets.FakeBucket], tmp_path: Path
) -> None:
    (place / "log.txt").write_text("one\n")
    (place / "summary.json").write_text("{}")
    (place / FILE_NAME).write_text("not ours")
    (place / "checkpoints" / "4" / "file").write_text("x")
    with RunFiles(place) as files:
        assert sorted(x.name for x in files.directory.iterdir()) == ["log.txt", "summary.json"]
        with (files.directory / "log.txt").open("a") as log:
            log.write("two\n")
        (files.directory / "metrics.jsonl").write_text("{}\n")
        bucket.written.clear()
        files.push()
        assert bucket.written == ["log.txt", "metrics.jsonl"]
        files.push()
        assert len(bucket.written) == 2
        (files.directory / "summary.json").unlink()
        (files.directory / "run.json").write_text("[]")
    assert bucket.written[2:] == ["run.json", "-summary.json"]
    assert (place / "log.txt").read_text() == "one\ntwo\n"
    assert not (place / "summary.json").exists() and (place / FILE_NAME).exists()
    assert not copies(tmp_path)


def test_a_bucket_that_fails_is_an_error_with_its_name(
    place: epath.Path,
    bucket: type[buckets.FakeBucket],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(StorageError, match=r"one: cannot be written .*503"), RunFiles(place) as f:
        (f.directory / "log.txt").write_text("x")
        bucket.broken.add("log.txt")
    # What happened first is what is said; the rest is logged.
    with pytest.raises(KeyError, match="first"), RunFiles(place) as f:
        (f.directory / "log.txt").write_text("x")
        raise KeyError("first")
    assert "503" in caplog.text
    assert not copies(tmp_path)


def test_without_the_package_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install gcsfs to access GCS")

    monkeypatch.setattr(buckets.FakeBucket, "_open", missing)
    with (
        pytest.raises(UserError, match=r"pip install 'ddk_jax\[gcs\]'"),
        run_lease(resolve_place(PLACE)),
    ):
        pass


def test_the_doctor_looks_whether_the_bucket_can_be_written(
    bucket: type[buckets.FakeBucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(run=RunConfig(dir=PLACE))
    check = doctor._run_directory(config)
    assert check.ok and check.value == f"{PLACE}: can be written"
    written, deleted = bucket.written
    assert deleted == f"-{written}" and not bucket.store

    def forbidden(*_: object, **__: object) -> None:
        raise RuntimeError("403 Forbidden")

    monkeypatch.setattr(bucket, "_open", forbidden)
    check = doctor._run_directory(config)
    assert not check.ok and "403" in check.value and "read and write objects" in check.advice


# The lease.


def record(place: epath.Path, **changes: Any) -> None:
    """The record of another process."""
    with BucketLease(place):
        holder = json.loads((place / FILE_NAME).read_text())
    (place / FILE_NAME).write_text(json.dumps(holder | {"token": "0", "host": "far"} | changes))


def test_the_record_names_the_holder_and_goes_with_it(place: epath.Path) -> None:
    with BucketLease(place) as lease:
        lease.check()
        holder = json.loads((place / FILE_NAME).read_text())
        assert holder["pid"] == os.getpid() and holder["beats"] >= 1
    assert not (place / FILE_NAME).exists()


def test_a_holder_that_beats_is_not_disturbed(place: epath.Path) -> None:
    with (
        BucketLease(place) as lease,
        pytest.raises(RunHeldError, match=f"is held by process {os.getpid()}"),
        BucketLease(place),
    ):
        pass
    with BucketLease(place) as lease:
        lease.check()


def test_a_silent_holder_is_outwaited(place: epath.Path, caplog: pytest.LogCaptureFixture) -> None:
    record(place)
    with caplog.at_level(logging.WARNING, logger="ddk_jax"), BucketLease(place) as lease:
        lease.check()
    assert "waiting 0 seconds for a sign of life" in caplog.text
    assert "over from process" in caplog.text


def test_a_holder_of_this_machine_that_is_gone_is_not_waited_for(
    place: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALE_SECONDS", 1e6)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record(place, pid=gone.pid, host=module.new_holder(kernel_lock=False).host)
    with BucketLease(place) as lease:
        lease.check()


def test_who_wrote_last_has_it(place: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = module.time.sleep

    def another(seconds: float) -> None:
        monkeypatch.setattr(module.time, "sleep", sleep)
        record(place)

    monkeypatch.setattr(module.time, "sleep", another)
    with pytest.raises(RunHeldError, match=r"is held by process .* on far"), BucketLease(place):
        pass


def test_a_lost_lease_is_noticed_and_the_other_one_left_alone(place: epath.Path) -> None:
    with BucketLease(place) as lease:
        lease._stop.set()  # no beat in between
        lease._heart.join()
        (place / FILE_NAME).write_text("{")
        with pytest.raises(RunHeldError, match=r"lost the run directory .*one to another process"):
            lease.check()
    assert (place / FILE_NAME).read_text() == "{"


# Checkpoints.


def state(value: float) -> dict[str, jax.Array]:
    return {"a": jnp.full((64,), value, jnp.float32), "n": jnp.int32(value)}


def abstract() -> Any:
    return jax.eval_shape(lambda: state(0.0))


def test_checkpoints_are_saved_kept_and_read(place: epath.Path) -> None:
    directory = place / "checkpoints"
    assert read_latest(directory, abstract()) is None
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"step": step})
        with pytest.raises(UserError, match="exists already"):
            checkpoints.save(3, state(3), {})
    assert saved_steps(directory) == [3, 2]
    restored = read_latest(directory, abstract())
    assert restored is not None and (restored.step, restored.host) == (3, {"step": 3})
    np.testing.assert_array_equal(restored.state["a"], np.full(64, 3, np.float32))


def test_a_save_that_was_not_finished_is_none(place: epath.Path) -> None:
    directory = place / "checkpoints"
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {})
    (directory / "2" / "commit_success.txt").unlink()
    restored = read_latest(directory, abstract())
    assert restored is not None and restored.step == 1
    with Checkpoints(directory, keep=2) as checkpoints:
        assert not (directory / "2").exists()
        checkpoints.save(2, state(2), {})
    assert saved_steps(directory) == [2, 1]


def test_a_damaged_checkpoint_is_moved_aside(
    place: epath.Path, bucket: type[buckets.FakeBucket]
) -> None:
    directory = place / "checkpoints"
    with Checkpoints(directory, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {})
    data = [k for k in bucket.store if "checkpoints/2/arrays" in k and "/d/" in k]
    for key in data:
        bucket.store[key] = bucket.store[key].__class__(bucket(), key, b"\0" * 50)
    with Checkpoints(directory, keep=3) as checkpoints:
        restored = checkpoints.restore_latest(abstract())
        assert restored is not None and restored.step == 1
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2.corrupt"]


# A whole run.


def test_what_is_no_run_in_a_bucket_says_so(
    place: epath.Path, bucket: type[buckets.FakeBucket], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        assert cli.main(words) != 0
        return capsys.readouterr().err

    assert f"{PLACE} is not a run directory" in said("report", PLACE, "--out", "x")
    assert f"{PLACE}: not a run directory" in said("export", PLACE)
    assert "in a bucket: say with --out" in said("report", PLACE)
    assert "ftp://a/b: neither a path nor a place in a bucket" in said("export", "ftp://a/b")
    (place / "config.yaml").write_text("run: {dir: x}")
    bucket.broken.add("config.yaml")
    assert "config.yaml: cannot be read (RuntimeError: 503" in said("export", PLACE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_in_a_bucket_ends_with_the_bits_of_one_on_a_disk(
    finished: Finished, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken once on the way; its directory is then copied to a disk, and both are read."""

    class Crash(Exception):
        pass

    def crash_once(step: int, _: HostBatch) -> None:
        if step == 7 and not crashed:
            crashed.append(step)
            raise Crash

    crashed: list[int] = []
    config = tiny.config(tiny_root, tmp_path / "copy", **{"run.dir": PLACE})
    with tiny.quick_programs(monkeypatch):
        tiny.use_devices(monkeypatch, 1)
        tiny.watch_batches(monkeypatch, crash_once)
        with pytest.raises(Crash):
            train(config)
        place = epath.Path(PLACE)
        assert saved_steps(place / "checkpoints") == [4]
        assert not (place / FILE_NAME).exists()
        summary = train(config)
        assert train(config) == summary
        with pytest.raises(UserError, match="gs://bucket/runs/one holds a run with other settings"):
            train(tiny.config(tiny_root, tmp_path, **{"run.dir": PLACE, "run.seed": 9}))
    assert not copies(tmp_path)

    for key, file in buckets.FakeBucket.store.items():
        target = tmp_path / "copy" / Path(key).relative_to("/bucket/runs/one")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.getvalue())
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        *("config.yaml", "run.json", "metrics.jsonl", "metrics.jsonl.orphan"),
        *("log.txt", "summary.json", "checkpoints"),
    }
    assert "event=resume step=4" in (tmp_path / "copy" / "log.txt").read_text()
    assert tiny.outcome(tiny.config(tiny_root, tmp_path / "copy")) == tiny.outcome(finished.config)

    there, here = load_run(PLACE), load_run(tmp_path / "copy")
    assert there.name == "one" and there.summary == here.summary
    np.testing.assert_array_equal(there.student_nats, here.student_nats)
    page = write_report([PLACE], tmp_path / "report").read_text()
    assert "ddk train gs://bucket/runs/one/config.yaml" in page
    assert load_config(f"{PLACE}/config.yaml").run.dir == PLACE
    assert re.search(r"state +finished.*\n.*\ncheckpoints +8, 12\n", describe(PLACE))
    with tiny.quick_programs(monkeypatch):
        export_run(place, tmp_path / "there")
        export_run(tmp_path / "copy", tmp_path / "here")
    weights = [tmp_path / name / "model.safetensors" for name in ("there", "here")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
