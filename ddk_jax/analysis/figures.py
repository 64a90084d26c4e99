"""The figures of a run, and of several runs laid over each other.

Every function takes the records of one or more runs and returns a `Figure`. One run shows each
domain in its own colour; several runs show one small panel per domain with a colour and line style
per run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ddk_jax.analysis.drawing import (
    GREY,
    INK,
    LineEnd,
    choose_scale,
    domain_look,
    label_ends,
    legend_inches,
    legend_outside,
    linear_ticks,
    new_figure,
    panel_grid,
    plain,
    run_look,
    smooth,
    styled,
    thin,
    token_axis,
)
from ddk_jax.analysis.runs import RunRecord, perplexity, union_of_domains

Runs = Sequence[RunRecord]
Curve = Callable[[RunRecord], tuple[np.ndarray, np.ndarray]]
NEEDS_TEACHER = "this figure is for runs with a teacher"
WEIGHT_LABEL = "mixture weight (share of rows)"


@styled
def perplexity_by_domain(runs: Runs) -> Figure:
    """Validation perplexity of each domain: student before and after, teacher (paper, figure 1)."""
    domains = union_of_domains(runs)
    handles = _run_handles(runs)
    height = 1.0 + 0.27 * len(domains) * max(1.0, 0.62 * len(runs))
    figure = new_figure(height + legend_inches(handles))
    axes = figure.subplots()
    _draw_perplexity(axes, runs, domains)
    legend_outside(figure, handles)
    place = "outside lower left" if handles else "outside upper left"
    legend_outside(figure, _moment_handles(runs), place)
    return figure


@styled
def perplexity_ratio(runs: Runs) -> Figure:
    """Perplexity of the student over that of the teacher, by tokens (paper, figure 3)."""
    label = "perplexity ratio, student / teacher"
    return _domain_figure(runs, _ratio_curve, label, reference=1.0)


@styled
def mixture_weights(runs: Runs) -> Figure:
    """Mixture weight of each domain over tokens; each weight holds for an interval."""
    equal = 1 / len(union_of_domains(runs))
    return _domain_figure(runs, _weight_curve, WEIGHT_LABEL, equal, held=True)


@styled
def realised_shares(runs: Runs) -> Figure:
    """Share of the training tokens that each domain really had, by interval."""
    equal = 1 / len(union_of_domains(runs))
    return _domain_figure(runs, _share_curve, "share of the training tokens", equal, held=True)


@styled
def learning_speed(runs: Runs) -> Figure:
    """How fast the validation loss of each domain falls, per training token of all domains."""
    label = "fall of the loss (nats / million tokens)"
    return _domain_figure(runs, _speed_curve, label, reference=0.0)


@styled
def gap_to_teacher(runs: Runs) -> Figure:
    """Mean over the domains and worst domain of student minus teacher, nats per token."""
    handles = _run_handles(runs)
    figure = new_figure(3.6 + legend_inches(handles))
    axes = figure.subplots()
    scale, x_label = _token_axis(runs)
    axes.set(xlabel=x_label, ylabel="gap to the teacher (nats/token)")
    if len(runs) == 1:
        _draw_gap_of_one(axes, runs[0], scale)
        return figure
    for index, run in enumerate(runs):
        mean, worst = _mean_and_worst(run)
        look, x = run_look(index), run.evaluation_tokens / scale
        axes.plot(x, mean, **look, marker="o", label=plain(run.name))
        axes.plot(x, worst, **look, marker="^", linewidth=1.1)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.margins(x=0.012)
    legend_outside(figure, handles)
    look: dict[str, Any] = {"color": GREY, "linestyle": ""}
    kinds = [
        Line2D([], [], marker="o", label="mean over domains", **look),
        Line2D([], [], marker="^", label="worst domain", **look),
    ]
    legend_outside(figure, kinds, "outside lower left")
    return figure


@styled
def training_loss(runs: Runs) -> Figure:
    """The objective and its terms over tokens: every step faint, a moving mean strong."""
    scale, x_label = _token_axis(runs)
    series = [_loss_series(run) for run in runs]
    names = list(dict.fromkeys(name for terms in series for name in terms))
    if len(runs) == 1:
        figure = new_figure(3.6)
        axes = figure.subplots()
        axes.set(xlabel=x_label, ylabel="training loss (nats/token)")
        ends = []
        for index, name in enumerate(names):
            end = _draw_noisy(axes, runs[0].tokens / scale, series[0][name], run_look(index))
            ends.append(LineEnd(f"{plain(name)}  {end[1]:.2f}", run_look(index), *end))
        axes.margins(x=0.012)
        label_ends(axes, ends, axes_inches=2.9)
        return figure
    label = "training loss (nats/token)"
    figure, panels = panel_grid(names, x_label, label, _run_handles(runs))
    for panel, name in zip(panels, names, strict=True):
        for index, (run, terms) in enumerate(zip(runs, series, strict=True)):
            if name in terms:
                _draw_noisy(panel, run.tokens / scale, terms[name], run_look(index))
    return figure


@styled
def learning_rate(runs: Runs) -> Figure:
    """The learning rate of every optimiser step."""
    handles = _run_handles(runs)
    figure = new_figure(2.6 + legend_inches(handles))
    axes = figure.subplots()
    for index, run in enumerate(runs):
        axes.plot(*thin(run.steps, run.learning_rate), **run_look(index), label=plain(run.name))
    axes.set(xlabel="optimiser step", ylabel="learning rate")
    linear_ticks(axes)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    legend_outside(figure, handles)
    return figure


@styled
def throughput(runs: Runs) -> Figure:
    """Training tokens per second, and the share of the time spent waiting for data."""
    handles = _run_handles(runs)
    figure = new_figure(4.2 + legend_inches(handles))
    speed, waiting = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for index, run in enumerate(runs):
        _draw_noisy(speed, run.steps, run.tokens_per_second, run_look(index))
        _draw_noisy(waiting, run.steps, 100 * run.data_wait, run_look(index))
    speed.set(ylabel="throughput (tokens/s)")
    linear_ticks(speed)
    waiting.set(xlabel="optimiser step", ylabel="waiting for\ndata (% of time)")
    speed.set_ylim(bottom=0)
    waiting.set_ylim(0, max(5.0, min(100.0, waiting.get_ylim()[1])))
    waiting.set_xlim(left=0)
    legend_outside(figure, handles)
    return figure


@styled
def overview(run: RunRecord) -> Figure:
    """Two panels for a README: perplexity by domain, and how the mixture followed the gap."""
    height = max(3.9, 0.19 * len(run.domains) + 1.4)
    figure = new_figure(height)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    _draw_perplexity(left, [run], list(run.domains), narrow=True)
    left.set_ylabel("")
    left.set_title("What the student learned", fontweight="bold")
    legend_outside(figure, _moment_handles([run]), "outside lower left")
    scale, x_label = _token_axis([run])
    ends = _draw_domains(right, run, _weight_curve, scale, held=True)
    right.set(xlabel=x_label, ylabel=WEIGHT_LABEL)
    right.margins(x=0.012)
    right.set_ylim(bottom=0)
    linear_ticks(right)
    right.set_title("What it was given to read", fontweight="bold")
    label_ends(right, ends, axes_inches=height - 1.1)
    return figure


def _token_axis(runs: Runs) -> tuple[float, str]:
    return token_axis(
        max(max(run.trained_tokens, *map(int, run.evaluation_tokens)) for run in runs)
    )


def _run_handles(runs: Runs) -> list[Line2D]:
    if len(runs) == 1:
        return []
    return [
        Line2D([], [], **run_look(index), label=plain(run.name, limit=60))
        for index, run in enumerate(runs)
    ]


def _moment_handles(runs: Runs) -> list[Line2D]:
    """Keys to the three marks of the perplexity figure; those that were drawn."""
    look: dict[str, Any] = {"color": GREY, "linestyle": "", "markersize": 6.5}
    handles = [Line2D([], [], marker="o", markerfacecolor="white", label="student before", **look)]
    if any(len(run.student_nats) > 1 for run in runs):
        handles.append(Line2D([], [], marker="o", label="student after", **look))
    if any(run.teacher_nats is not None for run in runs):
        look = {**look, "color": INK, "markersize": 10, "markeredgewidth": 2}
        handles.append(Line2D([], [], marker="|", label="teacher", **look))
    return handles


def _draw_perplexity(axes: Axes, runs: Runs, domains: list[str], *, narrow: bool = False) -> None:
    """One row per domain and run: an arrow-like line from before to after, a bar at the teacher."""
    shown = []
    for index, run in enumerate(runs):
        before, after = perplexity(run.student_nats[[0, -1]])
        offset = (index - (len(runs) - 1) / 2) * 0.8 / len(runs)
        for column, name in enumerate(run.domains):
            row = domains.index(name)
            colour = domain_look(row)["color"] if len(runs) == 1 else run_look(index)["color"]
            y = row + offset
            axes.plot(
                [before[column], after[column]],
                [y, y],
                color=colour,
                marker="o",
                markersize=6.5,
                linewidth=1.4,
                markevery=[1] if len(run.student_nats) > 1 else [],
                label=plain(name),
            )
            axes.plot(before[column], y, "o", color=colour, markersize=6.5, markerfacecolor="white")
            if run.teacher_nats is not None:
                teacher = perplexity(run.teacher_nats)[column]
                axes.plot(teacher, y, "|", color=INK, markersize=13, markeredgewidth=2)
                shown.append(teacher)
        shown += [before, after]
    logarithmic = choose_scale(axes, shown, axis="x", narrow=narrow)
    axes.set_xlabel("validation perplexity" + (" (log scale)" if logarithmic else ""))
    axes.set_ylabel("domain")
    axes.set_yticks(range(len(domains)), [plain(name) for name in domains])
    axes.set_ylim(len(domains) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _domain_figure(
    runs: Runs, curve: Curve, label: str, reference: float, *, held: bool = False
) -> Figure:
    """A quantity per domain over tokens: lines in one plot, or a panel per domain for many runs.

    Args:
        runs: What to show.
        curve: Tokens [N] and values [N, D] of a run.
        label: Label of the y axis.
        reference: The value that a dotted line marks.
        held: The values are shares that hold until the next one: draw steps from zero up.
    """
    scale, x_label = _token_axis(runs)
    domains = union_of_domains(runs)
    if len(runs) == 1:
        height = max(3.7, 0.19 * len(domains) + 0.9)
        figure = new_figure(height)
        panels = [figure.subplots()]
        ends = _draw_domains(panels[0], runs[0], curve, scale, held=held)
        panels[0].set(xlabel=x_label, ylabel=label)
    else:
        figure, panels = panel_grid(domains, x_label, label, _run_handles(runs))
        for index, run in enumerate(runs):
            tokens, values = curve(run)
            for name, column in zip(run.domains, values.T, strict=True):
                panel = panels[domains.index(name)]
                panel.plot(tokens / scale, column, drawstyle=_style(held), **run_look(index))
    for panel in panels:
        if held:
            linear_ticks(panel)
            panel.set_ylim(bottom=0)
        else:
            shown = [curve(run)[1] for run in runs] + [np.full(1, reference)]
            choose_scale(panel, shown, narrow=len(runs) > 1)
        panel.axhline(reference, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
        panel.margins(x=0.012)
    if len(runs) == 1:
        label_ends(panels[0], ends, axes_inches=height - 0.7)
    return figure


def _draw_domains(
    axes: Axes, run: RunRecord, curve: Curve, scale: float, *, held: bool
) -> list[LineEnd]:
    """One line per domain in the domain's look; returns what to write at their ends."""
    tokens, values = curve(run)
    ends = []
    for index, (name, column) in enumerate(zip(run.domains, values.T, strict=True)):
        look = domain_look(index)
        axes.plot(
            tokens / scale,
            column,
            drawstyle=_style(held),
            # The end of the last step is no new value.
            markevery=range(len(tokens) - held),
            markersize=3.5 if held else 4.5,
            label=plain(name),
            **look,
        )
        text = f"{plain(name)}  {column[-1]:,.{2 if column[-1] < 100 else 0}f}"
        ends.append(LineEnd(text, look, tokens[-1] / scale, column[-1]))
    return ends


