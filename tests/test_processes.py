"""Several processes are one run: the same rows, losses and decisions, and one end for all.

The slow tests are two processes with four simulated devices each, which talk over the loopback; one
process with eight devices is what they are compared with.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tiny

from ddk_jax.config import Config, save_config
from ddk_jax.data.pipeline import MixturePipeline
from ddk_jax.data.rows import HostBatch, open_rows, validation_batches
from ddk_jax.errors import UserError
from ddk_jax.parallel import processes
from ddk_jax.parallel.mesh import make_mesh
from ddk_jax.training.build import Job
from ddk_jax.training.checkpoint import read_latest
from ddk_jax.training.lease import RunLease
from ddk_jax.training.state import local_rows

CHILD = Path(__file__).with_name("child_processes.py")
PATIENCE_SECONDS = 400
"""For a machine that is busy."""
PACE_SECONDS = 0.5
VARIABLES = {"DDK_COORDINATOR": "node0:8482", "DDK_NUM_PROCESSES": "4", "DDK_PROCESS_ID": "3"}


# How they find each other.


def test_the_variables_name_a_place() -> None:
    assert processes.place_of({}) is None
    assert processes.place_of({"DDK_COORDINATOR": ""}) is None
    assert processes.place_of(VARIABLES) == ("node0:8482", 4, 3)
    assert processes.place_of(VARIABLES | {"DDK_COORDINATOR": "[::1]:80"}) == ("[::1]:80", 4, 3)
    alone = {"DDK_NUM_PROCESSES": "1", "DDK_PROCESS_ID": "0"}
    assert processes.place_of(VARIABLES | alone) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"DDK_PROCESS_ID": ""}, "set DDK_PROCESS_ID too"),
        ({"DDK_COORDINATOR": "node0"}, "DDK_COORDINATOR=node0: must be like"),
        ({"DDK_COORDINATOR": ":8482"}, "must be like"),
        ({"DDK_NUM_PROCESSES": "four"}, "must be numbers"),
        ({"DDK_PROCESS_ID": "-1"}, "must be numbers"),
        ({"DDK_PROCESS_ID": "4"}, "must be less than DDK_NUM_PROCESSES=4; the first process is 0"),
    ],
)
def test_variables_that_make_no_sense_are_refused(change: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        processes.place_of(VARIABLES | change)


def test_after_the_first_use_of_jax_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.devices()
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"before jax is used for the first time.*DDK_COORDINATOR"):
        processes.join()
    monkeypatch.setenv("DDK_NUM_PROCESSES", "1")
    monkeypatch.setenv("DDK_PROCESS_ID", "0")
    processes.join()
    assert (processes.count(), processes.index()) == (1, 0)


@pytest.mark.parametrize(
    ("platforms", "workers", "slices", "expected"),
    [
        ("tpu,cpu", "a,b,c,d", "1", True),
        ("", "a,b", "1", True),
        ("tpu,cpu", "a", "1", False),
        ("tpu,cpu", "a", "2", True),
        ("cpu", "a,b", "1", False),
    ],
)
def test_cloud_tpus_of_several_workers_are_recognised(
    monkeypatch: pytest.MonkeyPatch, platforms: str, workers: str, slices: str, expected: bool
) -> None:
    from jax._src import cloud_tpu_init
    from jax._src.clusters import cloud_tpu_cluster

    assert not processes._on_several_tpu_workers()
    for module in (cloud_tpu_init, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", workers)
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", slices)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert processes._on_several_tpu_workers() is expected
    finally:
        jax.config.update("jax_platforms", before)


def test_one_process_is_the_first_and_only_one() -> None:
    assert processes.is_first()
    value = (1, [2.0])
    assert processes.from_first(lambda: value) is value
    assert processes.gather(value) == [value]
    with processes.together(), processes.first_goes_first():
        pass


# Whose rows.


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_one_process_has_all_rows(sizes: tuple[int, int, int]) -> None:
    np.testing.assert_array_equal(local_rows(make_mesh(*sizes), 32, 16), np.arange(32))


def assert_parts(whole: HostBatch, parts: list[HostBatch], places: list[np.ndarray]) -> None:
    for part, mine in zip(parts, places, strict=True):
        others = np.setdiff1d(np.arange(len(whole.tokens)), mine)
        for name in ("tokens", "segment_ids", "role"):
            ours, all_of_it = getattr(part, name), getattr(whole, name)
            np.testing.assert_array_equal(ours[mine], all_of_it[mine])
            assert not ours[others].any()
        np.testing.assert_array_equal(part.domain[mine], whole.domain[mine])


def test_each_process_reads_its_rows_of_the_same_batches(tiny_root: Path) -> None:
    rows = open_rows(tiny_root / "data", "train", tiny.SEQ_LEN)
    places = [np.array([0, 1, 4, 5]), np.array([2, 3, 6, 7])]

    def pipeline(mine: np.ndarray | None) -> MixturePipeline:
        weights = [0.5, 0.3, 0.2]
        return MixturePipeline(rows, weights, rows_per_step=8, seed=3, prefetch=0, places=mine)

    whole, *parts = (pipeline(mine) for mine in (None, *places))
    for step in range(6):
        if step == 3:
            for each in (whole, *parts):
                each.set_weights([0.1, 0.1, 0.8], 24)
        batch, state = next(whole)
        found = [next(part) for part in parts]
        assert_parts(batch, [part for part, _ in found], places)
        assert all(theirs == state for _, theirs in found)


def test_each_process_reads_its_rows_of_the_validation_batches(tiny_root: Path) -> None:
    rows = open_rows(tiny_root / "data", "validation", tiny.SEQ_LEN)[0]
    count = min(11, len(rows))
    places = [np.array([0, 2]), np.array([1, 3])]
    wholes = list(validation_batches(rows, count, 4))
    parts = [list(validation_batches(rows, count, 4, mine)) for mine in places]
    for whole, *theirs in zip(wholes, *parts, strict=True):
        assert_parts(whole, theirs, places)


# Two processes.


class Child(NamedTuple):
    """One process of a run."""

    process: subprocess.Popen[str]
    output: Path
    rows: Path

    def wait(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    def said(self) -> str:
        return self.output.read_text()

    def wait_for_step(self, step: int) -> None:
        """Until it has read the rows of a step."""
        end = time.monotonic() + PATIENCE_SECONDS
        while step not in read_rows([self]):
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.02)


@contextmanager
def children(
    *configs: Config, devices: int, pace: float = 0.0, folders: Sequence[Path | None] = ()
) -> Iterator[list[Child]]:
    """A run of as many processes as there are configs, each in its folder."""
    folders = folders or [None] * len(configs)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started: list[Child] = []
    try:
        for number, (config, folder) in enumerate(zip(configs, folders, strict=True)):
            name = f"{config.run.dir}.{time.monotonic_ns()}.{number}"
            save_config(config, Path(f"{name}.yaml"))
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": str(CHILD.parent.parent),
            }
            if len(configs) > 1:
                environment |= {
                    # Of several processes the first one alone writes the cache. It would then wait
                    # for the others to compile, and gloo waits for no more than 30 seconds.
                    "JAX_ENABLE_COMPILATION_CACHE": "false",
                    "DDK_COORDINATOR": f"127.0.0.1:{port}",
                    "DDK_NUM_PROCESSES": str(len(configs)),
                    "DDK_PROCESS_ID": str(number),
                }
            output, rows = Path(f"{name}.txt"), Path(f"{name}.rows")
            rows.touch()
            with output.open("w") as out:
                process = subprocess.Popen(
                    [sys.executable, str(CHILD), f"{name}.yaml", str(devices), rows, str(pace)],
                    cwd=folder,
                    env=environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            started.append(Child(process, output, rows))
        yield started
    finally:
        for child in started:
            child.process.kill()
            child.wait()


def finish(*configs: Config, devices: int) -> list[Child]:
    """A run that nothing happens to."""
    with children(*configs, devices=devices) as started:
        for child in started:
            assert child.wait() == 0, child.said()
    return started


def read_rows(started: list[Child]) -> dict[int, dict[str, str]]:
    """Digest of every row that was read, by step and by its number in the batch."""
    found: dict[int, dict[str, str]] = {}
    for child in started:
        for line in child.rows.read_text().splitlines():
            step, rows = json.loads(line)
            assert not found.get(step, {}).keys() & rows.keys()  # read by one process alone
            found.setdefault(step, {}).update(rows)
    return found


def described(root: Path, run_dir: Path, devices: int = 8) -> Config:
    changes = {"mesh.fsdp": min(2, devices), "checkpoint.every_steps": 2}
    return tiny.config(root, run_dir, **changes)


class Run(NamedTuple):
    """A finished run of some processes."""

    config: Config
    children: list[Child]


@pytest.fixture(scope="module")
def alone(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process with eight devices."""
    config = described(tiny_root, tmp_path_factory.mktemp("alone") / "run")
    return Run(config, finish(config, devices=8))


