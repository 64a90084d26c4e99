"""The measures of a study, and the tables that hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ddk_jax.analysis.tables import number
from ddk_jax.study.results import UNTOUCHED, Measured, Result, StudyResults
from ddk_jax.study.statistics import LEVEL, POWER, Difference, Mean, mean, paired

TEACHER = "teacher"


class Table(NamedTuple):
    """A table of text."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Measure(NamedTuple):
    """One number of a measured student."""

    name: str
    style: str
    """Format of the number."""
    of: Callable[[Measured, StudyResults], float]


def gaps(measured: Measured) -> np.ndarray:
    """[D] student minus teacher, nats per token."""
    return np.array(measured.nats) - np.array(measured.teacher_nats)


def mean_gap(measured: Measured) -> float:
    """Mean over the domains of student minus teacher, nats per token."""
    return float(np.mean(gaps(measured)))


def worst_gap(measured: Measured) -> float:
    """The same of the domain that is furthest behind."""
    return float(np.max(gaps(measured)))


def bits_per_byte(measured: Measured) -> float:
    """Mean over the domains of the bits that a byte of text takes."""
    return float(np.mean(_bits(np.array(measured.nats), measured)))


def _bits(nats: np.ndarray, measured: Measured) -> np.ndarray:
    """[D] bits per byte from [D] nats per token."""
    return nats / math.log(2) / np.array(measured.bytes_per_token)


def closed(measured: Measured, results: StudyResults) -> float:
    """Share of the initial mean gap that is gone."""
    return 1 - mean_gap(measured) / mean_gap(results.untouched)


def starved_closed(measured: Measured, results: StudyResults) -> float:
    """The same over the domains that the prior starves; NaN if it starves none."""
    chosen = results.starved
    if not chosen:
        return math.nan
    now, before = (float(np.mean(gaps(m)[chosen])) for m in (measured, results.untouched))
    return 1 - now / before


MEASURES = (
    Measure("mean gap", ".4f", lambda m, _: mean_gap(m)),
    Measure("worst gap", ".4f", lambda m, _: worst_gap(m)),
    Measure("bits per byte", ".4f", lambda m, _: bits_per_byte(m)),
    Measure("KL to the teacher", ".4f", lambda m, _: float(np.mean(m.forward_kl))),
    Measure("overlap of the top 8", ".4f", lambda m, _: float(np.mean(m.overlap))),
    Measure("gap closed", ".1%", closed),
    Measure("closed where starved", ".1%", starved_closed),
)
COMPARED = ("mean gap", "worst gap", "closed where starved")


def values(
    results: StudyResults, method: str, measure: Measure, rate: float | None = None
) -> np.ndarray:
    """A measure of a method by seed; NaN where there is no result."""
    return np.array([_of(result, measure, results) for result in results.of(method, rate)])


def _of(result: Result | None, measure: Measure, results: StudyResults) -> float:
    if result is None or result.measured is None:
        return math.nan
    return measure.of(result.measured, results)


def shown_methods(results: StudyResults) -> list[str]:
    """The methods that have a result, without variants."""
    return [m for m in results.methods if any(r is not None for r in results.of(m))]


def tables(results: StudyResults) -> list[Table]:
    """All tables that the results fill."""
    found = [measures_table(results), differences_table(results)]
    found += [cost_table(results), perplexity_table(results), bits_table(results)]
    found += [axis_table(results, axis) for axis in results.axes]
    found.append(rates_table(results))
    return [table for table in found if table.rows]


def measures_table(results: StudyResults) -> Table:
    """Every measure of every method: mean and standard error over the seeds."""
    rows: list[tuple[str, ...]] = [
        (UNTOUCHED, "-", *(format(m.of(results.untouched, results), m.style) for m in MEASURES))
    ]
    for method in shown_methods(results):
        tokens = [r.tokens for r in results.of(method) if r is not None]
        cells = [_with_error(mean(values(results, method, m)), m.style) for m in MEASURES]
        rows.append((method, f"{np.mean(tokens) / 1e6:.2f} M", *cells))
    seeds = ", ".join(map(str, results.seeds))
    starved = ", ".join(results.domains[i] for i in results.starved)
    several = len(results.seeds) > 1
    which = f"Means over the seeds {seeds}, with standard errors." if several else f"Seed {seeds}."
    note = (
        f"{which} Gaps and divergences are in nats per token, all means over the domains count "
        "each domain the same."
    )
    if starved:
        note += f" Starved by the prior: {starved}."
    header = ("method", "tokens", *(m.name for m in MEASURES))
    return Table("Measures", note, header, rows)