def _style(held: bool) -> str:
    return "steps-post" if held else "default"


def _mean_and_worst(run: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    assert run.mean_gap is not None and run.worst_gap is not None, NEEDS_TEACHER
    return run.mean_gap, run.worst_gap


def _draw_gap_of_one(axes: Axes, run: RunRecord, scale: float) -> None:
    """Every domain thin, their mean and their maximum strong."""
    gap, (mean, worst) = run.gap, _mean_and_worst(run)
    assert gap is not None, NEEDS_TEACHER
    x = run.evaluation_tokens / scale
    for index, (name, column) in enumerate(zip(run.domains, gap.T, strict=True)):
        look: dict[str, Any] = {**domain_look(index), "marker": "", "linewidth": 1.0, "alpha": 0.45}
        axes.plot(x, column, label=plain(name), **look)
    strong: dict[str, dict[str, Any]] = {
        "worst": {"color": INK, "marker": "^", "linestyle": "--"},
        "mean": {"color": INK, "marker": "o", "linewidth": 2.4},
    }
    axes.plot(x, worst, label="worst domain", **strong["worst"])
    axes.plot(x, mean, label="mean over domains", **strong["mean"])
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.margins(x=0.012)
    last = run.domains[int(np.nanargmax(gap[-1]))] if np.isfinite(gap[-1]).any() else "none"
    ends = [
        LineEnd(f"worst  {worst[-1]:.2f}\n({plain(last)})", strong["worst"], x[-1], worst[-1]),
        LineEnd(f"mean  {mean[-1]:.2f}", strong["mean"], x[-1], mean[-1]),
    ]
    label_ends(axes, ends, axes_inches=1.5)


def _ratio_curve(run: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    assert run.gap is not None, NEEDS_TEACHER
    return run.evaluation_tokens, perplexity(run.gap)


def _speed_curve(run: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    return run.evaluation_tokens[1:], run.learning_speed[1:]


def _weight_curve(run: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Weights at their starts, and the last ones once more where the run stands."""
    end = max(run.trained_tokens, int(run.mixture_tokens[-1]))
    return np.append(run.mixture_tokens, end), np.vstack([run.weights, run.weights[-1:]])


def _share_curve(run: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    return _weight_curve(run)[0], np.vstack([run.shares, run.shares[-1:]])


def _loss_series(run: RunRecord) -> dict[str, np.ndarray]:
    """The terms, and their sum where it says more than the only term does."""
    if len(run.terms) == 1 and all(
        np.allclose(t, run.loss, equal_nan=True) for t in run.terms.values()
    ):
        return dict(run.terms)
    return {"objective": run.loss, **run.terms}


def _draw_noisy(
    axes: Axes, x: np.ndarray, y: np.ndarray, look: dict[str, Any]
) -> tuple[float, float]:
    """A series faint and its moving mean strong; returns the last point of the mean."""
    x_thin, y_thin = thin(x, y)
    if not x_thin.size:
        return np.nan, np.nan
    axes.plot(x_thin, y_thin, color=look["color"], linewidth=0.8, alpha=0.35)
    strong = smooth(y_thin)
    axes.plot(x_thin, strong, **look)
    return float(x_thin[-1]), float(strong[-1])
