"""The run lease: one writer for a run directory.

`run.lock` names the process that writes to the run: its host, its process id, a token of its own
and the time it started. The holder keeps a kernel lock (flock) on the file, and touches it every
half minute: its heartbeat. So a second writer is refused

- on the same machine by the kernel, at once. It releases the lock however the holder ends; process
  ids, which are used again, decide nothing;
- on another machine that shares the directory by the next heartbeat. The lease is stale, and taken
  over, once there has been none for five minutes: the second writer waits for either.

A holder that lost its lease all the same (it was suspended for long, or someone deleted the file)
learns of it from `RunLease.check`, which the loop calls before each write that matters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
import weakref
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from etils import epath

from ddk_jax.errors import RunHeldError, StorageError

_log = logging.getLogger(__name__)

FILE_NAME = "run.lock"
STALE_SECONDS = 300.0
"""A lease of another machine is taken over when it has had no heartbeat for so long."""
HEARTBEAT_SECONDS = 30.0
"""Time between two heartbeats."""
SETTLE_SECONDS = 2.0
"""Wait, where no kernel lock decides between two contenders, to see which of them wrote last."""

_POLL_SECONDS = 1.0
# One write of a constant size: what is read is one contender's record, never parts of two.
_RECORD_BYTES = 1024
_NO_KERNEL_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


@dataclass(frozen=True)
class Holder:
    """The content of the lock file: who holds the run."""

    host: str
    """Name of the machine, for people."""
    machine: str
    """Identity of the running kernel; a kernel lock reaches as far as this is equal."""
    pid: int
    """Process id, for people."""
    token: str
    """Unique to one lease."""
    since: str
    """When the lease was taken: ISO 8601, UTC."""
    kernel_lock: bool
    """Whether the file system gave the holder a kernel lock."""


class RunLease:
    """The right to write to a run directory, for the time of a `with` block.

    Entering raises `RunHeldError` while another process holds the run, and `StorageError` where the
    lock file cannot be written. Leaving, by an exception too, sets the run free.
    """

    def __init__(self, directory: Path) -> None:
        """Prepare a lease on `directory`, which is created when the lease is taken."""
        self._path = Path(directory).absolute() / FILE_NAME
        self._file: int | None = None
        self._token = ""
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def check(self) -> None:
        """Make sure that the run is still ours. Takes microseconds.

        Raises:
            RunHeldError: another process took the lease over, or the lock file is gone: this
                process must not write any more.
        """
        assert self._file is not None, "the lease is not held"
        holder = _read(self._file)
        if holder is None or holder.token != self._token or not _is_at(self._file, self._path):
            now = _read_path(self._path)
            raise RunHeldError(
                f"this process lost the run directory {self._path.parent} to {describe(now)}, and "
                "stops without writing any more"
            )

    def __enter__(self) -> RunLease:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise StorageError(
                f"cannot lock {self._path}: {error}; check its permissions and the free space"
            ) from error
        self._stop.clear()
        self._heart = threading.Thread(target=self._beat, name="run-lease", daemon=True)
        self._heart.start()
        _held.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _held.discard(self)
        if self._file is None or self._heart is None:
            return
        self._stop.set()
        self._heart.join()
        # Delete before unlocking: a contender that opened the old file sees that it is gone.
        with contextlib.suppress(RunHeldError, OSError):
            self.check()
            self._path.unlink()
        self._close()

    def _take(self) -> None:
        """Open and lock the file, and write our record if nobody else's is valid."""
        locked = self._open()
        assert self._file is not None
        try:
            previous = _read(self._file)
            ours = new_holder(kernel_lock=locked)
            decided = locked and (
                previous is None or (previous.machine == ours.machine and previous.kernel_lock)
            )
            if previous is not None:
                if not decided:
                    self._outwait(self._file, previous)
                _log.warning("taking %s over from %s", self._path, describe(previous))
            self._token = ours.token
            _write(self._file, ours)
            if not decided:
                time.sleep(SETTLE_SECONDS)
                last = _read_path(self._path)
                if last is None or last.token != ours.token:
                    raise held_by(self._path, last)
        except BaseException:
            self._close()
            raise

    def _outwait(self, file: int, holder: Holder) -> None:
        """Wait until the lease of another machine is stale; its next heartbeat refuses ours."""
        beat = os.fstat(file).st_mtime
        if (left := STALE_SECONDS - _age(file, self._path.parent)) > 0:
            _log.warning(
                "the run directory was held by %s; waiting up to %.0f seconds for a sign of life",
                describe(holder),
                left,
            )
        while (left := STALE_SECONDS - _age(file, self._path.parent)) > 0:
            time.sleep(min(_POLL_SECONDS, left))
            if os.fstat(file).st_mtime != beat or not _is_at(file, self._path):
                raise held_by(self._path, holder)

    def _open(self) -> bool:
        """Open the lock file and lock it; return whether the file system has kernel locks."""
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                locked = _kernel_lock(self._file)
            except BlockingIOError as error:
                holder = _read(self._file)
                self._close()
                raise held_by(self._path, holder) from error
            except OSError:
                self._close()
                raise
            if _is_at(self._file, self._path):
                return locked
            # The holder left between our opening and locking, and deleted what we opened.
            self._close()

    def _beat(self) -> None:
        """Thread: touch the file until the lease ends or is lost."""
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self.check()
                assert self._file is not None
                os.utime(self._file)
            except RunHeldError as error:
                _log.error("%s", error)
                return
            except OSError as error:
                _log.warning("no heartbeat to %s: %s", self._path, error)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


