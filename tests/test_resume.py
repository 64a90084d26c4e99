"""A run that was interrupted ends with the same bits as one that was not.

The fast tests stop and break runs inside this process; the slow ones kill processes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from tiny import Finished

from ddk_jax.config import Config, save_config
from ddk_jax.data.rows import HostBatch
from ddk_jax.training.build import Job
from ddk_jax.training.evaluate import DomainNats
from ddk_jax.training.lease import RunLease
from ddk_jax.training.loop import train

CHILD = Path(__file__).with_name("child_run.py")
OFTEN = {"checkpoint.every_steps": 2}
CHILD_SECONDS = 400
"""Patience with a child process, for a machine that is busy."""


def terminate_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Interruptions:
    """Does something when the loop takes the rows of a step, and records which rows it took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: dict[int, Callable[[], None]] = {}
        self.batches: dict[int, HostBatch] = {}
        tiny.use_devices(monkeypatch, 1)
        tiny.watch_batches(monkeypatch, self._take)

    def _take(self, step: int, batch: HostBatch) -> None:
        self.batches[step] = batch
        if step in self.at:
            self.at.pop(step)()


@pytest.fixture
def interruptions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interruptions]:
    with tiny.quick_programs(monkeypatch):
        yield Interruptions(monkeypatch)


def assert_as_uninterrupted(
    config: Config, finished: Finished, interruptions: Interruptions | None = None
) -> None:
    ours, theirs = tiny.outcome(config), tiny.outcome(finished.config)
    for key, value in theirs.items():
        assert ours[key] == value, key
    if interruptions is not None:
        rows = [
            {step: tiny.state_digest(batch) for step, batch in batches.items()}
            for batches in (interruptions.batches, finished.batches)
        ]
        assert rows[0] == rows[1]


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdecimal())


# Stopped by SIGTERM.


def test_stopped_at_five_steps_and_continued(
    finished: Finished, tiny_root: Path, tmp_path: Path, interruptions: Interruptions
) -> None:
    """After the first step, within an interval, at an update, after it, before the last step."""
    config = tiny.config(tiny_root, tmp_path)
    for step in (1, 3, 4, 5, 11):
        interruptions.at[step] = terminate_self
        summary = train(config)
        assert (summary.stop_reason, summary.steps) == ("preempted", step)
        assert saved_steps(tmp_path)[-1] == step
        assert not (tmp_path / "summary.json").exists()
    assert train(config).stop_reason == "steps"
    assert_as_uninterrupted(config, finished, interruptions)


@pytest.mark.slow
def test_a_controller_that_follows_the_batches_forgets_none_of_them(
    tiny_root: Path, tmp_path: Path, interruptions: Interruptions
) -> None:
    """Stopped in the middle of an interval; the reference is made from what the steps wrote."""
    mixture = {"controller": "odm", "term": "forward_kl", "smoothing": 0.0, "interval_steps": 5}
    whole, stopped = (
        tiny.config(tiny_root, tmp_path / name, mixture=mixture) for name in ("whole", "stopped")
    )
    train(whole)
    interruptions.at[8] = terminate_self
    assert train(stopped).steps == 8
    train(stopped)
    assert tiny.outcome(stopped) == tiny.outcome(whole)

    lines = tiny.lasting_metrics(tmp_path / "whole")
    decided = {line["step"]: line for line in lines if line["event"] == "mixture"}
    assert list(decided) == [0, 5, 10]
    np.testing.assert_allclose(decided[0]["weights"], 1 / 3, rtol=1e-15)
    for step in (5, 10):
        steps = [x for x in lines if x["event"] == "step" and step - 5 < x["step"] <= step]
        tokens = np.array([x["domain_tokens"] for x in steps], np.float64)
        nats = np.array([x["domain_nats"]["forward_kl"] for x in steps], np.float64)
        reward = np.exp(np.nansum(nats * tokens, axis=0) / tokens.sum(axis=0))
        uniform = np.sqrt(3 * np.log(3) / step)
        expected = (1 - uniform) * reward / reward.sum() + uniform / 3
        np.testing.assert_allclose(decided[step]["weights"], expected, rtol=1e-6)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    average = np.mean([line["weights"] for line in decided.values()], axis=0)
    np.testing.assert_allclose(summary["average_weights"], average, rtol=1e-12)
    # And what it came to is another run's mixture.
    fixed = {"controller": "static", "prior": str(tmp_path / "whole")}
    assert Job(tiny.config(tiny_root, tmp_path, mixture=fixed)).prior == pytest.approx(average)


