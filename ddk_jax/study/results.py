"""What a finished run is worth: its student measured beside the teacher, kept as JSON.

Legend: D domains, E evaluations, M decisions of the controller.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from ddk_jax.analysis.runs import load_run
from ddk_jax.config import Config
from ddk_jax.errors import StorageError, UserError
from ddk_jax.losses.objective import make_term
from ddk_jax.places import resolve_path
from ddk_jax.plain import to_plain
from ddk_jax.study.costs import RunCost
from ddk_jax.study.plan import Cell, Study
from ddk_jax.training.build import Job
from ddk_jax.training.checkpoint import read_latest
from ddk_jax.training.metrics import to_json
from ddk_jax.training.rundir import write_whole

TERMS = ("cross_entropy", "teacher_cross_entropy", "forward_kl", "top_k_overlap")
DIGITS = 7
"""Significant digits that are kept of what was measured."""
UNTOUCHED = "student untouched"

Vector = Float64[np.ndarray, "D"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A student on the validation rows of every domain; all lists are [D]."""

    nats: tuple[float, ...]
    """Cross-entropy on the labels, nats per token."""
    teacher_nats: tuple[float, ...]
    """The teacher's."""
    forward_kl: tuple[float, ...]
    """From the teacher, nats per token."""
    overlap: tuple[float, ...]
    """Share of the teacher's 8 largest logits that are among the student's."""
    bytes_per_token: tuple[float, ...]
    """Of the validation text."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One cell of the grid."""

    method: str
    seed: int
    rate: float
    """Peak learning rate."""
    digest: str
    """That of its cell, and the rows that it was measured on: another study has another."""
    tokens: int
    """Predicted tokens that the measured run was trained on."""
    row_tokens: int
    """Tokens in the rows of all stages, padding included."""
    measured: Measured | None
    """None: the run diverged."""
    cost: RunCost
    weights: tuple[float, ...]
    """[D] mean mixture weights."""
    curve_tokens: tuple[int, ...]
    """[E] training tokens at each evaluation of the run."""
    curve_gap: tuple[tuple[float, ...], ...]
    """[E, D] student minus teacher at each, nats per token, on the run's validation rows."""
    curve_weights: tuple[tuple[float, ...], ...]
    """[M, D] weights in force after each decision."""
    seconds: float
    """Of all stages, where they ran without an interruption."""

    @property
    def key(self) -> tuple[str, int, float]:
        """That of its cell."""
        return self.method, self.seed, self.rate


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """All that a study has come to so far; what is kept in git."""

    study: str
    reference: str
    seeds: tuple[int, ...]
    domains: tuple[str, ...]
    prior: tuple[float, ...]
    """[D] mixture of the methods that have none of their own."""
    rates: dict[str, float]
    """Learning rate of every method in the grid, variants included."""
    untouched: Measured
    """The student that all methods start from."""
    methods: tuple[str, ...]
    """In the order of the file; without the variants that axes make of them."""
    axes: dict[str, dict[str, str]]
    """Methods by their values, for each axis."""
    results: tuple[Result, ...]
    packages: dict[str, str] = field(default_factory=dict)
    """Versions that the runs recorded."""

    @property
    def starved(self) -> list[int]:
        """Domains whose share of the prior is less than half of an equal one."""
        return [i for i, share in enumerate(self.prior) if share < 0.5 / len(self.prior)]

    def of(self, method: str, rate: float | None = None) -> list[Result | None]:
        """The results of a method, one for each seed; None where there is none."""
        rate = self.rates[method] if rate is None else rate
        found = {r.seed: r for r in self.results if r.method == method and _same(r.rate, rate)}
        return [found.get(seed) for seed in self.seeds]


def _same(rate: float, other: float) -> bool:
    return math.isclose(rate, other, rel_tol=1e-9)