@pytest.fixture(scope="module")
def both(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two processes with four devices each."""
    config = described(tiny_root, tmp_path_factory.mktemp("both") / "run")
    return Run(config, finish(config, config, devices=4))


def assert_alike(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal but for the rounding of float32, which sums in another order give."""
    if isinstance(theirs, Mapping):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_alike(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other, where)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), where
    else:
        assert ours == theirs, where


def saved_steps(config: Config) -> list[int]:
    names = (path.name for path in (Path(config.run.dir) / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdecimal())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_make_what_one_makes(alone: Run, both: Run) -> None:
    rows = read_rows(both.children)
    assert rows == read_rows(alone.children)
    assert sorted(rows) == list(range(1, tiny.STEPS + 1))
    for child in both.children:
        assert all(len(mine) == tiny.ROWS // 2 for mine in read_rows([child]).values())

    ours, theirs = (tiny.outcome(run.config) for run in (both, alone))
    for outcome in (ours, theirs):
        assert outcome.pop("arrays")
    assert_alike(ours, theirs)
    ours, theirs = (
        read_latest(Path(run.config.run.dir) / "checkpoints", Job(run.config).abstract_state())
        for run in (both, alone)
    )
    assert ours is not None and theirs is not None
    for one, other in zip(jax.tree.leaves(ours.state), jax.tree.leaves(theirs.state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)

    first, second = (child.said() for child in both.children)
    assert "event=end step=12" in first and "step 12/12" in first
    assert "event=" not in second.replace("event=join", "") and "step 1/12" not in second
    names = {path.name for path in Path(both.config.run.dir).iterdir()}
    assert names == {path.name for path in Path(alone.config.run.dir).iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sigterm_to_one_of_two_and_then_on_four_devices_and_on_one(
    alone: Run, tiny_root: Path, tmp_path: Path
) -> None:
    config = described(tiny_root, tmp_path / "run")
    rows = {}
    with children(config, config, devices=4, pace=PACE_SECONDS) as started:
        started[1].wait_for_step(2)
        started[1].process.terminate()
        assert [child.wait() for child in started] == [0, 0], started[0].said()
        (step,) = {
            int(re.findall(r"told to stop: saving step (\d+)", child.said())[0])
            for child in started
        }
    rows |= read_rows(started)
    assert 2 <= step < tiny.STEPS and saved_steps(config)[-1] == step == max(rows)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "run.lock").exists()

    # The same bits, wherever they are read.
    found = []
    for devices in (8, 4, 1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            tiny.use_devices(monkeypatch, devices)
            job = Job(described(tiny_root, tmp_path / "run", devices))
            restored = read_latest(tmp_path / "run" / "checkpoints", job.abstract_state())
            assert restored is not None and restored.step == step
            found.append(tiny.state_digest(restored.state))
    assert len(set(found)) == 1

    with children(config, devices=4, pace=PACE_SECONDS) as started:
        started[0].wait_for_step(step + 2)
        started[0].process.terminate()
        assert started[0].wait() == 0, started[0].said()
    assert f"event=resume step={step}" in started[0].said()
    rows |= read_rows(started)
    (child,) = finish(described(tiny_root, tmp_path / "run", 1), devices=1)
    assert f"event=resume step={max(rows)}" in child.said()
    rows |= read_rows([child])

    assert rows == read_rows(alone.children)
    lines, theirs = (tiny.lasting_metrics(Path(c.run.dir)) for c in (config, alone.config))
    assert_alike(lines, theirs)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_process_ends_the_other_and_a_restart_continues(
    both: Run, tiny_root: Path, tmp_path: Path
) -> None:
    """First the one with the coordination service, which is missed at once; then the other."""
    config = described(tiny_root, tmp_path / "run")
    rows = {}
    for victim, step in ((0, 3), (1, 7)):
        with children(config, config, devices=4, pace=PACE_SECONDS) as started:
            started[1 - victim].wait_for_step(step)
            started[victim].process.kill()
            since = time.monotonic()
            survivor = started[1 - victim]
            assert survivor.wait() == -signal.SIGABRT, survivor.said()
            assert time.monotonic() - since < 30
            time.sleep(0.5)  # the last words are another program's
            last = survivor.said().splitlines()[-1]
        assert last.startswith(f"ddk: error: process {1 - victim} of 2 on ")
        assert "has ended without finishing: it was killed, or another one was" in last
        rows |= read_rows(started)
    finished = finish(config, config, devices=4)
    assert "event=resume step=" in finished[0].said()
    rows |= read_rows(finished)
    assert rows == read_rows(both.children)
    assert tiny.outcome(config) == tiny.outcome(both.config)  # bit by bit
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_error_of_one_is_the_end_of_both_with_its_message_and_code(
    tiny_root: Path, tmp_path: Path
) -> None:
    good = described(tiny_root, tmp_path / "run")
    here = tiny.config(tiny_root, tmp_path / "run", **{"data.dir": "data"})
    with children(good, here, devices=4) as started:
        assert [child.wait() for child in started] == [64, 64], started[0].said()
    assert all("have different settings" in child.said() for child in started)

    # The second one finds other data under the same name.
    shutil.copytree(tiny_root / "data", tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text("{")
    with children(here, here, devices=4, folders=[tiny_root, tmp_path]) as started:
        assert [child.wait() for child in started] == [65, 65], started[0].said()
    assert "manifest.json" in started[1].said()
    assert "process 1 failed: " in started[0].said() and "manifest.json" in started[0].said()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

    with RunLease(tmp_path / "run"), children(good, good, devices=4) as started:
        assert [child.wait() for child in started] == [75, 75], started[0].said()
    said = f"is held by process {os.getpid()}"
    assert said in started[0].said()
    assert "process 0 failed: " in started[1].said() and said in started[1].said()
