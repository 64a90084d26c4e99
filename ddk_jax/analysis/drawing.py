"""How every figure looks: style, colours, axes, direct labels, saving.

Figures are plain `matplotlib.figure.Figure` objects; pyplot and its global state are not used.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float64, Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2D, ScaledTranslation, blended_transform_factory

WIDTH_INCHES = 8.0
PIXELS_PER_INCH = 200
LABEL_POINTS = 13.0
"""Distance of the base lines of two labels at the ends of lines."""
INK = "#222222"
GREY = "#767676"
FAINT = "#E4E4E4"

# Chosen from the Okabe-Ito and Tol palettes for the largest smallest distance (OKLab) between any
# two of them under normal vision and simulated deutan, protan and tritan vision; all stand out from
# white by a contrast of 2.3 or more.
DOMAIN_COLOURS = (
    "#4477AA",
    "#E69F00",
    "#009E73",
    "#AA3377",
    "#56B4E9",
    "#D55E00",
    "#222222",
    "#332288",
    "#882255",
    "#7A5230",
)
DOMAIN_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h")
LINE_STYLES = ("-", "--", ":", "-.")
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#E69F00", "#56B4E9", "#222222")

NUMBERS = FuncFormatter(lambda value, _: f"{value:,.6g}")
LOG_FROM_RATIO = 8.0
"""Largest over smallest value from which an axis is logarithmic."""

LegendPlace = Literal["outside upper left", "outside lower left"]

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.07,
    # Salted by name, not by chance, so that the same run gives the same bytes.
    "svg.hashsalt": "ddk_jax",
}

styled = matplotlib.rc_context(STYLE)
"""Decorator: the function draws with the style above and leaves the process's settings alone."""