_held: weakref.WeakSet[RunLease] = weakref.WeakSet()


def _close_in_child() -> None:
    """Let go in a forked child, which would keep the kernel lock beyond its parent's death."""
    for lease in list(_held):
        lease._close()
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _kernel_lock(file: int) -> bool:
    """Lock an open file against other processes; return False where that is not supported.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_KERNEL_LOCKS:
            raise
        _log.warning("no kernel locks here (%s): relying on heartbeats", error)
        return False
    return True


def new_holder(*, kernel_lock: bool) -> Holder:
    """The record of this process, with a new token."""
    return Holder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        token=uuid.uuid4().hex,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        kernel_lock=kernel_lock,
    )


def _machine() -> str:
    """Return an identity that two processes share when they run on one kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()}-{uuid.getnode():x}"


def _write(file: int, holder: Holder) -> None:
    record = json.dumps(dataclasses.asdict(holder)).encode()
    os.pwrite(file, record.ljust(_RECORD_BYTES - 1) + b"\n", 0)
    os.fsync(file)


def _read(file: int) -> Holder | None:
    """Return the record in an open lock file; None for one that is empty or not whole."""
    try:
        return Holder(**json.loads(os.pread(file, _RECORD_BYTES, 0)))
    except (ValueError, TypeError):
        return None


def _read_path(path: Path) -> Holder | None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _read(file)
    finally:
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Return whether the open file is the one that the path names now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _age(file: int, directory: Path) -> float:
    """Return the seconds since the last heartbeat, by the clock of the file system."""
    with tempfile.TemporaryFile(dir=directory) as probe:
        return os.fstat(probe.fileno()).st_mtime - os.fstat(file).st_mtime


def describe(holder: Holder | None) -> str:
    """Who holds a run, for a message."""
    if holder is None:
        return "another process"
    return f"process {holder.pid} on {holder.host} (since {holder.since})"


def held_by(path: Path | epath.Path, holder: Holder | None) -> RunHeldError:
    """The error of a process that finds the record of another one at `path`."""
    return RunHeldError(
        f"the run directory {path.parent} is held by {describe(holder)}: wait for it, stop it, or "
        "choose another run.dir"
    )
