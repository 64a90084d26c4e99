"""The numbers of a run, domain by domain, and plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddk_jax.analysis.runs import RunRecord, over_domains, perplexity

MEAN = "mean"
NAME_LIMIT = 28
HEADER = (
    "domain",
    "ppl before",
    "ppl after",
    "teacher ppl",
    "ratio",
    "weight",
    "tokens",
)


class DomainRow(NamedTuple):
    """One domain, or the mean over all of them; NaN where there is nothing to say."""

    domain: str
    before: float
    """Perplexity of the student at the first evaluation."""
    after: float
    """Perplexity of the student at the last evaluation; NaN when there was only one."""
    teacher: float
    """Perplexity of the teacher."""
    ratio: float
    """Latest perplexity of the student over the teacher's."""
    weight: float
    """Last mixture weight."""
    share: float
    """Share of the training tokens, 0 to 1."""


def domain_rows(run: RunRecord) -> list[DomainRow]:
    """The table of a run.

    Args:
        run: Its record.

    Returns:
        One row per domain in the order of the config, then their mean: geometric for perplexities
        and ratios, which is the exponential of the mean nats.
    """
    unknown = np.full(len(run.domains), np.nan)
    nats = np.stack(
        [
            run.student_nats[0],
            run.student_nats[-1] if len(run.student_nats) > 1 else unknown,
            unknown if run.teacher_nats is None else run.teacher_nats,
            unknown if run.gap is None else run.gap[-1],
        ]
    )
    columns = np.vstack([perplexity(nats), run.final_weights, run.token_share])
    mean = [*perplexity(over_domains(np.mean, nats)), np.nan, np.nan]
    return [
        DomainRow(name, *map(float, values))
        for name, values in zip([*run.domains, MEAN], [*columns.T, mean], strict=True)
    ]


def row_cells(row: DomainRow) -> tuple[str, ...]:
    """The cells of a row as text, in the order of `HEADER`; `-` for what is not known."""
    formats = (",.2f", ",.2f", ",.2f", ",.2f", ".3f", ".1%")
    return (row.domain, *map(number, row[1:], formats))


def number(value: float, style: str) -> str:
    """A number in a format, or `-` for NaN."""
    return "-" if np.isnan(value) else format(value, style)


def domain_table(run: RunRecord) -> str:
    """The table of a run for the terminal, at most 100 columns wide.

    Args:
        run: Its record.

    Returns:
        Lines without a trailing line break.
    """
    cells = [row_cells(row) for row in domain_rows(run)]
    return aligned_table(HEADER, [(_shortened(name), *rest) for name, *rest in cells])


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text in columns: the first to the left, the others to the right.

    Args:
        header: Titles of the columns.
        rows: Cells; each row is as long as the header.

    Returns:
        Header, a rule, and the rows, without a trailing line break.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)])

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_LIMIT else name[: NAME_LIMIT - 3] + "..."
