"""The report of one or several runs: figures as PNG and SVG, and one page that holds everything."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from matplotlib.figure import Figure

from ddk_jax.analysis import figures
from ddk_jax.analysis.drawing import domain_look, png_bytes, svg_bytes
from ddk_jax.analysis.runs import (
    RunRecord,
    load_run,
    perplexity,
    union_of_domains,
    with_unique_names,
)
from ddk_jax.analysis.tables import domain_rows, domain_table, number, row_cells
from ddk_jax.errors import StorageError, UserError
from ddk_jax.places import resolve_place, whole_path

__all__ = [
    "KINDS",
    "FigureKind",
    "domain_table",
    "figure_section",
    "html_page",
    "html_row",
    "html_table",
    "save_figure",
    "write_report",
]

PAGE = "report.html"
MEAN_ROW = "mean over domains"


class FigureKind(NamedTuple):
    """One figure of the report."""

    name: str
    """Name of its files."""
    title: str
    """Heading."""
    caption: str
    """What to see in it."""
    draw: Callable[[Sequence[RunRecord]], Figure]
    """Draws it for runs that it applies to."""
    applies: Callable[[RunRecord], bool]
    """Whether a run has what it shows."""


def _any(run: RunRecord) -> bool:
    return True


def _is_taught(run: RunRecord) -> bool:
    return run.teacher_nats is not None and len(run.student_nats) > 1


def _is_measured_twice(run: RunRecord) -> bool:
    return len(run.student_nats) > 1


def _has_steps(run: RunRecord) -> bool:
    return len(run.steps) > 0


def _has_weights(run: RunRecord) -> bool:
    return len(run.weights) > 0 and _has_steps(run)


KINDS = (
    FigureKind(
        "perplexity",
        "Perplexity by domain",
        "Validation perplexity of the student at the first and at the last measurement, and of "
        "the teacher. Lower is better.",
        figures.perplexity_by_domain,
        _any,
    ),
    FigureKind(
        "ratio",
        "Perplexity ratio",
        "Student perplexity divided by teacher perplexity at each measurement. At 1 the student "
        "is as good as its teacher.",
        figures.perplexity_ratio,
        _is_taught,
    ),
    FigureKind(
        "weights",
        "Mixture weights",
        "Share of the training rows that each domain was given. A weight holds from one "
        "measurement to the next; the dotted line is equal sampling.",
        figures.mixture_weights,
        _has_weights,
    ),
    FigureKind(
        "shares",
        "Realised shares",
        "Share of the training tokens that each domain had from one measurement to the next: its "
        "weight, rounded to whole rows, as full as its rows are.",
        figures.realised_shares,
        _has_weights,
    ),
    FigureKind(
        "gap",
        "Gap to the teacher",
        "Student minus teacher cross-entropy: mean over the domains, and the domain that is "
        "furthest behind.",
        figures.gap_to_teacher,
        _is_taught,
    ),
    FigureKind(
        "speed",
        "Speed of learning",
        "How fast the validation loss of each domain fell from one measurement to the next. What "
        "is at 0 learns no more; a large gap there is one that its tokens do not close.",
        figures.learning_speed,
        _is_measured_twice,
    ),
    FigureKind(
        "loss",
        "Training loss",
        "The objective and its terms before their weights; faint lines are the steps, strong "
        "lines a moving mean.",
        figures.training_loss,
        _has_steps,
    ),
    FigureKind(
        "learning_rate",
        "Learning rate",
        "The learning rate that each optimiser step used.",
        figures.learning_rate,
        _has_steps,
    ),
    FigureKind(
        "throughput",
        "Throughput",
        "Tokens trained on per second of wall time, and the share of it spent waiting for data. "
        "The first step includes compilation.",
        figures.throughput,
        _has_steps,
    ),
)
"""All figures of the report in reading order."""


def write_report(run_dirs: Sequence[str | PathLike[str]], out_dir: str | PathLike[str]) -> Path:
    """Writes the figures of the runs and a page that needs no other file.

    A figure appears when at least one run has what it shows; runs that lack it are left out of it.
    The same runs give the same bytes.

    Args:
        run_dirs: One run directory, or several to compare, in the order of the legends.
        out_dir: Where the files go; created when it is missing.

    Returns:
        The path of the page, `report.html`.

    Raises:
        UserError: No directory is given, or one is no run or holds no evaluation.
        StorageError: Something cannot be read or written.
    """
    if not run_dirs:
        raise UserError("a report needs at least one run directory")
    # The same directory twice would compare a run with itself.
    places = map(resolve_place, run_dirs)
    distinct = {whole_path(place): place for place in places}
    runs = with_unique_names(load_run(directory) for directory in distinct.values())
    out = Path(out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = []
        for kind in KINDS:
            shown = [run for run in runs if kind.applies(run)]
            if shown:
                drawn.append((kind, save_figure(kind.draw(shown), out / kind.name)))
        if len(runs) == 1 and _has_weights(runs[0]):
            save_figure(figures.overview(runs[0]), out / "overview")
        page = out / PAGE
        page.write_text(_page(runs, drawn), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"the report cannot be written to {out}: {error}") from error
    return page


def save_figure(figure: Figure, stem: Path) -> bytes:
    """Writes both formats and returns the SVG."""
    svg = svg_bytes(figure)
    stem.with_suffix(".svg").write_bytes(svg)
    stem.with_suffix(".png").write_bytes(png_bytes(figure))
    return svg


def _page(runs: Sequence[RunRecord], drawn: Sequence[tuple[FigureKind, bytes]]) -> str:
    if len(runs) == 1:
        title, head = runs[0].name, [_headline(runs[0]), _domain_section(runs[0], "h2")]
        tail = [_provenance(runs[0], "h2")]
    else:
        title, head = f"Comparison of {len(runs)} runs", [_comparison(runs)]
        tail = [
            f"<h2>{escape(run.name)}</h2>{_domain_section(run, 'h3')}{_provenance(run, 'h3')}"
            for run in runs
        ]
    figure_sections = (
        figure_section(kind.name, kind.title, kind.caption, svg) for kind, svg in drawn
    )
    return html_page(title, [*head, *figure_sections, *tail])


def html_page(title: str, body: Sequence[str]) -> str:
    """A page that needs no other file and runs no script.

    Args:
        title: Text.
        body: HTML.
    """
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return _TEMPLATE.format(title=escape(title), style=style, body="\n".join(body))


def _headline(run: RunRecord) -> str:
    """The few numbers that say how the run went."""
    gap, worst = run.mean_gap, run.worst_gap
    mean = domain_rows(run)[-1]
    facts = [("trained on", f"{run.trained_tokens:,}", f"tokens in {run.trained_steps:,} steps")]
    if gap is not None and worst is not None:
        facts.append(("mean gap to the teacher", _change(gap[0], gap[-1]), "nats/token"))
        facts.append(("gap of the worst domain", _change(worst[0], worst[-1]), "nats/token"))
    else:
        facts.append(("mean perplexity", _change(mean.before, mean.after), "geometric mean"))
    speed = run.tokens_per_second[np.isfinite(run.tokens_per_second)]
    if speed.size:
        facts.append(("median throughput", f"{np.median(speed):,.0f}", "tokens/s"))
    waited = run.data_wait[np.isfinite(run.data_wait)]
    if waited.size:
        facts.append(("waiting for data", f"{100 * np.mean(waited):.2f}%", "of a step, mean"))
    facts.append(("state", *_state(run)))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(unit)}</small></dd></div>"
        for name, value, unit in facts
    )
    return f'<dl class="facts">{items}</dl>'


def _domain_section(run: RunRecord, heading: str) -> str:
    rows = domain_rows(run)
    body = [
        html_row([_chip(index) + escape(name), *map(escape, cells)])
        for index, (name, *cells) in enumerate(map(row_cells, rows[:-1]))
    ]
    body.append(html_row([*map(escape, row_cells(rows[-1]))], kind="mean"))
    header = (
        "domain",
        "student perplexity before",
        "student perplexity after",
        "teacher perplexity",
        "ratio",
        "final weight",
        "share of tokens",
    )
    return (
        f"<section><{heading}>Domains</{heading}>"
        '<p class="note">Perplexity on validation text; ratio is student over teacher. The means '
        f"are geometric.</p>{html_table(header, body)}</section>"
    )


def _comparison(runs: Sequence[RunRecord]) -> str:
    """One table with a row per run, and one with a row per domain and a column per run."""
    header = (
        "run",
        "steps",
        "tokens",
        "mean gap (nats/token)",
        "worst gap (nats/token)",
        "mean perplexity",
        "state",
    )
    body = []
    for run in runs:
        gap, worst, mean = run.mean_gap, run.worst_gap, domain_rows(run)[-1]
        cells = [
            run.name,
            f"{run.trained_steps:,}",
            f"{run.trained_tokens:,}",
            "-" if gap is None else _change(gap[0], gap[-1], ".3f"),
            "-" if worst is None else _change(worst[0], worst[-1], ".3f"),
            _change(mean.before, mean.after),
            _state(run)[0],
        ]
        body.append(html_row([*map(escape, cells)]))
    return (
        f"<section><h2>Runs</h2>{html_table(header, body)}</section>"
        "<section><h2>Student perplexity by domain</h2>"
        '<p class="note">At the last measurement; the lowest is bold. The means are geometric.</p>'
        f"{_perplexity_by_run(runs)}</section>"
    )


def _perplexity_by_run(runs: Sequence[RunRecord]) -> str:
    latest = [dict(zip(run.domains, perplexity(run.student_nats[-1]), strict=True)) for run in runs]
    for run, measured in zip(runs, latest, strict=True):
        row = domain_rows(run)[-1]
        measured[MEAN_ROW] = row.before if np.isnan(row.after) else row.after
    body = []
    for name in [*union_of_domains(runs), MEAN_ROW]:
        values = np.array([measured.get(name, np.nan) for measured in latest])
        lowest = min(values[np.isfinite(values)], default=np.nan)
        cells = [
            f"<td{' class=best' if value == lowest else ''}>{number(value, ',.2f')}</td>"
            for value in values
        ]
        kind = " class=mean" if name == MEAN_ROW else ""
        body.append(f"<tr{kind}><th scope=row>{escape(name)}</th>{''.join(cells)}</tr>")
    return html_table(["domain", *(run.name for run in runs)], body)


def figure_section(name: str, title: str, caption: str, svg: bytes) -> str:
    """A figure in a page, drawn into it."""
    image = base64.b64encode(svg).decode("ascii")
    return (
        f'<section id="{name}"><h2>{escape(title)}</h2><figure>'
        f"<figcaption>{escape(caption)}</figcaption>"
        f'<img alt="{escape(title)}: {escape(caption)}" '
        f'src="data:image/svg+xml;base64,{image}"></figure></section>'
    )


def _provenance(run: RunRecord, heading: str) -> str:
    """How the run came about: how it ended, the command, the versions, the config."""
    command = shlex.join(["ddk", "train", str(run.path / "config.yaml")])
    config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
    pairs = [("directory", str(run.path)), ("state", ", ".join(filter(None, _state(run))))]
    pairs += [(name, str(value)) for name, value in _leaves(run.identity)]
    body = [html_row([escape(name), escape(value)]) for name, value in pairs]
    return (
        f"<section><{heading}>How it was made</{heading}>"
        f'<div class="wide"><table class="pairs"><tbody>{"".join(body)}</tbody></table></div>'
        f"<pre>{escape(command)}</pre>"
        '<p class="note">The command continues this run; with another <code>--run.dir</code> it '
        "repeats it.</p>"
        f"<details><summary>Resolved config</summary><pre>{escape(config)}</pre></details>"
        "</section>"
    )


def _state(run: RunRecord) -> tuple[str, str]:
    """Whether the run finished, and what there is to add."""
    if not run.finished:
        return "not finished", "no summary yet"
    seconds = run.summary.get("timing", {}).get("wall_seconds")
    reason = f"stopped by: {run.summary.get('stop_reason', 'unknown')}"
    return "finished", reason if seconds is None else f"{reason}; {_duration(seconds)}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _change(before: float, after: float, style: str = ",.2f") -> str:
    if np.isnan(after):
        return number(before, style)
    return f"{number(before, style)} \N{RIGHTWARDS ARROW} {number(after, style)}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names, joined with dots, and values of a nested mapping."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _chip(index: int) -> str:
    """The colour of a domain in the figures."""
    return f'<span class="chip" style="background:{domain_look(index)["color"]}"></span>'


def html_row(cells: Sequence[str], kind: str = "") -> str:
    """A row of cells that are HTML already."""
    opening = f'<tr class="{kind}">' if kind else "<tr>"
    first, *others = cells
    return f"{opening}<th scope=row>{first}</th>{''.join(f'<td>{c}</td>' for c in others)}</tr>"


def html_table(header: Sequence[str], body: Sequence[str]) -> str:
    """A table of text headings and finished rows, which scrolls by itself on a narrow screen."""
    columns = "".join(f"<th scope=col>{escape(name)}</th>" for name in header)
    return (
        f'<div class="wide"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title} - ddk_jax report</title>
<style>
{style}</style>
</head>
<body>
<main>
<header><p>ddk_jax report</p><h1>{title}</h1></header>
{body}
</main>
</body>
</html>
"""
