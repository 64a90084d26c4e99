"""One writer at a time: on one machine, on several, and after every kind of death."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from ddk_jax.errors import RunHeldError, StorageError
from ddk_jax.training import lease as module
from ddk_jax.training.lease import FILE_NAME, RunLease

HOLD = """
    import sys, time
    from pathlib import Path
    from ddk_jax.training.lease import RunLease
    with RunLease(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_holder(directory: Path, program: str = HOLD) -> subprocess.Popen[str]:
    child = start(program, directory)
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.readline() == "held\n", child.stderr.read()
    return child


def leave_record(directory: Path, *, seconds_ago: float, **changes: object) -> Path:
    """Write the lock file of a process that ended without cleaning up."""
    path = directory / FILE_NAME
    with RunLease(directory):
        record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "token": "0", **changes}))
    then = time.time() - seconds_ago
    os.utime(path, (then, then))
    return path


def test_the_file_names_the_holder_and_goes_with_it(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "one"
    with RunLease(directory) as lease:
        record = json.loads((directory / FILE_NAME).read_text())
        assert record["pid"] == os.getpid()
        assert {"host", "token", "since"} <= record.keys()
        lease.check()
    assert list(directory.iterdir()) == []
    with RunLease(directory):
        pass


def test_released_on_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLease(tmp_path):
        raise KeyError
    assert not (tmp_path / FILE_NAME).exists()


def test_second_writer_is_refused(tmp_path: Path) -> None:
    child = start_holder(tmp_path)
    try:
        with pytest.raises(RunHeldError) as caught, RunLease(tmp_path):
            pass
        assert caught.value.exit_code == 75
        message = str(caught.value)
        assert f"held by process {child.pid} on " in message and "since 2" in message
        assert str(tmp_path) in message
        assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == child.pid
    finally:
        child.terminate()
        child.communicate(timeout=30)


def test_second_writer_in_one_process_is_refused(tmp_path: Path) -> None:
    with RunLease(tmp_path) as first:
        with pytest.raises(RunHeldError), RunLease(tmp_path):
            pass
        first.check()


def test_a_killed_holder_is_replaced_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = start_holder(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=30)
    assert (tmp_path / FILE_NAME).exists()
    with RunLease(tmp_path) as lease:
        lease.check()
    assert f"taking {tmp_path / FILE_NAME} over from process {child.pid}" in caplog.text


def test_a_reused_process_id_does_not_keep_the_lease(tmp_path: Path) -> None:
    # The record names this very process, which is alive, but nobody holds the kernel lock.
    leave_record(tmp_path, seconds_ago=1, pid=os.getpid())
    with RunLease(tmp_path) as lease:
        lease.check()


FORKING = """
    import os, sys, time
    from pathlib import Path
    from ddk_jax.training.lease import RunLease
    with RunLease(Path(sys.argv[1])):
        worker = os.fork()
        if worker == 0:
            os.close(1)
            os.close(2)
            time.sleep(20)
            os._exit(0)
        (Path(sys.argv[1]) / "worker").write_text(str(worker))
        print("held", flush=True)
        time.sleep(60)
"""


def test_an_orphaned_worker_does_not_keep_the_lease(tmp_path: Path) -> None:
    child = start_holder(tmp_path, FORKING)
    worker = int((tmp_path / "worker").read_text())
    try:
        with pytest.raises(RunHeldError), RunLease(tmp_path):
            pass
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=30)
        os.kill(worker, 0)
        with RunLease(tmp_path) as lease:
            lease.check()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_another_machine_is_refused_at_the_next_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)
    path = leave_record(tmp_path, seconds_ago=200, machine="elsewhere", host="far", pid=12)
    beat = threading.Timer(0.2, os.utime, [path])
    beat.start()
    with pytest.raises(RunHeldError, match="held by process 12 on far"), RunLease(tmp_path):
        pass
    assert "waiting up to 100 seconds for a sign of life" in caplog.text
    assert json.loads(path.read_text())["pid"] == 12