@pytest.mark.slow
def test_stopped_while_it_starts_and_while_it_measures(
    finished: Finished,
    tiny_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interruptions: Interruptions,
) -> None:
    config = tiny.config(tiny_root, tmp_path)
    load, measure = Job.teacher_nats, Job.measure

    def while_loading(job: Job) -> DomainNats | None:
        terminate_self()
        return load(job)

    def while_measuring(job: Job, decoder: Any, params: Any) -> DomainNats:
        terminate_self()
        return measure(job, decoder, params)

    for name, replacement, step in (
        ("teacher_nats", while_loading, 0),
        ("measure", while_measuring, 4),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Job, name, replacement)
            summary = train(config)
        assert (summary.stop_reason, summary.steps) == ("preempted", step)
        assert saved_steps(tmp_path)[-1] == step
    train(config)
    assert_as_uninterrupted(config, finished, interruptions)


def test_told_to_stop_in_the_last_measurement_it_finishes(
    tiny_root: Path, tmp_path: Path, interruptions: Interruptions
) -> None:
    changes = {"mixture.interval_steps": 1, "train.max_intervals": 1}
    interruptions.at[1] = terminate_self
    summary = train(tiny.config(tiny_root, tmp_path, **changes))
    assert summary.stop_reason == "intervals" and (tmp_path / "summary.json").is_file()


# Broken.


class Crash(Exception):
    """Anything that may happen to a process."""


def crash() -> None:
    raise Crash


@pytest.mark.slow
def test_broken_between_checkpoints_and_started_again(
    finished: Finished, tiny_root: Path, tmp_path: Path, interruptions: Interruptions
) -> None:
    """Before there is any checkpoint; one step after one; right after an update was saved."""
    config = tiny.config(tiny_root, tmp_path)
    for step in (2, 7, 9):
        interruptions.at[step] = crash
        with pytest.raises(Crash):
            train(config)
        assert not (tmp_path / "run.lock").exists()
    train(config)
    assert_as_uninterrupted(config, finished, interruptions)
    orphans = (tmp_path / "metrics.jsonl.orphan").read_text().splitlines()
    assert {json.loads(line)["step"] for line in orphans} >= {0, 5}


def copy_unfinished(finished: Finished, tiny_root: Path, target: Path) -> Config:
    """The finished run elsewhere, as if it had been killed after its last save."""
    shutil.copytree(finished.run_dir, target)
    (target / "summary.json").unlink()
    return tiny.config(tiny_root, target)


def test_killed_between_the_last_save_and_the_summary(
    finished: Finished, tiny_root: Path, tmp_path: Path, interruptions: Interruptions
) -> None:
    config = copy_unfinished(finished, tiny_root, tmp_path / "run")
    train(config)
    assert not interruptions.batches
    assert_as_uninterrupted(config, finished)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    finished: Finished,
    tiny_root: Path,
    tmp_path: Path,
    interruptions: Interruptions,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    config = copy_unfinished(finished, tiny_root, tmp_path / "run")
    files = (tmp_path / "run" / "checkpoints" / "12" / "arrays").rglob("*")
    file = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    else:
        del content[len(content) // 2 :]
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="ddk_jax"):
        train(config)
    assert sorted(interruptions.batches) == [9, 10, 11, 12]
    warnings = [record.getMessage() for record in caplog.records]
    assert any("checkpoint 12" in x and "trying checkpoint 8" in x for x in warnings)
    assert "trying checkpoint 8 instead" in (tmp_path / "run" / "log.txt").read_text()
    assert (tmp_path / "run" / "checkpoints" / "12.corrupt").is_dir()
    assert_as_uninterrupted(config, finished)


