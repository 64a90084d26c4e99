"""The record of a run: metrics.jsonl, one JSON object a line, and the line that shows progress.

Every line has an `event`, one of the classes below, whose fields are the keys. `step` is the number
of finished optimiser steps; losses are nats per predicted token; a number that is not finite is
written as null. All that depends on the clock is under `timing`, so two runs from one config write
the same lines but for that key (and for when a `checkpoint` line appears, which is when its
background save ends).

A run that resumes from the checkpoint of step N calls `truncate_after(path, N)` before it writes.
That is exact because the loop writes everything about step N (`step`, then `evaluation` and
`mixture`) before it captures the state of the checkpoint at N; the lines of later steps are written
anew. A run that starts from scratch calls `truncate_after(path, -1)`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, SupportsFloat, SupportsInt

from tqdm.auto import tqdm

from ddk_jax.errors import StorageError
from ddk_jax.places import AnyPath, bucket_errors

_log = logging.getLogger(__name__)

ORPHAN_SUFFIX = ".orphan"

Numbers = Sequence[SupportsFloat | None] | Any
"""One number for each domain, in the order of the run's domains: a sequence or a 1-D array."""


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """Clock of one training step."""

    seconds: float
    """From the end of the previous step to the end of this one."""
    tokens_per_second: float
    """Predicted tokens of this step over those seconds."""
    data_wait_seconds: float
    """Part of those seconds in which the loop waited for a batch."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Clock of anything else."""

    seconds: float
    """Duration."""


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One optimiser step."""

    event: ClassVar[str] = "step"
    step: int
    """Number of this step, from 1."""
    tokens: SupportsInt
    """Predicted tokens since the start of the run, this step included."""
    loss: SupportsFloat
    """The objective."""
    terms: Mapping[str, SupportsFloat]
    """Mean nats per token of each term of the objective, by its name."""
    domain_nats: Mapping[str, Numbers]
    """The same by domain; null for a domain without tokens in this step."""
    domain_tokens: Numbers
    """Predicted tokens of this step, by domain."""
    learning_rate: SupportsFloat
    """Learning rate of this step."""
    grad_norm: SupportsFloat
    """Global norm of the gradient, before clipping."""
    skipped: SupportsInt
    """1 when the update was not finite and therefore not applied."""
    timing: StepTiming
    """Clock."""


@dataclass(frozen=True, kw_only=True)
class EvaluationEvent:
    """A measurement of both models on the validation rows of every domain."""

    event: ClassVar[str] = "evaluation"
    step: int
    """Steps that the measured student has had; 0 is the student before training."""
    tokens_seen: SupportsInt
    """Predicted tokens that it was trained on."""
    domains: Sequence[str]
    """Names of the domains."""
    student_nats: Numbers
    """Nats per token of the student, by domain."""
    teacher_nats: Numbers | None
    """Nats per token of the teacher, by domain; null without a teacher."""
    tokens: Numbers
    """Predicted validation tokens, by domain."""
    timing: Timing
    """Clock."""


@dataclass(frozen=True, kw_only=True)
class MixtureEvent:
    """New weights of the data mixture."""

    event: ClassVar[str] = "mixture"
    step: int
    """Steps finished when the weights were set."""
    start_row: SupportsInt
    """First training row that they apply to."""
    domains: Sequence[str]
    """Names of the domains."""
    weights: Numbers
    """Share of the rows, by domain."""
    gap: Numbers | None
    """Gap to the teacher, by domain; null where none was measured."""
    gap_kind: str
    """Name of the gap's definition."""
    controller: str
    """Name of the rule that the weights follow from."""
    ratio: Numbers | None
    """Perplexity of the student over the teacher's, by domain; null without a teacher."""
    share: Numbers | None
    """Share of the training tokens since the last event, by domain; null before the first step."""
    slope: Numbers | None
    """Change of the student's nats since the last event, per million training tokens of all
    domains; null before the first step."""
    loss_weights: Numbers | None = None
    """Weight of each domain in the loss of the next step; null where the rows are weighed."""


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent:
    """A checkpoint that is complete on disk."""

    event: ClassVar[str] = "checkpoint"
    step: int
    """Steps finished when its state was captured; the line may follow those of later steps."""
    timing: Timing
    """Clock of the save, in the background."""


Event = StepEvent | EvaluationEvent | MixtureEvent | CheckpointEvent


class MetricsWriter:
    """Appends events to a file; each is handed to the operating system at once.

    A context manager. A kill of the process loses nothing that was written, but may leave the last
    line torn, which `read_metrics` ignores and `truncate_after` removes.
    """

    def __init__(self, path: Path | None) -> None:
        """Open `path` for appending; None takes events and writes none of them.

        Raises:
            StorageError: it cannot be opened.
        """
        self._file = None
        if path is None:
            return
        self._path = Path(path)
        try:
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def write(self, event: Event) -> None:
        """Append one line.

        Raises:
            StorageError: it cannot be written, for instance because the disk is full.
        """
        if self._file is None:
            return
        line = json.dumps({"event": event.event, **to_json(event)}, allow_nan=False)
        rest = memoryview(line.encode() + b"\n")
        try:
            # One call for a whole line, as a rule; a disk that fills up takes a part first.
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def sync(self) -> None:
        """Wait until all lines are on the disk, so that they survive the loss of power.

        The loop calls it before a checkpoint, which promises that the lines up to its step exist.

        Raises:
            StorageError: the operating system could not write them.
        """
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def to_json(value: Any) -> Any:
    """Turn events, numbers and arrays into what JSON can hold: a number not finite into None.

    Floats keep every digit, so equal values give equal text.

    Args:
        value: a dataclass, mapping, sequence, number, string or None; numpy and jax arrays and
            scalars are taken by their `tolist`.
    """
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def read_metrics(path: AnyPath) -> list[dict[str, Any]]:
    """Read all lines of a metrics file, without a torn last one.

    Raises:
        StorageError: the file is missing, or another line than the last is not a JSON object.
    """
    lines, broken = _parse(path)
    if broken:
        raise StorageError(
            f"{path}:{broken[0]}: not a JSON object; the file was damaged or edited: correct or "
            "delete that line"
        )
    return [event for _, event in lines]