def differences_table(results: StudyResults) -> Table:
    """Every method minus the reference, seed by seed."""
    chosen = [m for m in MEASURES if m.name in COMPARED]
    rows: list[tuple[str, ...]] = []
    for method in shown_methods(results):
        if method == results.reference:
            continue
        cells: list[str] = []
        for measure in chosen:
            pair = (values(results, name, measure) for name in (method, results.reference))
            cells += _difference_cells(paired(*pair), measure.style)
        rows.append((method, *cells))
    header = ["method"]
    for measure in chosen:
        header += [measure.name, f"{LEVEL:.0%} interval", "detectable"]
    note = (
        f"Paired differences to {results.reference}; negative gaps are better. The interval is "
        f"Student's t over the seeds; detectable is the smallest true difference that they would "
        f"have shown with a chance of {POWER:.0%}."
    )
    return Table(f"Differences to {results.reference}", note, tuple(header), rows)


def cost_table(results: StudyResults) -> Table:
    """FLOPs of every method, and what the controller adds."""
    rows: list[tuple[str, ...]] = []
    for method in shown_methods(results):
        costs = [r.cost for r in results.of(method) if r is not None and r.measured is not None]
        if not costs:
            continue
        cost = costs[0]
        parts = (cost.student, cost.teacher, cost.evaluation + cost.teacher_evaluation)
        rows.append(
            (
                method,
                *(f"{x / 1e12:,.2f}" for x in (*parts, cost.stages, cost.total)),
                f"{cost.overhead:.2%}",
                f"{cost.uncached_overhead:.2%}",
            )
        )
    header = (
        "method",
        "student",
        "teacher",
        "measuring",
        "stages before",
        "total",
        "controller",
        "controller, uncached",
    )
    note = (
        "TFLOPs by the shapes of the models. Controller: what it measures over what training "
        "costs, with the teacher measured once, and each time."
    )
    return Table("Cost", note, header, rows)


def perplexity_table(results: StudyResults) -> Table:
    """Validation perplexity by domain."""
    header, rows = _by_domain(results, np.exp, ",.2f")
    return Table("Perplexity by domain", "exp of the mean nats over the seeds.", header, rows)


def bits_table(results: StudyResults) -> Table:
    """Bits per byte of the validation text by domain."""
    header, rows = _by_domain(results, lambda nats: _bits(nats, results.untouched), ".4f")
    return Table("Bits per byte by domain", "Means over the seeds.", header, rows)


def _by_domain(
    results: StudyResults, of: Callable[[np.ndarray], np.ndarray], style: str
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of what follows from the mean nats [D] of every method."""
    methods = shown_methods(results)
    columns = [np.array(results.untouched.nats)]
    for method in methods:
        found = [r.measured.nats for r in results.of(method) if r and r.measured]
        missing = np.full(len(results.domains), math.nan)
        columns.append(np.mean(found, axis=0) if found else missing)
    columns.append(np.array(results.untouched.teacher_nats))
    table = np.transpose([of(column) for column in columns])
    rows: list[tuple[str, ...]] = [
        (domain, f"{share:.3f}", *(number(float(value), style) for value in row))
        for domain, share, row in zip(results.domains, results.prior, table, strict=True)
    ]
    return ("domain", "prior", UNTOUCHED, *methods, TEACHER), rows


def axis_table(results: StudyResults, axis: str) -> Table:
    """How the measures move with one setting."""
    rows: list[tuple[str, ...]] = []
    for value, method in results.axes[axis].items():
        if any(r is not None for r in results.of(method)):
            cells = [_with_error(mean(values(results, method, m)), m.style) for m in MEASURES]
            rows.append((value, *cells))
    return Table(f"Ablation: {axis}", "", (axis, *(m.name for m in MEASURES)), rows)


def rates_table(results: StudyResults) -> Table:
    """What was run at other learning rates than the grid."""
    others = {(r.method, r.rate) for r in results.results if r.rate != results.rates[r.method]}
    rows: list[tuple[str, ...]] = []
    for method in shown_methods(results):
        rates = sorted({rate for name, rate in others if name == method})
        for rate in sorted({*rates, results.rates[method]}) if rates else []:
            first = [values(results, method, m, rate)[0] for m in MEASURES]
            cells = [number(v, m.style) for v, m in zip(first, MEASURES, strict=True)]
            rows.append((method, f"{rate:g}", *cells))
    grid = ", ".join(sorted({f"{rate:g}" for rate in results.rates.values()}))
    note = f"On the seed {results.seeds[0]}. The grid is at {grid}."
    header = ("method", "learning rate", *(m.name for m in MEASURES))
    return Table("Other learning rates", note, header, rows)


def _with_error(found: Mean, style: str) -> str:
    if not found.seeds:
        return "-"
    error = "" if math.isnan(found.error) else f" +- {format(found.error, style)}"
    return format(found.value, style) + error


def _difference_cells(found: Difference, style: str) -> Sequence[str]:
    if not found.seeds:
        return "-", "-", "-"
    value = format(found.value, f"+{style}")
    if math.isnan(found.low):
        return value, "-", "-"
    interval = f"{format(found.low, f'+{style}')} to {format(found.high, f'+{style}')}"
    return value, interval, format(found.detectable, style)
