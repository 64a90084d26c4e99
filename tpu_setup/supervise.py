"""Runs a training command and starts it again after a crash, as long as it makes progress.

    python supervise.py --run-dir RUN_DIR --log log.txt -- ddk train CONFIG --run.dir RUN_DIR

What happens when the command ends depends on its exit code:

    0                   finished, or stopped and saved: done
    3, 64, 65, 70, 75   would end the same way again (does not fit, usage, data, diverged, the run
                        is held by another process): done
    126, 127, 130       cannot be run, or interrupted by the user: done
    any other           a crash, or storage that did not answer (74): started again

after a pause that doubles from attempt to attempt. When it has been started again three times
without a new checkpoint, that is the end too. The supervisor's own exit code is that of the last
attempt, with 128 + N for signal N.

SIGTERM and SIGINT are passed on to the command, which then saves and ends; it is not started again.
Every host of a slice runs its own supervisor: when one process of a run dies, the others end by
themselves (exit code 134), and all supervisors start theirs again.

Only the standard library is needed, and `gcloud` where the run directory or the copy of the log is
on gs://. Works on any machine, with or without a TPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO

FINAL = {0, 3, 64, 65, 70, 75, 126, 127, 130}
"""Exit codes after which another attempt would be of no use."""
SUMMARY = "summary.json"
"""File in the run directory that only a finished run has."""

_CANNOT_RUN, _NOT_FOUND = 126, 127
_TICK_SECONDS = 0.2
_LOOK_SECONDS = 300.0
_GCLOUD_SECONDS = 120.0


def is_remote(path: str) -> bool:
    """Whether `gcloud storage` reads the path, and not the file system."""
    return path.startswith("gs://")


def gcloud(*words: str) -> str | None:
    """Output of `gcloud storage WORDS`; None if it fails, which is no reason to end a run."""
    try:
        done = subprocess.run(  # noqa: S603
            ["gcloud", "storage", *words],  # noqa: S607
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GCLOUD_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def newest_step(run_dir: str) -> int | None:
    """Step of the newest checkpoint of a run; None if there is none, or it cannot be told."""
    place = run_dir.rstrip("/") + "/checkpoints/"
    if is_remote(run_dir):
        names = [
            line.rstrip("/").rsplit("/", 1)[-1] for line in (gcloud("ls", place) or "").split()
        ]
    else:
        try:
            names = os.listdir(place)
        except OSError:
            names = []
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=None)


def is_finished(run_dir: str) -> bool:
    """Whether a run has reached its last step."""
    path = run_dir.rstrip("/") + "/" + SUMMARY
    return gcloud("ls", path) is not None if is_remote(run_dir) else Path(path).is_file()


class Supervisor:
    """One command, and what is known of its attempts."""

    def __init__(self, command: Sequence[str], options: argparse.Namespace) -> None:
        """Prepare to run `command`; see `read_arguments` for the options."""
        self._command = list(command)
        self._options = options
        self._child: subprocess.Popen[bytes] | None = None
        self._stop: int | None = None
        self._stopped_at = 0.0
        self._step: int | None = None
        self._futile = 0
        self._log: IO[bytes] | None = open(options.log, "ab") if options.log else None

    def run(self) -> int:
        """Run the command until there is nothing more to do; return the exit code."""
        signal.signal(signal.SIGTERM, self._pass_on)
        signal.signal(signal.SIGINT, self._pass_on)
        self._look()
        pause = self._options.backoff
        while True:
            before = self._step
            code = self._attempt()
            self._look()
            if self._step != before:
                self._futile, pause = 0, self._options.backoff
            if self._stop is not None or code in FINAL:
                return self._end(code)
            if self._futile >= self._options.max_restarts:
                self._say(f"{self._futile} restarts without a new checkpoint: giving up")
                return self._end(code)
            self._futile += 1
            self._say(
                f"starting again in {pause:g} seconds (restart {self._futile} of "
                f"{self._options.max_restarts} without a new checkpoint)"
            )
            self._note("waiting", code)
            self._wait_until(time.monotonic() + pause)
            if self._stop is not None:
                return self._end(code)
            pause = min(2 * pause, self._options.max_backoff)

    def _attempt(self) -> int:
        """Run the command once; return its exit code, 128 + N for signal N."""
        self._say(f"starting {' '.join(self._command)}")
        self._note("running", None)
        try:
            # A session of its own: Ctrl-C reaches it once, through us, and workers can be found.
            self._child = subprocess.Popen(  # noqa: S603
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT if self._log else None,
                start_new_session=True,
            )
        except OSError as error:
            self._say(f"cannot start {self._command[0]}: {error.strerror}")
            return _NOT_FOUND if isinstance(error, FileNotFoundError) else _CANNOT_RUN
        if self._stop is not None:  # told to stop in between
            self._child.send_signal(self._stop)
        code = self._wait_for_child(self._child)
        # Workers that outlived it would hold the chips. None are left after an orderly end.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child = None
        code = 128 - code if code < 0 else code
        self._say(f"ended with code {code}")
        self._copy_log()
        return code

    def _wait_for_child(self, child: subprocess.Popen[bytes]) -> int:
        look = time.monotonic() + _LOOK_SECONDS
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(_TICK_SECONDS)
            now = time.monotonic()
            if self._stop is not None and now > self._stopped_at + self._options.grace:
                self._say(
                    f"still running {self._options.grace:g} seconds after the signal: killing it"
                )
                child.kill()
                return child.wait()
            if self._stop is None and now > look:
                self._look()
                self._note("running", None)
                self._copy_log()
                look = time.monotonic() + _LOOK_SECONDS

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the command is told once; it decides how it ends."""
        if self._stop is None:
            self._stop, self._stopped_at = number, time.monotonic()
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(number)

    def _wait_until(self, moment: float) -> None:
        while self._stop is None and (left := moment - time.monotonic()) > 0:
            time.sleep(min(_TICK_SECONDS, left))

    def _look(self) -> None:
        """Look for checkpoints newer than any before."""
        step = newest_step(self._options.run_dir) if self._options.run_dir else None
        if step is not None:
            self._step = step if self._step is None else max(step, self._step)

    def _end(self, code: int) -> int:
        if code == 0:
            run_dir = self._options.run_dir
            state = "finished" if not run_dir or is_finished(run_dir) else "stopped"
        else:
            state = "failed" if self._stop is None else "stopped"
        self._say(f"{state}, code {code}, newest checkpoint {self._step_text()}")
        self._note(state, code)
        self._copy_log()
        return code

    def _step_text(self) -> str:
        return "-" if self._step is None else str(self._step)

    def _say(self, message: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = f"{now} supervise: {message}\n"
        with contextlib.suppress(OSError):  # a full disk is no reason to leave the run alone
            if self._log:
                self._log.write(line.encode())
                self._log.flush()
            else:
                sys.stderr.write(line)
                sys.stderr.flush()

    def _note(self, state: str, code: int | None) -> None:
        """Write the state file, KEY=VALUE lines, whole or not at all."""
        if not self._options.state:
            return
        lines = {
            "state": state,
            "code": "-" if code is None else code,
            "step": self._step_text(),
            "restarts": self._futile,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "pid": os.getpid(),
        }
        with contextlib.suppress(OSError):
            partial = Path(f"{self._options.state}.partial")
            partial.write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
            partial.replace(self._options.state)

    def _copy_log(self) -> None:
        if self._log and self._options.copy_log_to:
            gcloud("cp", str(self._options.log), self._options.copy_log_to)


def read_arguments(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command after `--`."""
    parser = argparse.ArgumentParser(
        prog="supervise.py",
        description="Run a training command and start it again after a crash.",
        epilog="See the top of the file for what each exit code leads to.",
    )
    parser.add_argument("--run-dir", default="", help="where its checkpoints show progress")
    parser.add_argument("--log", default="", help="file for what it prints; default: the terminal")
    parser.add_argument("--state", default="", help="file that says how things stand")
    parser.add_argument("--copy-log-to", default="", metavar="URI", help="gs:// name for a copy")
    parser.add_argument("--max-restarts", type=int, default=3, help="in a row without a checkpoint")
    parser.add_argument("--backoff", type=float, default=10.0, help="seconds before the first one")
    parser.add_argument("--max-backoff", type=float, default=300.0, help="seconds before any")
    parser.add_argument(
        "--grace", type=float, default=600.0, help="seconds from SIGTERM to SIGKILL"
    )
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what to run")
    options = parser.parse_args(words)
    return options, options.command


def main() -> int:
    """Supervise the command of the command line."""
    options, command = read_arguments()
    return Supervisor(command, options).run()


if __name__ == "__main__":
    sys.exit(main())