@pytest.mark.parametrize("seconds_ago", [299.5, 301])
def test_another_machine_without_heartbeat_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds_ago: float
) -> None:
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)
    leave_record(tmp_path, seconds_ago=seconds_ago, machine="elsewhere")
    with RunLease(tmp_path) as lease:
        lease.check()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"pid": 3}'])
def test_a_broken_file_does_not_keep_the_lease(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with RunLease(tmp_path) as lease:
        lease.check()


def test_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    path = tmp_path / FILE_NAME
    with RunLease(tmp_path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 20


def test_a_zombie_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    path = tmp_path / FILE_NAME
    with RunLease(tmp_path) as lease:
        record = json.loads(path.read_text())
        other = {**record, "token": "0", "pid": 99, "host": "far"}
        with path.open("r+") as file:
            file.write(json.dumps(other).ljust(1023) + "\n")
        with pytest.raises(RunHeldError, match=r"lost the run directory .* to process 99 on far"):
            lease.check()
        time.sleep(0.1)
        os.utime(path, (0, 0))
        time.sleep(0.1)
        assert path.stat().st_mtime == 0  # no heartbeat in the other's name
    assert json.loads(path.read_text())["pid"] == 99
    assert "lost the run directory" in caplog.text


def test_a_deleted_file_is_a_lost_lease(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with RunLease(tmp_path) as first:
        path.unlink()
        with pytest.raises(RunHeldError, match="lost"):
            first.check()
        with RunLease(tmp_path) as second:
            with pytest.raises(RunHeldError, match=str(os.getpid())):
                first.check()
            second.check()


def test_an_unusable_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"), RunLease(tmp_path / "file"):
        pass
    (tmp_path / "run" / FILE_NAME).mkdir(parents=True)
    with pytest.raises(StorageError, match=FILE_NAME), RunLease(tmp_path / "run"):
        pass


def contend(directory: Path, contenders: int) -> list[str]:
    """Let threads try at once; each winner holds until all have tried. Return the outcomes."""
    outcomes: list[str] = []
    ready = threading.Barrier(contenders)
    tried = threading.Barrier(contenders)

    def contender() -> None:
        ready.wait()
        try:
            with RunLease(directory) as lease:
                tried.wait()
                lease.check()
                outcomes.append("won")
        except RunHeldError:
            outcomes.append("refused")
            tried.wait()

    threads = [threading.Thread(target=contender) for _ in range(contenders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_many_contenders_wins(tmp_path: Path, stale: bool) -> None:
    for round_number in range(30):
        directory = tmp_path / str(round_number)
        if stale:
            leave_record(directory, seconds_ago=1)
        assert sorted(contend(directory, 4)) == ["refused"] * 3 + ["won"]


def test_without_kernel_locks_the_last_writer_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(file: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)
    path = leave_record(tmp_path, seconds_ago=100)
    beat = threading.Timer(0.2, os.utime, [path])
    beat.start()
    with pytest.raises(RunHeldError), RunLease(tmp_path):
        pass
    for round_number in range(3):
        directory = tmp_path / str(round_number)
        leave_record(directory, seconds_ago=400, machine="elsewhere")
        assert sorted(contend(directory, 4)) == ["refused"] * 3 + ["won"]


RACE = """
    import sys, time
    from pathlib import Path
    from ddk_jax.errors import RunHeldError
    from ddk_jax.training.lease import RunLease
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with RunLease(Path(sys.argv[1])) as lease:
            time.sleep(1)
            lease.check()
            print("won")
    except RunHeldError as error:
        print("refused")
        sys.exit(error.exit_code)
"""


@pytest.mark.slow
def test_one_of_many_processes_takes_a_stale_lease_over(tmp_path: Path) -> None:
    for round_number in range(3):
        directory = tmp_path / str(round_number)
        holder = start_holder(directory)
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=30)
        children = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(RACE), str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        outcomes = [child.communicate(timeout=60)[0] for child in children]
        assert sorted(outcomes) == ["refused\n", "refused\n", "won\n"]
        assert sorted(child.returncode for child in children) == [0, 75, 75]