def domain_look(index: int) -> dict[str, Any]:
    """Line properties of the domain at a position of the config: always the same ones."""
    return {
        "color": DOMAIN_COLOURS[index % len(DOMAIN_COLOURS)],
        "marker": DOMAIN_MARKERS[index % len(DOMAIN_MARKERS)],
        "linestyle": LINE_STYLES[index // len(DOMAIN_COLOURS) % len(LINE_STYLES)],
    }


def run_look(index: int) -> dict[str, Any]:
    """Line properties of the run at a position among the compared runs."""
    return {
        "color": RUN_COLOURS[index % len(RUN_COLOURS)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
    }


def plain(name: str, limit: int = 24) -> str:
    """A name as figure text: shortened in the middle, never read as mathematics or as hidden."""
    if len(name) > limit:
        name = name[: limit - 9] + "..." + name[-6:]
    # matplotlib reads dollars as mathematics and leaves labels with a leading underscore out.
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def new_figure(height_inches: float) -> Figure:
    """An empty figure of the report's width."""
    return Figure(figsize=(WIDTH_INCHES, height_inches))


def panel_grid(
    titles: Sequence[str], x_label: str, y_label: str, handles: Sequence[Line2D]
) -> tuple[Figure, list[Axes]]:
    """Small multiples with shared axes, one titled panel for each of `titles`.

    Args:
        titles: What each panel shows.
        x_label: Label of all x axes.
        y_label: Label of all y axes.
        handles: What the legend above the panels explains.

    Returns:
        The figure and its panels in the order of `titles`.
    """
    count = len(titles)
    columns = count if count < 4 else min((4, 3, 5), key=lambda columns: -count % columns)
    rows = -(-count // columns)
    figure = new_figure((2.4 if rows == 1 else 1.75 * rows) + 0.4 + legend_inches(handles))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for panel in panels[count:]:
        panel.remove()
    for title, panel in zip(titles, panels[:count], strict=True):
        panel.set_title(plain(title, limit=84 // columns), fontweight="bold")
        # Below a removed panel nothing would carry the numbers of the column's axis.
        if rows * columns > count:
            panel.tick_params(labelbottom=True)
    figure.supxlabel(x_label, fontsize=9.5)
    figure.supylabel(y_label, fontsize=9.5)
    legend_outside(figure, handles)
    return figure, panels[:count]


def legend_outside(
    figure: Figure, handles: Sequence[Line2D], place: LegendPlace = "outside upper left"
) -> None:
    """Puts one legend above or below all panels, if there is anything in it."""
    if not handles:
        return
    figure.legend(
        handles=list(handles),
        loc=place,
        ncols=_legend_columns(handles),
        columnspacing=1.6,
        handlelength=2.4,
    )


def legend_inches(handles: Sequence[Line2D]) -> float:
    """Height of such a legend."""
    return 0.2 * -(-len(handles) // _legend_columns(handles)) if handles else 0.0


def _legend_columns(handles: Sequence[Line2D]) -> int:
    # About a hundred characters fit into a line; the mark and the spaces take as much as seven.
    longest = max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(len(handles), 100 // (longest + 7)))


def token_axis(largest: int) -> tuple[float, str]:
    """Scale and label of an axis of training tokens.

    Args:
        largest: The largest number of tokens to be shown.

    Returns:
        The factor to divide tokens by, and the label with the unit.
    """
    for scale, word in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= scale:
            return scale, f"training tokens ({word})"
    return 1.0, "training tokens"


def choose_scale(
    axes: Axes, values: Iterable[Any], axis: str = "y", *, narrow: bool = False
) -> bool:
    """Makes an axis logarithmic when its values ask for it.

    Args:
        axes: Where the values are drawn.
        values: Arrays of all values on that axis.
        axis: `x` or `y`.
        narrow: There is no room for more than a label per decade.

    Returns:
        Whether it is logarithmic.
    """
    flat = np.concatenate([np.ravel(value) for value in values])
    flat = flat[np.isfinite(flat)]
    logarithmic = bool(flat.size and flat.min() > 0 and flat.max() >= LOG_FROM_RATIO * flat.min())
    target = getattr(axes, f"{axis}axis")
    if logarithmic:
        getattr(axes, f"set_{axis}scale")("log")
        decades = np.log10(flat.max() / flat.min())
        subs = (1, 2, 5) if decades < (1.5 if narrow else 3.2) else (1,)
        target.set_major_locator(LogLocator(subs=subs, numticks=20))
        target.set_minor_locator(NullLocator())
        target.set_major_formatter(NUMBERS)
    else:
        linear_ticks(axes, axis)
    return logarithmic


def linear_ticks(axes: Axes, axis: str = "y") -> None:
    """Round numbers with separators of thousands on an axis."""
    target = getattr(axes, f"{axis}axis")
    target.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    target.set_major_formatter(NUMBERS)


def spread(wanted: Float64[np.ndarray, "N"], gap: float) -> Float64[np.ndarray, "N"]:
    """Positions in [0, 1], at least `gap` apart, as near as possible to ascending wanted ones.

    Least squares by pooling neighbours that would overlap (isotonic regression of the positions
    with their share of the gaps taken off).

    Args:
        wanted: Ascending positions.
        gap: Least distance of neighbours.

    Returns:
        Ascending positions; they leave [0, 1] only when they do not fit into it.
    """
    taken = gap * np.arange(len(wanted))
    blocks: list[tuple[float, int]] = []
    for value in wanted - taken:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), size + count
        blocks.append((mean, size))
    pooled = np.concatenate([np.full(size, mean) for mean, size in blocks])
    return np.clip(pooled, 0, max(0.0, 1 - gap * (len(wanted) - 1))) + taken


class LineEnd(NamedTuple):
    """The last point of a line, and what to write beside it."""

    text: str
    look: Mapping[str, Any]
    """Line properties; the colour and the marker repeat beside the text."""
    x: float
    y: float


def label_ends(axes: Axes, ends: Sequence[LineEnd], axes_inches: float) -> None:
    """Writes a label right of each line's end, moved apart where they would overlap.

    Args:
        axes: Axes with their final limits.
        ends: The ends, in data units; those without a finite value get no label.
        axes_inches: Approximate height of the axes; sets the distance between labels.
    """
    ends = [end for end in ends if np.isfinite(end.y)]
    if not ends:
        return
    # Later lines must not move the limits, and reading them makes pending autoscaling happen.
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    at = np.array([to_axes.transform((end.x, end.y))[1] for end in ends])
    order = np.argsort(at, kind="stable")
    heights = spread(at[order], gap=LABEL_POINTS / (72.0 * axes_inches))
    # x in points from the right edge of the axes, y as a fraction of their height.
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes belong to a figure"
    corner: Any = axes.transAxes
    x_points = Affine2D().scale(1 / 72) + figure.dpi_scale_trans + ScaledTranslation(1, 0, corner)
    beside: dict[str, Any] = {
        "transform": blended_transform_factory(x_points, axes.transAxes),
        "clip_on": False,
    }
    for index, height in zip(order, heights, strict=True):
        end, colour = ends[index], ends[index].look["color"]
        leader = [at[index], at[index], height, height]
        axes.plot([2, 6, 16, 24], leader, color=colour, linewidth=0.9, **beside)
        axes.plot(24, height, color=colour, marker=end.look.get("marker", ""), **beside)
        axes.text(30, height, end.text, va="center", fontsize=9, **beside)


def thin(
    x: Real[np.ndarray, "N"], y: Float64[np.ndarray, "N"], points: int = 600
) -> tuple[Float64[np.ndarray, "M"], Float64[np.ndarray, "M"]]:
    """Means over runs of neighbours, so that a long series stays a small drawing.

    Args:
        x: Positions.
        y: Values; those that are not finite are left out.
        points: About the largest number of points to return.

    Returns:
        Mean positions and mean values.
    """
    keep = np.isfinite(y)
    x_kept, y_kept = x[keep].astype(np.float64), y[keep]
    if not x_kept.size:
        return x_kept, y_kept
    starts = np.arange(0, x_kept.size, -(-x_kept.size // points))
    sizes = np.diff(np.append(starts, x_kept.size))
    return np.add.reduceat(x_kept, starts) / sizes, np.add.reduceat(y_kept, starts) / sizes


def smooth(values: Float64[np.ndarray, "N"]) -> Float64[np.ndarray, "N"]:
    """Centred moving mean over about a thirtieth of the series; shorter windows at its ends."""
    half = len(values) // 60
    total = np.concatenate([np.zeros(1), np.cumsum(values)])
    here = np.arange(len(values))
    reach = np.minimum(np.minimum(here, len(values) - 1 - here), half)
    return (total[here + reach + 1] - total[here - reach]) / (2 * reach + 1)


@styled
def svg_bytes(figure: Figure) -> bytes:
    """The figure as SVG: the same bytes each time, with no date and no outside reference."""
    return _render(figure, "svg", {"Date": None, "Creator": None})


@styled
def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG, twice the report's 800 pixels wide for dense screens."""
    return _render(figure, "png", {"Software": None})


def _render(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    # Saving would lay the figure out twice for each format; once is enough, and half of the work.
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=PIXELS_PER_INCH, metadata=metadata)
    return buffer.getvalue()
