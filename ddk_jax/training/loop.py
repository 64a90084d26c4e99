"""The training loop: steps, and once in a while a measurement, new weights, a checkpoint."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddk_jax.config import Config
from ddk_jax.errors import DivergedError, UserError
from ddk_jax.mixture.gaps import discrepancy
from ddk_jax.parallel import processes
from ddk_jax.places import resolve_place
from ddk_jax.training.bucket import RunFiles, run_lease
from ddk_jax.training.build import Job
from ddk_jax.training.checkpoint import Checkpoints, Saved
from ddk_jax.training.evaluate import DomainNats
from ddk_jax.training.memory import give_back
from ddk_jax.training.metrics import (
    CheckpointEvent,
    EvaluationEvent,
    MetricsWriter,
    ProgressLine,
    StepEvent,
    StepTiming,
    Timing,
    to_json,
    truncate_after,
)
from ddk_jax.training.optimizer import learning_rate
from ddk_jax.training.preemption import Preemption
from ddk_jax.training.rundir import SUMMARY, log_file, open_run, write_whole
from ddk_jax.training.state import StepSums, TrainState

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run came to; `summary.json` of a finished one."""

    steps: int
    tokens: int
    """Predicted training tokens."""
    stop_reason: str
    """`steps`, `tokens`, `intervals`, `discrepancy`, or `preempted` (saved, to be continued)."""
    domains: tuple[str, ...]
    student_nats_before: list[float | None]
    """Validation nats per token by domain before the first step; None where not finite."""
    student_nats_after: list[float | None]
    """The same after the last step."""
    teacher_nats: list[float | None] | None
    """The teacher's; None without one."""
    weights: list[float]
    """The last weights of the mixture."""
    average_weights: list[float]
    """Their mean over the intervals: a later run can take it as its `mixture.prior`."""
    tokens_per_domain: list[int]
    config_digest: str
    timing: dict[str, float]
    """`wall_seconds` and `tokens_per_second`, since the run was last started."""


