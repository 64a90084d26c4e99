"""The figures of a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ddk_jax.analysis.drawing import (
    GREY,
    INK,
    choose_scale,
    domain_look,
    legend_inches,
    legend_outside,
    linear_ticks,
    new_figure,
    panel_grid,
    plain,
    run_look,
    styled,
    token_axis,
)
from ddk_jax.study.results import Result, StudyResults
from ddk_jax.study.statistics import mean
from ddk_jax.study.tables import MEASURES, shown_methods, values

GAPS = [measure for measure in MEASURES if measure.name in ("mean gap", "worst gap")]


@styled
def gaps_by_method(results: StudyResults) -> Figure:
    """Mean and worst gap of every method: a dot for each seed, mean and standard error."""
    methods = shown_methods(results)
    figure = new_figure(1.1 + 0.26 * len(methods))
    panels = figure.subplots(1, len(GAPS), sharey=True)
    places = np.arange(len(methods))[::-1]
    for panel, measure in zip(panels, GAPS, strict=True):
        for place, method in zip(places.tolist(), methods, strict=True):
            found = values(results, method, measure)
            panel.plot(found, np.full(found.size, place), "o", color=GREY, alpha=0.5, markersize=4)
            middle = mean(found)
            panel.errorbar(middle.value, place, xerr=middle.error, fmt="D", color=INK, capsize=3)
        reference = mean(values(results, results.reference, measure)).value
        panel.axvline(reference, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
        panel.set(xlabel=f"{measure.name} (nats per token)")
        linear_ticks(panel, "x")
    panels[0].set_yticks(places, [plain(method) for method in methods])
    return figure


@styled
def ratio_curves(results: StudyResults) -> Figure:
    """Perplexity of the student over the teacher's, by tokens and domain (paper, figure 3)."""
    methods = _with_curves(results)
    figure, panels, scale = _panels(results, methods, "perplexity ratio, student / teacher")
    drawn = []
    for method, panel in zip(methods, panels, strict=True):
        tokens, curve = _mean_curve(_finished(results, method))
        ratio = np.exp(curve)
        drawn.append(ratio)
        for index, column in enumerate(ratio.T):
            panel.plot(tokens / scale, column, **_line(index))
        panel.axhline(1.0, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
    for panel in panels:
        choose_scale(panel, drawn, narrow=True)
    return figure


@styled
def weight_curves(results: StudyResults) -> Figure:
    """Mixture weights by tokens and domain; each holds until the next measurement."""
    methods = _with_curves(results)
    figure, panels, scale = _panels(results, methods, "mixture weight (share of rows)")
    for method, panel in zip(methods, panels, strict=True):
        found = _finished(results, method)
        count = min(len(result.curve_weights) for result in found)
        weights = np.mean([np.array(result.curve_weights[:count]) for result in found], axis=0)
        tokens = np.mean([np.array(result.curve_tokens) for result in found], axis=0)
        ends = np.append(tokens[:count], tokens[-1])
        held = np.vstack([weights, weights[-1:]])
        for index, column in enumerate(held.T):
            panel.plot(ends / scale, column, drawstyle="steps-post", **_line(index))
        panel.axhline(1 / len(results.domains), color=GREY, linestyle=":", linewidth=1.2, zorder=0)
    # The panels share their scale, which stops growing once one end is set.
    panels[0].set_ylim(bottom=0)
    return figure


@styled
def ablations(results: StudyResults) -> Figure:
    """Mean and worst gap against the value of every axis."""
    handles = [
        Line2D([], [], label=measure.name, marker="o", **run_look(i))
        for i, measure in enumerate(GAPS)
    ]
    axes = list(results.axes)
    columns = min(3, len(axes))
    rows = -(-len(axes) // columns)
    figure = new_figure(2.1 * rows + 0.4 + legend_inches(handles))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[len(axes) :]:
        panel.remove()
    for name, panel in zip(axes, panels, strict=False):
        methods = results.axes[name]
        for index, measure in enumerate(GAPS):
            means = [mean(values(results, m, measure)).value for m in methods.values()]
            panel.plot(range(len(methods)), means, marker="o", **run_look(index))
        panel.set_xticks(range(len(methods)), [plain(value) for value in methods])
        panel.set_title(plain(name), fontweight="bold")
        linear_ticks(panel)
    figure.supylabel("gap (nats per token)", fontsize=9.5)
    legend_outside(figure, handles)
    return figure


def has_curves(results: StudyResults) -> bool:
    """Whether any run was measured on its way."""
    return bool(_with_curves(results))


def _with_curves(results: StudyResults) -> list[str]:
    return [method for method in shown_methods(results) if _finished(results, method)]


def _finished(results: StudyResults, method: str) -> list[Result]:
    return [r for r in results.of(method) if r is not None and r.curve_weights]


def _mean_curve(found: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [E] and gap [E, D], each the mean over the seeds."""
    tokens = np.mean([np.array(result.curve_tokens) for result in found], axis=0)
    return tokens, np.mean([np.array(result.curve_gap) for result in found], axis=0)


def _panels(
    results: StudyResults, methods: Sequence[str], label: str
) -> tuple[Figure, list[Axes], float]:
    """A panel for each method, a legend of the domains, and the scale of the tokens."""
    scale, x_label = token_axis(max(result.tokens for result in results.results))
    handles = [
        Line2D([], [], label=plain(name), **_line(index))
        for index, name in enumerate(results.domains)
    ]
    figure, panels = panel_grid(methods, x_label, label, handles)
    return figure, panels, scale


def _line(index: int) -> dict[str, Any]:
    look = domain_look(index)
    return {"color": look["color"], "linestyle": look["linestyle"]}