# Killed.


@contextmanager
def child(config: Config, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A run in another process; its log lines are on its standard output."""
    file = Path(f"{config.run.dir}.yaml")
    save_config(config, file)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(CHILD.parent.parent),
    }
    process = subprocess.Popen(
        [sys.executable, str(CHILD), str(file), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=CHILD_SECONDS)


def run_child(config: Config, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a run in another process."""
    with child(config, *arguments) as process:
        output = process.communicate(timeout=CHILD_SECONDS)[0]
        return process.returncode, output


@pytest.fixture(scope="module")
def child_config(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that another process made without interruption."""
    run_dir = tmp_path_factory.mktemp("children") / "uninterrupted"
    config = tiny.config(tiny_root, run_dir, **OFTEN)
    code, output = run_child(config)
    assert code == 0, output
    return config


def assert_same(config: Config, reference: Config) -> None:
    ours, theirs = tiny.outcome(config), tiny.outcome(reference)
    for key, value in theirs.items():
        assert ours[key] == value, key


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_any_moment_and_started_again(
    child_config: Config, tiny_root: Path, tmp_path: Path
) -> None:
    """SIGKILL at six moments of one run, two of them within a save and one at an update."""
    config = tiny.config(tiny_root, tmp_path / "run", **OFTEN)
    random = np.random.default_rng(2407)
    moments = [
        ("step 1/", 0.0),  # no checkpoint yet
        ("event=mixture step=4", 0.0),
        ("writing 6", 0.0),
        ("event=save_start step=8", float(random.uniform(0.001, 0.03))),
        (f"step {random.integers(9, 11)}/", float(random.uniform(0.001, 0.03))),
        ("event=save_end step=12", 0.0),  # no summary yet
    ]
    for moment, delay in moments:
        code, output = run_child(config, moment, str(delay))
        assert code == -signal.SIGKILL, output
        assert not (tmp_path / "run" / "summary.json").exists()
        if moment == "writing 6":
            # Begun, not ended; what is there of it depends on how far the background was.
            assert max(saved_steps(tmp_path / "run")) == 4
    code, output = run_child(config)
    assert code == 0, output
    assert "over from process" in output  # the lease of the one that was killed
    assert_same(config, child_config)
    assert saved_steps(tmp_path / "run") == [10, 12]
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_from_outside_saves_and_exits_with_0(
    child_config: Config, tiny_root: Path, tmp_path: Path
) -> None:
    config = tiny.config(tiny_root, tmp_path / "run", **OFTEN)
    with child(config) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 5/"):
                process.terminate()
                break
        output = process.communicate(timeout=CHILD_SECONDS)[0]
        assert process.returncode == 0, output
    assert "told to stop: saving step" in output
    (step,) = [s for s in saved_steps(tmp_path / "run") if f"saving step {s}\n" in output]
    assert 5 <= step < tiny.STEPS
    assert not (tmp_path / "run" / "summary.json").exists()
    code, output = run_child(config)
    assert code == 0 and f"event=resume step={step}" in output
    assert_same(config, child_config)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_process_is_refused_with_75(tiny_root: Path, tmp_path: Path) -> None:
    config = tiny.config(tiny_root, tmp_path / "run", **OFTEN)
    with RunLease(tmp_path / "run"):
        code, output = run_child(config)
    assert code == 75
    assert f"is held by process {os.getpid()}" in output
    assert not (tmp_path / "run" / "config.yaml").exists()
