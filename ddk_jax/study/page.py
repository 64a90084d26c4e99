"""A study's tables and figures: on one page, as Markdown, and as text for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from ddk_jax.analysis.report import figure_section, html_page, html_row, html_table, save_figure
from ddk_jax.analysis.tables import aligned_table
from ddk_jax.errors import StorageError
from ddk_jax.study import figures
from ddk_jax.study.results import StudyResults
from ddk_jax.study.tables import Table, tables

PAGE = "study.html"
TEXT = "study.md"


class FigureKind(NamedTuple):
    """One figure of the page."""

    name: str
    """Name of its files."""
    title: str
    caption: str
    draw: Callable[[StudyResults], Figure]
    applies: Callable[[StudyResults], bool]


KINDS = (
    FigureKind(
        "gaps",
        "Gaps by method",
        "A dot for each seed, the mean, and its standard error; the dotted line is the reference.",
        figures.gaps_by_method,
        lambda results: True,
    ),
    FigureKind(
        "ratios",
        "Perplexity ratio",
        "Student perplexity divided by teacher perplexity at each measurement, mean over the "
        "seeds.",
        figures.ratio_curves,
        figures.has_curves,
    ),
    FigureKind(
        "weights",
        "Mixture weights",
        "Weights in force, mean over the seeds; the dotted line is equal sampling.",
        figures.weight_curves,
        figures.has_curves,
    ),
    FigureKind(
        "ablations",
        "Ablations",
        "Mean and worst gap at the end, for each value of a setting.",
        figures.ablations,
        lambda results: bool(results.axes),
    ),
)


def write_page(results: StudyResults, directory: Path) -> Path:
    """Write the page, its figures and the tables in Markdown.

    Args:
      results: what there is so far.
      directory: where to.

    Returns:
      The path of the page.

    Raises:
      StorageError: something cannot be written.
    """
    made = tables(results)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sections = [_section(table) for table in made]
        for kind in KINDS:
            if kind.applies(results):
                svg = save_figure(kind.draw(results), directory / kind.name)
                sections.append(figure_section(kind.name, kind.title, kind.caption, svg))
        sections.append(_versions(results))
        page = directory / PAGE
        page.write_text(html_page(f"Study {results.study}", sections), encoding="utf-8")
        text = "\n".join(_markdown(table) for table in made)
        (directory / TEXT).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"the study cannot be written to {directory}: {error}") from error
    return page


def study_text(results: StudyResults) -> str:
    """The first tables for the terminal."""
    parts = (
        f"{table.title}\n{aligned_table(table.header, table.rows)}" for table in _brief(results)
    )
    return "\n\n".join(parts)


def _brief(results: StudyResults) -> Iterator[Table]:
    """The first columns of the tables that answer the question."""
    for table in tables(results)[:2]:
        yield table._replace(header=table.header[:4], rows=[row[:4] for row in table.rows])


def _markdown(table: Table) -> str:
    lines = [f"## {table.title}", "", *([table.note, ""] if table.note else [])]
    lines.append(f"| {' | '.join(table.header)} |")
    lines.append("|" + "---|" * len(table.header))
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _section(table: Table) -> str:
    body = [html_row([escape(cell) for cell in row]) for row in table.rows]
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f"<section><h2>{escape(table.title)}</h2>{note}{html_table(table.header, body)}</section>"
    )


def _versions(results: StudyResults) -> str:
    said = ", ".join(f"{name} {version}" for name, version in results.packages.items())
    seeds = ", ".join(map(str, results.seeds))
    text = f"Seeds {seeds}. {said}"
    return f'<section><h2>How it was made</h2><p class="note">{escape(text)}</p></section>'
