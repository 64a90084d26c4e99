"""What the contenders of `step.py` share: the task, and how they take their steps in turn.

Each is a process of its own, with its own libraries and memory; one may run in another environment.
So nothing but the standard library is imported here. Both ends speak in lines: a word goes in, a
JSON object comes out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

KL_SHARE = 0.5
"""The loss: so much forward KL at temperature 1, the rest cross-entropy on the labels."""
LEARNING_RATE = 1e-4
BETAS = (0.9, 0.95)
EPS = 1e-8
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0

ROWS = "rows.npy"
"""In the folder of a task: the tokens [B, T + 1], and one Hugging Face directory each."""
TEACHER = "teacher"
STUDENT = "student"

CAN_RESET_PEAK = Path("/proc/self/clear_refs").exists()


class Taken(NamedTuple):
    """One step of a contender."""

    seconds: float
    loss: float
    """Before the update."""
    peak_bytes: int
    """The most that the process has held since `forget_peak`; 0 where the system does not say."""


# In the process of a contender


def private_stdout() -> TextIO:
    """The way to the other end; what libraries print goes to stderr from here on."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def serve(step: Callable[[], float], channel: TextIO) -> None:
    """Take a step whenever the other end asks for one, until it hangs up.

    Args:
      step: returns the loss, when the step is done.
      channel: from `private_stdout`.
    """
    _answer(channel, {"ready": True})
    for line in sys.stdin:
        if line.strip() == "forget":
            if CAN_RESET_PEAK:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            _answer(channel, {})
        else:
            start = time.perf_counter()
            loss = step()
            seconds = time.perf_counter() - start
            _answer(channel, {"seconds": seconds, "loss": loss, "peak_bytes": _peak_bytes()})


def _answer(channel: TextIO, found: Mapping[str, Any]) -> None:
    channel.write(json.dumps(found) + "\n")
    channel.flush()


def _peak_bytes() -> int:
    if not CAN_RESET_PEAK:
        return 0
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (found,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(found.split()[1]) * 1024


# On the other end


class Contender:
    """A process that takes steps when it is told to."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> None:
        """Start it.

        Args:
          name: for messages.
          command: argument list; the process calls `serve`.
          log: what it writes to stderr.
          environment: variables that it has besides ours.
        """
        self.name, self._log = name, log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(  # noqa: S603
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | dict(environment),
            )

    def __enter__(self) -> Contender:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        if error is not None:
            self._process.kill()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def wait(self) -> None:
        """Until it has loaded its models.

        Raises:
          ValueError: it ended instead; with the end of its log.
        """
        self._read()

    def step(self) -> Taken:
        """One step.

        Raises:
          ValueError: as of `wait`.
        """
        return Taken(**self._ask("step"))

    def forget_peak(self) -> None:
        """Memory is counted from here on."""
        self._ask("forget")

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; `_read` says so
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            raise ValueError("\n".join([f"{self.name} has ended:", *tail]))
        return json.loads(line)
