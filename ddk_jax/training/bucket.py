"""A run directory in a bucket (`gs://...`), where nothing can be appended to, renamed or locked.

Checkpoints are written into the bucket as they are. The small files of a run are written on the
disk of this machine, and copied whole: before every checkpoint, and when the run ends. What a
killed process has not copied are lines after its newest checkpoint, which a restart writes again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from etils import epath

from ddk_jax.errors import RunHeldError, StorageError, UserError
from ddk_jax.parallel import processes
from ddk_jax.places import AnyPath, bucket_errors
from ddk_jax.training.lease import (
    FILE_NAME,
    HEARTBEAT_SECONDS,
    STALE_SECONDS,
    Holder,
    RunLease,
    describe,
    held_by,
    new_holder,
)

_log = logging.getLogger(__name__)

SETTLE_SECONDS = 5.0
"""Wait to see which of two contenders wrote last."""
LOOK_SECONDS = 5.0
"""Time between two looks at the lease of another process."""


class RunFiles:
    """The small files of a run, where lines can be appended to them.

    A context manager; leaving it copies them a last time. Of several processes the first one alone
    has files to copy.

    Attributes:
      directory: the run directory itself, or what stands for one in a bucket on this machine.
    """

    def __init__(self, place: AnyPath) -> None:
        """Prepare for the run directory at `place`."""
        self._place = place
        self._copies = not isinstance(place, Path)
        self._copied: dict[str, tuple[int, int]] = {}
        self.directory = place if isinstance(place, Path) else Path()

    def __enter__(self) -> RunFiles:
        """Fetch what an earlier process has left."""
        if self._copies:
            self.directory = Path(tempfile.mkdtemp(prefix="ddk_run_"))
            if processes.is_first():
                with bucket_errors(self._place, "read"), suppress(FileNotFoundError):
                    self._fetch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Copy all; a failure is only logged when an exception is on its way out already."""
        try:
            self.push()
        except StorageError as failure:
            if error is None:
                raise
            _log.error("%s", failure)
        finally:
            if self._copies:
                shutil.rmtree(self.directory, ignore_errors=True)

    def push(self) -> None:
        """Copy into the bucket what is new, and delete there what is gone.

        Raises:
          StorageError: it cannot be written.
        """
        if not (self._copies and processes.is_first()):
            return
        found = {file.name: _state(file) for file in self.directory.iterdir()}
        with bucket_errors(self._place):
            for name in sorted(found):
                if self._copied.get(name) != found[name]:
                    (self._place / name).write_bytes((self.directory / name).read_bytes())
            for name in self._copied.keys() - found.keys():
                (self._place / name).unlink(missing_ok=True)
        self._copied = found

    def _fetch(self) -> None:
        for path in self._place.iterdir():
            if path.name != FILE_NAME and path.is_file():
                file = self.directory / path.name
                file.write_bytes(path.read_bytes())
                self._copied[path.name] = _state(file)


def _state(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns


def run_lease(place: AnyPath) -> RunLease | BucketLease:
    """The lease of the run directory at `place`."""
    return RunLease(place) if isinstance(place, Path) else BucketLease(place)


class BucketLease:
    """The right to write to a run directory in a bucket, for the time of a `with` block.

    Like `RunLease`, but without the kernel: a bucket has no locks, and here no conditions either.
    The record is written again every half minute, with a number that grows. A contender waits until
    it has not changed for five minutes (not at all, if its process was on this machine and is
    gone), writes its own, and looks a few seconds later who was the last to write. So two that
    start within these seconds may both go on until the next `check` of one of them.
    """

    def __init__(self, directory: epath.Path) -> None:
        """Prepare a lease on `directory`."""
        self._path = directory / FILE_NAME
        self._ours = new_holder(kernel_lock=False)
        self._beats = 0
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="run-lease", daemon=True)

    def check(self) -> None:
        """Make sure that the run is still ours. Takes a request.

        Raises:
          RunHeldError: another process took the lease over, or the record is gone: this process
            must not write any more.
          StorageError: the record cannot be read.
        """
        with bucket_errors(self._path, "read"):
            now = self._read()
        if now is None or now[0].token != self._ours.token:
            raise RunHeldError(
                f"this process lost the run directory {self._path.parent} to "
                f"{describe(now and now[0])}, and stops without writing any more"
            )

    def __enter__(self) -> BucketLease:
        with bucket_errors(self._path):
            if (previous := self._read()) is not None:
                self._outwait(*previous)
                _log.warning("taking %s over from %s", self._path, describe(previous[0]))
            self._write()
            time.sleep(SETTLE_SECONDS)
            last = self._read()
        if last is None or last[0].token != self._ours.token:
            raise held_by(self._path, last and last[0])
        self._heart.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._heart.join()
        with suppress(RunHeldError, StorageError), bucket_errors(self._path):
            self.check()
            self._path.unlink()

    def _outwait(self, holder: Holder, beats: int) -> None:
        """Wait until the lease of another process is stale; its next beat refuses ours."""
        here = self._ours.machine, self._ours.host  # the host too: containers share a kernel
        if (holder.machine, holder.host) == here and not _is_running(holder.pid):
            return
        _log.warning(
            "the run directory is held by %s; waiting %.0f seconds for a sign of life",
            describe(holder),
            STALE_SECONDS,
        )
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
            now = self._read()
            if now is None:
                return
            if now != (holder, beats):
                raise held_by(self._path, now[0])

    def _beat(self) -> None:
        """Thread: write the record again until the lease ends or is lost."""
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self.check()
                with bucket_errors(self._path):
                    self._write()
            except RunHeldError as error:
                _log.error("%s", error)
                return
            except UserError as error:
                _log.warning("no heartbeat: %s", error)

    def _write(self) -> None:
        self._beats += 1
        record: dict[str, Any] = dataclasses.asdict(self._ours) | {"beats": self._beats}
        self._path.write_text(json.dumps(record) + "\n")

    def _read(self) -> tuple[Holder, int] | None:
        """The record and its number; None for one that is absent or not whole."""
        try:
            record = json.loads(self._path.read_text())
            return Holder(**{k: v for k, v in record.items() if k != "beats"}), record["beats"]
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None


def _is_running(pid: int) -> bool:
    """Whether this machine has a process with that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