def train(config: Config) -> RunSummary:
    """Run a config to its end, or continue where its run directory stands.

    Killed at any moment and called again, it ends with the same bits as without the interruption.
    Called again after the end, it returns the same summary and trains no more.

    Several processes (`ddk_jax.parallel.processes`) all call this. They compute together; the first
    one decides, and is the only one that writes anything but its part of a checkpoint.

    Raises:
      UserError and its kinds (`ddk_jax.errors`): each with its exit code.
    """
    processes.join()
    place = resolve_place(config.run.dir)
    lease = run_lease(place) if processes.is_first() else None
    with (
        processes.together(),
        lease or nullcontext(),
        RunFiles(place) as files,
        log_file(files.directory / "log.txt" if lease else None),
        Preemption() as preemption,
    ):
        if len(set(processes.gather(config.digest()))) > 1:
            raise UserError(
                "the processes of this run have different settings: start all of them with the "
                "same command and the same config"
            )
        if (finished := _read_summary(files.directory, config)) is not None:
            _log.info("event=end step=%d: finished before", finished.steps)
            return finished
        job = Job(config)
        with processes.first_goes_first():
            job.check()
        processes.from_first(lambda: open_run(config, files.directory, job.commits(), place))
        files.push()
        with (
            Checkpoints(place / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
            _Run(job, files, checkpoints) as run,
        ):
            run.start()
            while (stop := run.stop_reason()) is None and not preemption.requested():
                run.one_step()
                if run.step % config.mixture.interval_steps == 0:  # once in an interval
                    run.evaluate()
                    if run.stop_reason() is None:
                        run.steer()
                every = config.checkpoint.every_steps
                if every and run.step % every == 0 and run.stop_reason() is None:
                    if lease:
                        lease.check()  # once in a while
                    run.save()
            if stop is None:
                _log.warning("told to stop: saving step %d", run.step)
            else:
                run.evaluate()
            if lease:
                lease.check()
            run.save()
            summary = run.summary(stop or "preempted")
        if stop is not None and lease:
            write_whole(files.directory / SUMMARY, json.dumps(to_json(summary), indent=1) + "\n")
        _log.info("event=end step=%d reason=%s", summary.steps, summary.stop_reason)
        return summary


def _read_summary(run_dir: Path, config: Config) -> RunSummary | None:
    """The summary of a finished run of this very config, if that is what the directory holds."""

    def read() -> Any:
        try:
            return json.loads((run_dir / SUMMARY).read_text())
        except (OSError, ValueError):
            return None

    try:
        tree = processes.from_first(read)
        summary = RunSummary(**tree | {"domains": tuple(tree["domains"])})
    except (TypeError, KeyError):
        return None
    return summary if summary.config_digest == config.digest() else None


class _Run:
    """What the loop changes, and the actions that change it."""

    def __init__(self, job: Job, files: RunFiles, checkpoints: Checkpoints) -> None:
        self.job, self.config, self.files = job, job.config, files
        self.checkpoints = checkpoints
        self.step = 0
        self.tokens_per_domain = np.zeros(len(job.domains), np.int64)
        self.before: list[float | None] = []
        self.measured: tuple[int, DomainNats] | None = None
        self.gap = math.nan
        self._pending: _Pending | None = None
        self.waited = 0.0
        self._compiled = False
        self._saved_step = -1
        self._said_epochs: dict[str, int] = {}

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("pipeline", "progress", "metrics"):
            if (part := getattr(self, name, None)) is not None:
                part.close()

    def start(self) -> None:
        """Build the parts, then restore the newest checkpoint, or measure the untrained student."""
        job, config = self.job, self.config
        self.started = time.monotonic()
        self.teacher_nats = job.teacher_nats()
        self.train_step = job.train_step()
        self.schedule = learning_rate(config.optim, config.train.steps)
        self.steering = job.steering(self.teacher_nats)
        weights = processes.from_first(self.steering.weights.tolist)
        self.pipeline = job.pipeline(np.array(weights))

        restored = self.checkpoints.restore_latest(job.abstract_state())
        lines, last = self.files.directory / "metrics.jsonl", restored.step if restored else -1
        processes.from_first(lambda: truncate_after(lines, last))
        self.metrics = MetricsWriter(lines if processes.is_first() else None)
        if restored is None:
            self.state: TrainState = job.initial_state()
            self.evaluate()
            self.steer()
            rows = config.train.steps * config.train.rows_per_step
            for sentence in self.pipeline.shortages(self.steering.weights, rows):
                _log.warning("%s", sentence)
        else:
            _log.info("event=resume step=%d", restored.step)
            self.state, self.step = restored.state, restored.step
            self._saved_step = restored.step
            self._restore_host(restored.host)
        self.first_tokens = int(self.tokens_per_domain.sum())
        self.clock = time.monotonic()
        self.progress = ProgressLine(
            steps=config.train.steps,
            first_step=self.step,
            log_every_steps=config.run.log_every_steps,
            shown=processes.is_first(),
        )

    def one_step(self) -> None:
        """Dispatch a step; then, while it runs, report the one before."""
        waiting = time.monotonic()
        host, _ = next(self.pipeline)
        self.waited += time.monotonic() - waiting
        batch = self.job.place(host)
        loss_weights = None
        if self.steering.loss_weights is not None:
            self._report()  # these weights follow from the step before
            said = processes.from_first(lambda: to_json(self.steering.loss_weights))
            loss_weights = np.array(said)
        self.state, sums = self.train_step(self.state, self.job.weighed(loss_weights), batch)
        if not self._compiled:
            give_back()
            self._compiled = True
        self.step += 1
        self._report()
        self._pending = _Pending(self.step, sums)
        for saved in self.checkpoints.poll():
            self._saved(saved)

    def evaluate(self) -> None:
        """Measure the student on every domain, unless this step's student has been."""
        if self.measured is not None and self.measured[0] == self.step:
            return
        self._report()
        start = time.monotonic()
        student = self.job.start.whole(self.state.params["student"])
        nats = self.job.measure(self.job.student, student)
        self.before = self.before or to_json(nats.nats)
        self._take(self.step, nats)
        teacher = self.teacher_nats
        self.metrics.write(
            EvaluationEvent(
                step=self.step,
                tokens_seen=int(self.tokens_per_domain.sum()),
                domains=self.job.domains,
                student_nats=nats.nats,
                teacher_nats=None if teacher is None else teacher.nats,
                tokens=nats.tokens,
                timing=Timing(seconds=time.monotonic() - start),
            )
        )
        gap = "" if teacher is None else f" gap={self.gap:.4f}"
        _log.info("event=evaluation step=%d nats=%.4f%s", self.step, nats.nats.mean(), gap)
        self.clock = time.monotonic()  # not part of the next step

    def _take(self, step: int, nats: DomainNats) -> None:
        """Remember a measurement, and how far it is from the teacher's: all processes alike."""
        self.measured = step, nats
        if (teacher := self.teacher_nats) is not None:
            self.gap = processes.from_first(lambda: discrepancy(nats.nats, teacher.nats))

    def steer(self) -> None:
        """Turn what was measured into weights, from the next row on."""
        self._report()
        start_row, weights, state = processes.from_first(self._decided)
        if not processes.is_first():
            self.steering.restore(state)
        self.pipeline.set_weights(np.array(weights), start_row)
        domains = self.job.domains
        for name, times in zip(domains, self.pipeline.epochs(), strict=True):
            if times >= self._said_epochs.get(name, 0) + 1:
                self._said_epochs[name] = int(times)
                _log.info("event=epoch domain=%s gone_through=%.1f", name, times)
        shares = " ".join(f"{n}={w:.3f}" for n, w in zip(domains, weights, strict=True))
        _log.info("event=mixture step=%d start_row=%d %s", self.step, start_row, shares)

    def _decided(self) -> tuple[int, list[float], dict[str, Any]]:
        """First row and weights of the next interval, and the state of the steering after it."""
        assert self.measured is not None
        event = self.steering.decide(self.step, self.measured[1].nats, self.tokens_per_domain)
        start_row = int(event.start_row)
        # What the controller wants, as far as the limits of the domains allow.
        weights = self.pipeline.within_epochs(
            self.steering.weights, start_row, self._rows_until_steered, self._max_epochs
        )
        self.metrics.write(replace(event, weights=weights))
        return start_row, weights.tolist(), self.steering.to_json()

    @property
    def _rows_until_steered(self) -> int:
        train = self.config.train
        steps = min(self.config.mixture.interval_steps, train.steps - self.step)
        return max(steps, 1) * train.rows_per_step

    @property
    def _max_epochs(self) -> list[float]:
        limits = {domain.name: domain.max_epochs for domain in self.config.data.domains}
        return [limits.get(name, 0.0) for name in self.job.domains]

    def save(self) -> None:
        """Start a checkpoint of this step, unless there is one."""
        if self._saved_step == self.step:
            return
        self._report()
        self.metrics.sync()
        self.files.push()
        _log.info("event=save_start step=%d", self.step)
        host = {
            "pipeline": self.pipeline.state,
            "steering": self.steering.to_json(),
            "tokens_per_domain": self.tokens_per_domain.tolist(),
            "before": self.before,
            "measured": None
            if self.measured is None
            else [self.measured[0], *(to_json(x) for x in self.measured[1])],
            "inputs": self._inputs(),
            "digest": self.config.digest(),
        }
        self.checkpoints.save(self.step, self.state, host)
        self._saved_step = self.step
        self.clock = time.monotonic()

    def stop_reason(self) -> str | None:
        """Why the run is over, if it is."""
        train, step = self.config.train, self.step
        if train.max_tokens:
            self._report()
        if step >= train.steps:
            return "steps"
        if train.max_tokens and self.tokens_per_domain.sum() >= train.max_tokens:
            return "tokens"
        if train.max_intervals and step >= train.max_intervals * self.config.mixture.interval_steps:
            return "intervals"
        if train.stop_discrepancy and self.gap < train.stop_discrepancy:
            return "discrepancy"
        return None

    def summary(self, reason: str) -> RunSummary:
        """Wait for the last save, and sum the run up."""
        self._report()
        for saved in self.checkpoints.wait():
            self._saved(saved)
        seconds = time.monotonic() - self.started
        tokens = int(self.tokens_per_domain.sum())
        teacher = self.teacher_nats
        return RunSummary(
            steps=self.step,
            tokens=tokens,
            stop_reason=reason,
            domains=self.job.domains,
            student_nats_before=self.before,
            student_nats_after=to_json(self.measured[1].nats) if self.measured else [],
            teacher_nats=None if teacher is None else to_json(teacher.nats),
            weights=self.steering.weights.tolist(),
            average_weights=self.steering.average,
            tokens_per_domain=self.tokens_per_domain.tolist(),
            config_digest=self.config.digest(),
            timing={
                "wall_seconds": seconds,
                "tokens_per_second": (tokens - self.first_tokens) / seconds,
            },
        )

    def _inputs(self) -> dict[str, str]:
        """Digests of what the run learns from; a change would go unnoticed in the config."""
        inputs = {"data.dir": self.job.manifest.inputs_digest}
        if self.job.teachers.loaded:
            inputs["teacher.path"] = self.job.teachers.digest
        if self.job.start.lora is not None:
            inputs["student.path"] = self.job.start.base_digest
        return inputs

    def _restore_host(self, host: dict[str, Any]) -> None:
        then, now = host["inputs"], self._inputs()
        try:
            if changed := [name for name in now if now[name] != then.get(name)]:
                raise ValueError(f"the content of {' and '.join(changed)} has changed")
            self.pipeline.set_state(host["pipeline"])
        except ValueError as error:
            raise UserError(
                f"this is not the data and the teacher that {self.config.run.dir} was trained on "
                f"({error}): bring them back, or choose another run.dir"
            ) from error
        self.steering.restore(host["steering"])
        self.tokens_per_domain = np.array(host["tokens_per_domain"], np.int64)
        self.before = host["before"]
        if host["measured"] is not None:
            step, nats, tokens = host["measured"]
            values = [np.nan if value is None else value for value in nats]
            self._take(step, DomainNats(np.array(values), np.array(tokens)))

    def _report(self) -> None:
        """Write the line of the last dispatched step; stop if its updates keep being skipped."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        sums = jax.device_get(pending.sums)
        self.tokens_per_domain = self.tokens_per_domain + sums.tokens.astype(np.int64)
        now = time.monotonic()
        seconds, waited = now - self.clock, self.waited
        self.clock, self.waited = now, 0.0
        timing = StepTiming(
            seconds=seconds,
            tokens_per_second=float(sums.tokens.sum()) / seconds,
            data_wait_seconds=waited,
        )
        applied = pending.step - 1 - int(sums.skipped_before)
        self.steering.count(sums)
        tokens = int(self.tokens_per_domain.sum())
        rate = self.schedule(applied)
        self.metrics.write(_step_event(self.job, pending.step, tokens, sums, rate, timing))
        self.progress.update(
            pending.step, loss=float(sums.loss), tokens_per_second=timing.tokens_per_second
        )
        if sums.skipped:
            _log.warning("event=skipped step=%d: the update was not finite", pending.step)
        if int(sums.skipped_in_a_row) >= self.config.train.max_skipped_in_a_row:
            raise DivergedError(self._diagnosis(pending, sums))

    def _diagnosis(self, pending: _Pending, sums: StepSums) -> str:
        rows = self.config.train.rows_per_step
        skipped = int(sums.skipped_in_a_row)
        first = (pending.step - skipped) * rows
        totals = sums.term_total.sum(axis=0)
        bad = [n for n, t in zip(self.job.domains, totals, strict=True) if not np.isfinite(t)]
        what = f"the loss of {', '.join(bad)}" if bad else "a gradient or its update"
        return (
            f"diverged at step {pending.step}: {skipped} updates in a row were not finite "
            f"({what} is not finite; rows {first} to {pending.step * rows - 1}). None of them was "
            "applied. Lower optim.learning_rate, or look at these rows"
        )

    def _saved(self, saved: Saved) -> None:
        self.metrics.write(CheckpointEvent(step=saved.step, timing=Timing(seconds=saved.seconds)))
        _log.info("event=save_end step=%d seconds=%.2f", saved.step, saved.seconds)


@dataclass(frozen=True)
class _Pending:
    """A dispatched step that has not been reported."""

    step: int
    sums: StepSums


def _step_event(
    job: Job, step: int, tokens: int, sums: StepSums, rate: Any, timing: StepTiming
) -> StepEvent:
    with np.errstate(divide="ignore", invalid="ignore"):
        by_domain = sums.term_total / sums.term_count
        means = sums.term_total.sum(axis=1) / sums.term_count.sum(axis=1)
    names = [term.name for term in job.objective]
    return StepEvent(
        step=step,
        tokens=tokens,
        loss=sums.loss,
        terms=dict(zip(names, means, strict=True)),
        domain_nats=dict(zip(names, by_domain, strict=True)),
        domain_tokens=sums.tokens.astype(np.int64),
        learning_rate=rate,
        grad_norm=sums.grad_norm,
        skipped=sums.skipped,
        timing=timing,
    )
