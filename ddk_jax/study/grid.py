"""Runs a study: every cell once, wherever it was left, on one machine or on several."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ddk_jax.config import Config, load_config
from ddk_jax.errors import DivergedError, RunHeldError, UserError
from ddk_jax.places import resolve_path
from ddk_jax.study.costs import run_cost
from ddk_jax.study.page import write_page
from ddk_jax.study.plan import Cell, Study, load_study
from ddk_jax.study.results import (
    Measured,
    Result,
    StudyResults,
    diverged,
    measure_cell,
    measure_untouched,
    read_json,
    result_digest,
    write_json,
)
from ddk_jax.study.tables import mean_gap
from ddk_jax.training.build import Job
from ddk_jax.training.export import export_run
from ddk_jax.training.lease import RunLease
from ddk_jax.training.loop import RunSummary, train
from ddk_jax.training.rundir import SUMMARY

_log = logging.getLogger(__name__)

RESULT = "result.json"
"""Of one cell, in its directory."""
RESULTS = "results.json"
"""Of the study."""
POLL_SECONDS = 30.0
"""Time between two looks at what another process holds."""

Key: TypeAlias = tuple[str, int, float]
Done: TypeAlias = Mapping[Key, Result]


class Stopped(Exception):
    """The process was told to stop; the run is saved."""


class Part(NamedTuple):
    """The cells that a process runs: every `of`-th, from number `index` on."""

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """`2/4` is the second of four; empty: all.

        Raises:
          UserError: it is neither.
        """
        if not text:
            return cls()
        number, _, of = text.partition("/")
        if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
            raise UserError(f"--only {text}: needs a part and their number, such as 2/4")
        return cls(int(number) - 1, int(of))


@dataclass
class Grid:
    """The cells of a study and what has come of them."""

    study: Study
    part: Part = field(default_factory=Part)

    def plan(self, done: Done) -> list[Cell]:
        """All cells that are known: those that depend on results come when these are there."""
        search = self.study.search()
        if any(cell.key not in done for cell in search):
            return search
        rate = self.chosen_rate(done)
        cells = {cell.key: cell for cell in [*search, *self.study.cells(rate)]}
        settings = self.study.config.search
        if settings is not None and settings.leaders and all(key in done for key in cells):
            assert rate is not None
            cells |= {c.key: c for c in self.study.checks(self.leaders(done, rate), rate)}
        return list(cells.values())

    def chosen_rate(self, done: Done) -> float | None:
        """The learning rate of the grid; None: as the configs say."""
        search = self.study.search()
        if not search:
            return None
        return min(search, key=lambda cell: _order(done[cell.key])).rate

    def leaders(self, done: Done, rate: float) -> list[str]:
        """The methods with the smallest mean gaps over the seeds, without variants."""
        settings = self.study.config.search
        assert settings is not None
        found: dict[str, list[float]] = {}
        for cell in self.study.cells(rate):
            if cell.method in self.study.config.methods:
                found.setdefault(cell.method, []).append(_order(done[cell.key]))
        ranked = sorted(found, key=lambda method: float(np.mean(found[method])))
        return ranked[: settings.leaders]

    def done(self) -> dict[Key, Result]:
        """Results on disk, of this process and of others."""
        found: dict[Key, Result] = {}
        # A result unlocks further cells, so look until no more are known.
        for _ in range(3):
            for cell in self.plan(found):
                if (result := self._result(cell)) is not None:
                    found[cell.key] = result
        return found

    def _result(self, cell: Cell) -> Result | None:
        found: Result | None = read_json(Result, cell.directory / RESULT)
        is_ours = found is not None and found.digest == result_digest(self.study, cell)
        return found if is_ours else None

    def run(self) -> dict[Key, Result]:
        """Run all cells of our part, and return what is there at the end.

        Raises:
          Stopped: told to stop.
          UserError and its kinds: from a run; the same call continues.
        """
        self._prepare()
        while True:
            done = self.done()
            cells = self.plan(done)
            todo = [cell for cell in cells if cell.key not in done]
            if not todo:
                return done
            ours = [cell for i, cell in enumerate(cells) if i % self.part.of == self.part.index]
            ours = [cell for cell in ours if cell.key not in done]
            _log.info("%d of %d runs to do; %s", len(todo), len(cells), estimate(todo, done))
            if not any(self._try(cell) for cell in ours):
                if not ours and self._is_last(cells):
                    return done
                _wait()

    def _is_last(self, cells: list[Cell]) -> bool:
        """Whether no results of others can give us more to do."""
        settings = self.study.config.search
        if settings is None:
            return True
        keys = {cell.key for cell in self.study.search()}
        return not settings.leaders and any(cell.key not in keys for cell in cells)

    def _try(self, cell: Cell) -> bool:
        """Run a cell; False if another process holds it."""
        try:
            # A run's own lease ends with it; this one covers exports and the measurement too.
            with RunLease(cell.directory):
                if self._result(cell) is None:
                    write_json(run_cell(self.study, cell), cell.directory / RESULT)
        except RunHeldError as held:
            _log.info("%s", held)
            return False
        return True

    def _prepare(self) -> None:
        """Do what comes before all cells, unless it is done; other processes wait for it."""
        configs = [load_config(resolve_path(path)) for path in self.study.config.first]
        while not all(map(_is_exported, configs)) or not read_json(Measured, self.study.untouched):
            try:
                with RunLease(self.study.directory):
                    for config in configs:
                        if not _is_exported(config):
                            _finish(config)
                            _export(config)
                    self._untouched()
            except RunHeldError as held:
                _log.info("%s", held)
                _wait()

    def _untouched(self) -> Measured:
        path = self.study.untouched
        found = read_json(Measured, path)
        if found is None:
            found = measure_untouched(self.study)
            write_json(found, path)
        return found

    def gather(self) -> StudyResults:
        """Everything so far in one value; also written to `results.json`.

        Raises:
          UserError: nothing is finished.
        """
        done = self.done()
        if not done:
            raise UserError(f"{self.study.directory}: no run of the study is finished")
        cells = self.plan(done)
        first = cells[0].config
        job = Job(first)
        grid = self.study.cells(self.chosen_rate(done))
        gathered = StudyResults(
            study=self.study.name,
            reference=self.study.config.reference,
            seeds=self.study.config.seeds,
            domains=job.domains,
            prior=tuple(job.prior.tolist()),
            rates={cell.method: cell.rate for cell in grid},
            untouched=self._untouched(),
            methods=tuple(self.study.config.methods),
            axes=self.study.axes,
            results=tuple(done[cell.key] for cell in cells if cell.key in done),
            packages=_packages(cells),
        )
        write_json(gathered, self.study.directory / RESULTS)
        return gathered


class Collected(NamedTuple):
    """What a study has come to, and where it is shown."""

    results: StudyResults
    page: Path


def run_study(path: Path, only: str = "") -> Collected | None:
    """Run what is left of a study, and show what it has come to.

    Args:
      path: its YAML.
      only: part of the cells, such as `2/4`.

    Returns:
      The results; None if the process was told to stop.

    Raises:
      UserError and its kinds: of the study, or of a run; the same call continues.
    """
    grid = Grid(load_study(path), Part.parse(only))
    try:
        grid.run()
    except Stopped:
        return None
    return _show(grid)


def collect_study(path: Path) -> Collected:
    """Show what a study has come to, without running anything.

    Raises:
      UserError: nothing is finished.
    """
    return _show(Grid(load_study(path)))


def _show(grid: Grid) -> Collected:
    results = grid.gather()
    return Collected(results, write_page(results, grid.study.directory))


def run_cell(study: Study, cell: Cell) -> Result:
    """Run the stages of a cell, from where they stand, and measure the student.

    Raises:
      RunHeldError: another process has one of them.
      Stopped: told to stop.
    """
    spent = seconds = 0.0
    *before, last = cell.stages
    try:
        for stage in before:
            seconds += _finish(stage.config).timing["wall_seconds"]
            _export(stage.config)
            spent += run_cost(stage.config).total
        seconds += _finish(last.config).timing["wall_seconds"]
    except DivergedError as error:
        _log.warning("%s", error)
        return diverged(study, cell)
    return measure_cell(study, cell, run_cost(last.config, stages=spent), seconds)


def _wait() -> None:
    _log.info("waiting for another process")
    time.sleep(POLL_SECONDS)


def _finish(config: Config) -> RunSummary:
    """Train to the end, or take the summary of what was finished before."""
    run_dir = resolve_path(config.run.dir)
    if (run_dir / "config.yaml").is_file():
        if load_config(run_dir / "config.yaml").digest() != config.digest():
            raise UserError(
                f"{run_dir} holds a run of another config: remove it, or set the study back"
            )
    summary = train(config)
    if summary.stop_reason == "preempted":
        raise Stopped
    return summary


def _is_exported(config: Config) -> bool:
    return (resolve_path(config.run.dir) / "export" / "config.json").is_file()


def _export(config: Config) -> None:
    if not _is_exported(config):
        run_dir = resolve_path(config.run.dir)
        export_run(run_dir, run_dir / "export")


def estimate(todo: Iterable[Cell], done: Done) -> str:
    """How long the cells will take on this machine, from those that are finished."""
    speeds: dict[str, list[float]] = {}
    for result in done.values():
        if result.seconds > 0:
            speeds.setdefault(result.method, []).append(result.seconds / result.row_tokens)
    if not speeds:
        return "no estimate of the time before one is finished"
    every = [speed for found in speeds.values() for speed in found]
    seconds = sum(
        cell.row_tokens * float(np.median(speeds.get(cell.method, every))) for cell in todo
    )
    return f"about {_duration(seconds)} on one machine"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _order(result: Result) -> float:
    gap = math.nan if result.measured is None else mean_gap(result.measured)
    return math.inf if math.isnan(gap) else gap


def _packages(cells: list[Cell]) -> dict[str, str]:
    """What the first finished run recorded of its machine."""
    for cell in cells:
        directory = resolve_path(cell.config.run.dir)
        if (directory / SUMMARY).is_file():
            record: dict[str, Any] = json.loads((directory / "run.json").read_text())
            versions = {"ddk_jax": record["ddk_jax"], "python": record["python"]}
            return versions | record["packages"]
    return {}