def measure_student(job: Job, params: Any) -> Measured:
    """A student beside its teacher.

    Args:
      job: with the teacher and the validation rows; there must be one teacher, with our tokens.
      params: of the whole student.

    Raises:
      UserError: no teacher, or one that cannot be compared token by token.
    """
    if len(job.teachers.specs) != 1 or job.retokeniser is not None:
        raise UserError("a study compares with one teacher, which has the tokens of the data")
    total, count = job.validation.compare(
        job.student,
        params,
        job.teachers.loaded[0].decoder,
        job.teachers.params[0],
        tuple(make_term(name) for name in TERMS),
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        means = dict(zip(TERMS, total / count, strict=True))
    splits = [domain.validation for domain in job.manifest.domains]
    return Measured(
        nats=_rounded(means["cross_entropy"]),
        teacher_nats=_rounded(means["teacher_cross_entropy"]),
        forward_kl=_rounded(means["forward_kl"]),
        overlap=_rounded(means["top_k_overlap"]),
        bytes_per_token=_rounded([s.bytes / max(s.tokens, 1) for s in splits]),
    )


def measuring_job(study: Study, config: Config) -> Job:
    """What measures the student of a run on the study's rows.

    Raises:
      UserError: the method has another teacher than the base.
    """
    if config.teacher != study.base.teacher:
        raise UserError(f"{config.run.dir}: methods are measured against the teacher of the base")
    rows = study.config.rows_per_domain
    return Job(replace(config, evaluation=replace(config.evaluation, rows_per_domain=rows)))


def measure_untouched(study: Study) -> Measured:
    """The student that all methods start from."""
    job = measuring_job(study, study.cell(study.config.reference, study.config.seeds[0]).config)
    return measure_student(job, job.start.whole(job.initial_state().params["student"]))


def result_digest(study: Study, cell: Cell) -> str:
    """What a result of the cell has as its digest."""
    return f"{cell.digest} {study.config.rows_per_domain}"


def measure_cell(study: Study, cell: Cell, cost: RunCost, seconds: float) -> Result:
    """The result of a cell whose runs are finished.

    Raises:
      StorageError: the last run has no checkpoint that can be read.
    """
    job = measuring_job(study, cell.config)
    run_dir = resolve_path(cell.config.run.dir)
    student = job.abstract_state().params["student"]
    restored = read_latest(run_dir / "checkpoints", student, under="params/student")
    if restored is None:
        raise StorageError(f"{run_dir}: no checkpoint; remove the directory to run it again")
    record = load_run(run_dir)
    assert record.gap is not None
    return Result(
        method=cell.method,
        seed=cell.seed,
        rate=cell.rate,
        digest=result_digest(study, cell),
        tokens=int(record.summary["tokens"]),
        row_tokens=cell.row_tokens,
        measured=measure_student(job, job.start.whole(restored.state)),
        cost=cost,
        weights=_rounded(record.summary["average_weights"]),
        curve_tokens=tuple(record.evaluation_tokens.tolist()),
        curve_gap=tuple(map(_rounded, record.gap)),
        curve_weights=tuple(map(_rounded, record.weights)),
        seconds=round(seconds, 1),
    )


def diverged(study: Study, cell: Cell) -> Result:
    """The result of a cell that came to no student."""
    return Result(
        method=cell.method,
        seed=cell.seed,
        rate=cell.rate,
        digest=result_digest(study, cell),
        tokens=0,
        row_tokens=cell.row_tokens,
        measured=None,
        cost=RunCost(
            student=0.0, teacher=0.0, evaluation=0.0, teacher_evaluation=0.0, uncached=0.0
        ),
        weights=(),
        curve_tokens=(),
        curve_gap=(),
        curve_weights=(),
        seconds=0.0,
    )


def read_json(kind: type[Any], path: Path) -> Any:
    """A dataclass of this module from its file; None where there is none.

    Raises:
      UserError: the file is something else.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read ({error}); remove it") from error
    try:
        return _BUILDERS[kind](tree)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a result of this version ({error}); remove it") from error


def write_json(value: Any, path: Path) -> None:
    """Write a dataclass of this module, whole or not at all.

    Raises:
      StorageError: it cannot be written.
    """
    text = json.dumps(to_json(to_plain(value)), indent=None, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line for each result, so that git shows what a run has changed.
    write_whole(path, text.replace('{"method":', '\n{"method":') + "\n")


def _rounded(values: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{float(value):.{DIGITS}g}") for value in values)


def _numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)


def _measured(tree: Mapping[str, Any] | None) -> Measured | None:
    return None if tree is None else Measured(**{k: _numbers(v) for k, v in tree.items()})


def _result(tree: Mapping[str, Any]) -> Result:
    made = dict(tree)
    made["measured"] = _measured(tree["measured"])
    made["cost"] = RunCost(**tree["cost"])
    made["weights"] = _numbers(tree["weights"])
    made["curve_tokens"] = tuple(tree["curve_tokens"])
    for name in ("curve_gap", "curve_weights"):
        made[name] = tuple(map(_numbers, tree[name]))
    return Result(**made)


def _study_results(tree: Mapping[str, Any]) -> StudyResults:
    made = dict(tree)
    for name in ("seeds", "domains", "methods"):
        made[name] = tuple(tree[name])
    made["prior"] = _numbers(tree["prior"])
    made["untouched"] = _measured(tree["untouched"])
    made["results"] = tuple(map(_result, tree["results"]))
    return StudyResults(**made)


_BUILDERS: dict[type[Any], Any] = {
    Measured: _measured,
    Result: _result,
    StudyResults: _study_results,
}