def truncate_after(path: Path, step: int) -> int:
    """Move the lines of later steps than `step` to `<path>.orphan`, and drop a torn last line.

    Lines that cannot be read, or have no step, are moved as well and reported as a warning. Killed
    half way and called again, it may leave a line twice in the orphan file, never in the other.

    Args:
        path: the metrics file; it need not exist.
        step: the step that the run continues from; -1 to start from scratch.

    Returns:
        The number of lines moved.

    Raises:
        StorageError: the files cannot be read or written.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines, broken = _parse(path)
    keep = {number for number, event in lines if _step(event) <= step}
    if broken:
        _log.warning("%s: moved unreadable lines to %s%s: %s", path, path, ORPHAN_SUFFIX, broken)
    try:
        return _split(path, keep)
    except OSError as error:
        raise _unwritable(path, error) from error


def _step(event: Mapping[str, Any]) -> int | float:
    """Return the step of a line; one without a step belongs to none."""
    step = event.get("step")
    return step if isinstance(step, int | float) else math.inf


def _split(path: Path, keep: set[int]) -> int:
    """Rewrite `path` with the lines numbered in `keep`; the other whole ones go to the orphan."""
    raw = path.read_bytes().split(b"\n")
    # What follows the last line end is empty, or torn.
    whole = raw[:-1]
    kept = [line for number, line in enumerate(whole, 1) if number in keep]
    moved = [line for number, line in enumerate(whole, 1) if number not in keep]
    if moved:
        with path.with_name(path.name + ORPHAN_SUFFIX).open("ab") as orphan:
            orphan.write(b"".join(line + b"\n" for line in moved))
            orphan.flush()
            os.fsync(orphan.fileno())
    if moved or raw[-1]:
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(b"".join(line + b"\n" for line in kept))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return len(moved)


def _parse(path: AnyPath) -> tuple[list[tuple[int, dict[str, Any]]], list[int]]:
    """Return (line number, event) of the good lines, and the numbers of the broken ones."""
    try:
        with bucket_errors(path, "read"):
            whole = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}; is this a run directory?") from error
    good: list[tuple[int, dict[str, Any]]] = []
    broken: list[int] = []
    for number, line in enumerate(whole, 1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict):
            good.append((number, event))
        else:
            broken.append(number)
    return good, broken


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error}; check its permissions and the free space")


class ProgressLine:
    """Shows how far the run is: a bar where someone watches, plain log lines elsewhere.

    A bar on standard error where that is a terminal, and in a notebook, with loss, tokens per
    second and the time left. Otherwise a log line every few steps; beside the bar these lines have
    the level debug, for a log file that wants them.
    """

    def __init__(
        self,
        *,
        steps: int,
        first_step: int = 0,
        log_every_steps: int,
        clock: Callable[[], float] = time.monotonic,
        shown: bool = True,
    ) -> None:
        """Start the clock, and the bar if there is one.

        Args:
            steps: number of the run's last step.
            first_step: finished steps at the start; that of the checkpoint for a resumed run.
            log_every_steps: steps between two log lines.
            clock: seconds from an arbitrary start.
            shown: whether there may be a bar; of several processes, one shows it.
        """
        self._steps = steps
        self._log_every_steps = log_every_steps
        self._clock = clock
        # The first step compiles; the time left is reckoned from the end of it.
        self._origin: tuple[int, float] | None = None
        self._bar = (
            tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)
            if shown and is_watched()
            else None
        )

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Show that `step` steps are finished.

        Args:
            step: finished steps.
            loss: objective of that step.
            tokens_per_second: speed, over any recent span.
        """
        now = self._clock()
        if self._origin is None:
            self._origin = step, now
        if self._bar is not None:
            # tqdm draws at most ten times a second by itself.
            self._bar.set_postfix_str(
                f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False
            )
            self._bar.update(step - self._bar.n)
        if step % self._log_every_steps == 0 or step == self._steps:
            _log.log(
                logging.INFO if self._bar is None else logging.DEBUG,
                "step %d/%d  loss %.4f  %s tokens/s  %s left",
                step,
                self._steps,
                loss,
                f"{tokens_per_second:,.0f}",
                _duration(self._seconds_left(step, now)),
            )

    def _seconds_left(self, step: int, now: float) -> float | None:
        assert self._origin is not None
        first, start = self._origin
        if step == first:
            return None
        return (now - start) / (step - first) * (self._steps - step)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def is_watched() -> bool:
    """Whether standard error is a terminal, or a Jupyter kernel's, which looks like none."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
