"""The record of a run, its figures, its tables and its page, on a run written here by hand."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from ddk_jax.analysis import figures, report
from ddk_jax.analysis.drawing import (
    DOMAIN_COLOURS,
    domain_look,
    smooth,
    spread,
    svg_bytes,
    thin,
    token_axis,
)
from ddk_jax.analysis.report import KINDS, domain_table, write_report
from ddk_jax.analysis.runs import RunRecord, load_run, with_unique_names
from ddk_jax.analysis.tables import aligned_table, domain_rows
from ddk_jax.errors import StorageError, UserError

DOMAINS = (
    "python",
    "c",
    "mathematics",
    "novels",
    "encyclopaedia",
    "speeches",
    "german",
    "scripture",
    "questions",
    "recipes",
)
TEACHER = np.array([1.9, 1.75, 2.6, 3.4, 3.1, 3.0, 3.3, 2.2, 2.9, 2.4])
TOKENS_PER_STEP = 4000


def write_run(
    directory: Path,
    *,
    domains: tuple[str, ...] = DOMAINS,
    steps: int = 150,
    interval: int = 13,
    teacher: bool = True,
    finished: bool = True,
    controller: str = "ddk",
    seed: int = 0,
) -> Path:
    """Writes a run whose student learns each domain with the tokens it is given."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    count = len(domains)
    teacher_nats = np.resize(TEACHER, count)
    floor = teacher_nats + np.resize([0.3, 0.25, 0.5, 0.6, 0.55, 0.4, 0.9, 0.2, 0.5, 0.35], count)
    seen, total = np.zeros(count), 0
    weights, events = np.full(count, 1 / count), []

    def student() -> np.ndarray:
        pace = 9e3 * np.resize([1.0, 1.1, 1.5, 2.0, 1.8, 1.6, 2.5, 0.9, 1.7, 1.2], count)
        learned = 1 - np.exp(-(((0.5 * seen + 0.06 * total) / pace) ** 0.75))
        return 8.3 + (floor - 8.3) * learned

    def measure(step: int) -> None:
        nonlocal weights
        nats = student() + 0.01 * rng.standard_normal(count)
        gap = nats - teacher_nats
        events.append(
            {
                "event": "evaluation",
                "step": step,
                "tokens_seen": total,
                "domains": list(domains),
                "student_nats": nats.tolist(),
                "teacher_nats": teacher_nats.tolist() if teacher else None,
                "tokens": [20000] * count,
                "timing": {"seconds": 2.0},
            }
        )
        if controller == "ddk":
            psi = np.exp(gap) * (weights if step else 1)
            weights = psi / psi.sum() if not step else 0.5 * psi / psi.sum() + 0.5 / count
        events.append(
            {
                "event": "mixture",
                "step": step,
                "start_row": 32 * (step + 1) if step else 0,
                "domains": list(domains),
                "weights": weights.tolist(),
                "gap": gap.tolist() if teacher else None,
                "gap_kind": "loss_difference",
                "controller": controller,
            }
        )

    measure(0)
    for step in range(1, steps + 1):
        drawn = rng.multinomial(TOKENS_PER_STEP, weights)
        seen, total = seen + drawn, total + TOKENS_PER_STEP
        entropy = float(student() @ weights + 0.08 * rng.standard_normal())
        divergence = max(0.05, entropy - float(teacher_nats @ weights) - 0.2)
        events.append(
            {
                "event": "step",
                "step": step,
                "tokens": total,
                "loss": entropy + 0.2 * divergence,
                "terms": {"cross_entropy": entropy, "forward_kl": divergence},
                "domain_nats": {"cross_entropy": [entropy] * count},
                "domain_tokens": drawn.tolist(),
                "learning_rate": 3e-3 * min(step / 15, 0.55 + 0.45 * np.cos(np.pi * step / steps)),
                "grad_norm": 0.8,
                "skipped": 0,
                "timing": {
                    "seconds": 1.6,
                    "tokens_per_second": 300.0 if step == 1 else 2500 + 80 * rng.standard_normal(),
                    "data_wait_seconds": 0.01 + 0.01 * rng.random(),
                },
            }
        )
        if step % interval == 0 or step == steps:
            measure(step)
    _write_files(directory, events, domains, finished)
    return directory


def _write_files(
    directory: Path, events: list[dict[str, Any]], domains: tuple[str, ...], finished: bool
) -> None:
    config = {
        "run": {"dir": str(directory), "seed": 0},
        "data": {"domains": [{"name": name, "sources": []} for name in domains]},
        "train": {"steps": 150, "rows_per_step": 32},
        "mixture": {"controller": "ddk", "gap": "loss_difference"},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    identity = {"digest": "0f3a", "versions": {"python": "3.11.2", "jax": "0.10.2"}}
    (directory / "run.json").write_text(json.dumps(identity))
    if finished:
        summary = {
            "steps": 150,
            "tokens": 600_000,
            "stop_reason": "steps",
            "timing": {"wall_seconds": 241.3, "tokens_per_second": 2486.0},
        }
        (directory / "summary.json").write_text(json.dumps(summary))


def change_metrics(directory: Path, change: Any) -> None:
    """Applies `change` to every event; an event for which it returns None is dropped."""
    path = directory / "metrics.jsonl"
    events = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(event) + "\n" for event in events if event is not None))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    """The paper's method, equal sampling, and a run that was stopped early."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "ddk")
    write_run(folder / "equal_sampling", controller="static", seed=1)
    write_run(folder / "stopped_early", steps=90, finished=False, seed=2)
    return [load_run(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def drawn(runs: list[RunRecord]) -> dict[tuple[str, int], Figure]:
    """Every figure of one run and of all, by name and number of runs, laid out."""
    result = {
        (kind.name, count): kind.draw(runs[:count]) for kind in KINDS for count in (1, len(runs))
    }
    result["overview", 1] = figures.overview(runs[0])
    for figure in result.values():
        figure.draw_without_rendering()
    return result


def tiny_run(directory: Path) -> Path:
    """Two domains and perplexities that a reader can check by heart."""
    directory.mkdir()
    names = ["code", "prose"]

    def evaluation(step: int, tokens: int, student: list[float]) -> dict[str, Any]:
        return {
            "event": "evaluation",
            "step": step,
            "tokens_seen": tokens,
            "domains": names,
            "student_nats": np.log(student).tolist(),
            "teacher_nats": np.log([10, 5]).tolist(),
            "tokens": [7, 7],
        }

    def mixture(step: int, row: int, weights: list[float]) -> dict[str, Any]:
        return {
            "event": "mixture",
            "step": step,
            "start_row": row,
            "domains": names,
            "weights": weights,
        }

    def step(number: int, tokens: int, drawn: list[int]) -> dict[str, Any]:
        return {
            "event": "step",
            "step": number,
            "tokens": tokens,
            "loss": 3.0,
            "terms": {"cross_entropy": 3.0},
            "domain_tokens": drawn,
            "learning_rate": 0.1,
            "timing": {"seconds": 2.0, "tokens_per_second": 50.0, "data_wait_seconds": 0.5},
        }

    events = [
        evaluation(0, 0, [1000, 400]),
        mixture(0, 0, [0.5, 0.5]),
        step(1, 100, [60, 40]),
        evaluation(1, 100, [20, 20]),
        mixture(1, 32, [0.25, 0.75]),
        step(2, 400, [240, 60]),
        evaluation(2, 400, [20, 10]),
    ]
    _write_files(directory, events, ("code", "prose"), finished=True)
    return directory


def test_the_record_holds_what_was_written(tmp_path: Path) -> None:
    run = load_run(tiny_run(tmp_path / "tiny"))
    assert run.name == "tiny" and run.domains == ("code", "prose") and run.finished
    np.testing.assert_array_equal(run.evaluation_tokens, [0, 100, 400])
    np.testing.assert_array_equal(run.mixture_tokens, [0, 100])
    np.testing.assert_array_equal(run.weights, [[0.5, 0.5], [0.25, 0.75]])
    np.testing.assert_allclose(run.shares, [[0.6, 0.4], [0.8, 0.2]])
    np.testing.assert_array_equal(run.domain_tokens, [300, 100])
    np.testing.assert_allclose(run.data_wait, [0.25, 0.25])
    assert run.gap is not None and run.mean_gap is not None and run.worst_gap is not None
    np.testing.assert_allclose(np.exp(run.gap), [[100, 80], [2, 4], [2, 2]])
    np.testing.assert_allclose(np.exp(run.mean_gap), [np.sqrt(8000), np.sqrt(8), 2])
    np.testing.assert_allclose(np.exp(run.worst_gap), [100, 4, 2])
    speed = [np.log([1000 / 20, 400 / 20]) / 1e-4, np.log([1, 2]) / 3e-4]
    np.testing.assert_allclose(run.learning_speed, [[np.nan] * 2, *speed])


def test_the_table_equals_a_hand_computation(tmp_path: Path) -> None:
    run = load_run(tiny_run(tmp_path / "tiny"))
    code, prose, mean = domain_rows(run)
    assert code[0] == "code" and prose[0] == "prose"
    np.testing.assert_allclose(code[1:], [1000, 20, 10, 2, 0.25, 0.75])
    np.testing.assert_allclose(prose[1:], [400, 10, 5, 2, 0.75, 0.25])
    np.testing.assert_allclose(mean[1:5], [np.sqrt(400_000), np.sqrt(200), np.sqrt(50), 2])
    assert [line.split() for line in domain_table(run).splitlines()[2:]] == [
        ["code", "1,000.00", "20.00", "10.00", "2.00", "0.250", "75.0%"],
        ["prose", "400.00", "10.00", "5.00", "2.00", "0.750", "25.0%"],
        ["mean", "632.46", "14.14", "7.07", "2.00", "-", "-"],
    ]


def test_the_table_is_aligned_and_at_most_100_columns_wide(tmp_path: Path) -> None:
    names = ("x" * 80, "y", "z" * 28)
    lines = domain_table(load_run(write_run(tmp_path / "run", domains=names))).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 100
    assert aligned_table(["a", "b"], [["long", "1"], ["x", "22"]]).splitlines() == [
        "a      b",
        "----  --",
        "long   1",
        "x     22",
    ]


def test_domains_follow_the_config_whatever_the_order_of_the_metrics(tmp_path: Path) -> None:
    straight = load_run(tiny_run(tmp_path / "straight"))

    def reverse(event: dict[str, Any]) -> dict[str, Any]:
        per_domain = ("domains", "student_nats", "teacher_nats", "weights", "domain_tokens")
        return {k: v[::-1] if k in per_domain else v for k, v in event.items()}

    change_metrics(tiny_run(tmp_path / "reversed"), reverse)
    run = load_run(tmp_path / "reversed")
    assert run.domains == straight.domains
    np.testing.assert_array_equal(run.student_nats, straight.student_nats)
    np.testing.assert_array_equal(run.weights, straight.weights)
    np.testing.assert_array_equal(run.domain_tokens, straight.domain_tokens)
    assert domain_table(run) == domain_table(straight)


def test_a_null_is_missing_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    path = tiny_run(tmp_path / "run")

    def forget(event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "evaluation" and event["step"] == 2:
            event["student_nats"][0] = None
        if event["event"] == "step":
            event["loss"] = None
        return event

    change_metrics(path, forget)
    run = load_run(path)
    code, prose, mean = domain_rows(run)
    assert np.isnan(code.after) and np.isnan(code.ratio)
    assert prose.ratio == pytest.approx(2) and mean.ratio == pytest.approx(2)
    for kind in KINDS:
        svg_bytes(kind.draw([run]))


def unit_labels(figure: Figure) -> tuple[str, str]:
    """Labels of the x and y axes, the figure's own where its panels share them."""
    x = [axes.get_xlabel() for axes in figure.axes] + [figure.get_supxlabel()]
    y = [axes.get_ylabel() for axes in figure.axes] + [figure.get_supylabel()]
    return " | ".join(filter(None, x)), " | ".join(filter(None, y))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("name", "x_label", "y_label"),
    [
        ("perplexity", "validation perplexity (log scale)", "domain"),
        ("ratio", "training tokens (thousands)", "perplexity ratio, student / teacher"),
        ("weights", "training tokens (thousands)", "mixture weight (share of rows)"),
        ("shares", "training tokens (thousands)", "share of the training tokens"),
        ("gap", "training tokens (thousands)", "gap to the teacher (nats/token)"),
        ("speed", "training tokens (thousands)", "fall of the loss (nats / million tokens)"),
        ("loss", "training tokens (thousands)", "training loss (nats/token)"),
        ("learning_rate", "optimiser step", "learning rate"),
        (
            "throughput",
            "optimiser step",
            "throughput (tokens/s) | waiting for\ndata (% of time)",
        ),
    ],
)
def test_axes_are_labelled_with_units(
    drawn: dict[tuple[str, int], Figure], name: str, count: int, x_label: str, y_label: str
) -> None:
    assert unit_labels(drawn[name, count]) == (x_label, y_label)


@pytest.mark.parametrize("name", ["perplexity", "ratio", "weights", "gap"])
def test_one_run_has_one_line_per_domain_in_its_own_colour(
    drawn: dict[tuple[str, int], Figure], name: str
) -> None:
    lines = {line.get_label(): line for line in drawn[name, 1].axes[0].lines}
    colours = [to_hex(lines[domain].get_color()).upper() for domain in DOMAINS]
    assert colours == list(DOMAIN_COLOURS)


def test_lines_show_the_measured_values(
    runs: list[RunRecord], drawn: dict[tuple[str, int], Figure]
) -> None:
    run = runs[0]
    assert run.gap is not None
    ratio = {line.get_label(): line for line in drawn["ratio", 1].axes[0].lines}
    weight = {line.get_label(): line for line in drawn["weights", 1].axes[0].lines}
    share = {line.get_label(): line for line in drawn["shares", 1].axes[0].lines}
    for index, domain in enumerate(DOMAINS):
        np.testing.assert_allclose(ratio[domain].get_xdata(), run.evaluation_tokens / 1000)
        np.testing.assert_allclose(ratio[domain].get_ydata(), np.exp(run.gap[:, index]))
        # Weights set after step 13 start with row 32 * 14, which is the first one of step 15.
        x = np.asarray(weight[domain].get_xdata())
        assert x[1] == 14 * TOKENS_PER_STEP / 1000 and x[-1] == 600
        np.testing.assert_allclose(weight[domain].get_ydata()[:-1], run.weights[:, index])
        np.testing.assert_allclose(share[domain].get_ydata()[:-1], run.shares[:, index])
        assert weight[domain].get_drawstyle() == "steps-post"


@pytest.mark.parametrize("name", ["ratio", "weights"])
def test_several_runs_have_a_panel_per_domain_and_a_line_per_run(
    drawn: dict[tuple[str, int], Figure], name: str
) -> None:
    figure = drawn[name, 3]
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(DOMAINS)
    # The fourth line is the reference.
    assert all(len(axes.lines) == 4 for axes in figure.axes)
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines[:3]]
    assert len(set(looks)) == 3
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["ddk", "equal_sampling", "stopped_early"]


def texts_of(figure: Figure) -> list[Text]:
    """Every text that is drawn: tick labels beyond the limits exist but are not."""
    found = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible())
    ticks = [
        tick for axes in figure.axes for a in (axes.xaxis, axes.yaxis) for tick in a.majorTicks
    ]
    labels = {label for tick in ticks for label in (tick.label1, tick.label2)}
    shown = [text for text in found if text not in labels]
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in axis.get_major_ticks():
                if min(limits) <= tick.get_loc() <= max(limits) and tick.label1.get_visible():
                    shown.append(tick.label1)
    return [text for text in shown if text.get_text().strip()]


def test_no_text_is_cut_off_or_overlaps_another(drawn: dict[tuple[str, int], Figure]) -> None:
    for key, figure in drawn.items():
        boxes = [
            (text.get_text(), text.get_window_extent().padded(-1)) for text in texts_of(figure)
        ]
        assert len(boxes) > 5
        for index, (name, box) in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, (key, name)
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, (key, name)
            for other, other_box in boxes[:index]:
                assert not box.overlaps(other_box), (key, name, other)


def test_domains_beyond_the_palette_differ_in_style() -> None:
    looks = {tuple(sorted(domain_look(index).items())) for index in range(40)}
    assert len(looks) == 40


def test_names_are_never_read_as_mathematics_or_hidden(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", domains=("a$b$", "_hidden"), steps=4))
    figure = figures.mixture_weights([run])
    svg_bytes(figure)
    shown = {text.get_text().split("  ")[0].strip() for text in figure.axes[0].texts}
    assert shown == {r"a\$b\$", "_hidden"}


@given(st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=12).map(sorted), st.floats(0.01, 0.08))
def test_labels_are_spread_in_order_and_stay_where_they_fit(
    wanted: list[float], gap: float
) -> None:
    placed = spread(np.array(wanted, np.float64), gap)
    assert np.all(np.diff(placed) >= gap - 1e-9)
    assert placed[0] >= -1e-9
    assert placed[-1] <= 1 + 1e-9
    if np.all(np.diff(wanted) >= gap) and wanted[0] >= 0 and wanted[-1] <= 1:
        np.testing.assert_allclose(placed, wanted, atol=1e-9)


def test_a_long_series_is_thinned_without_moving_its_mean() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=30_000)
    x_thin, y_thin = thin(np.arange(30_000), y)
    assert len(y_thin) == 600
    np.testing.assert_allclose([x_thin.mean(), y_thin.mean()], [14_999.5, y.mean()], atol=1e-9)
    y[5] = np.nan
    assert np.isfinite(thin(np.arange(30_000), y)[1]).all()


def test_the_moving_mean_keeps_a_straight_line() -> None:
    line = np.linspace(3.0, -1.0, 301)
    np.testing.assert_allclose(smooth(line), line, atol=1e-12)


@pytest.mark.parametrize(
    ("largest", "scale"), [(999, 1.0), (600_000, 1e3), (1_500_000, 1e6), (15_000_000_000, 1e9)]
)
def test_tokens_have_a_readable_unit(largest: int, scale: float) -> None:
    assert token_axis(largest)[0] == scale


class Page(HTMLParser):
    """Collects what a browser would load, run or show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.shown = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_the_page_of_one_run_is_self_contained_and_escaped(tmp_path: Path) -> None:
    path = write_run(tmp_path / '<b>run</b> & "more"', steps=6, interval=3)
    summary = json.loads((path / "summary.json").read_text())
    summary["stop_reason"] = "<script>alert(1)</script>"
    (path / "summary.json").write_text(json.dumps(summary))
    written = write_report([path], tmp_path / "report")
    page = Page(written)
    assert page.loaded and all(source.startswith("data:image/svg+xml") for source in page.loaded)
    assert not page.tags & {"script", "b", "link", "iframe", "object"}
    assert "url(" not in written.read_text(encoding="utf-8")
    for shown in (
        '<b>run</b> & "more"',
        "<script>alert(1)</script>",
        "encyclopaedia",
        "0.10.2",
        "ddk train",
        "gap: loss_difference",
        "4 min 1 s",
    ):
        assert shown in page.shown
    names = [*(kind.name for kind in KINDS), "overview"]
    expected = {f"{name}.{kind}" for name in names for kind in ("png", "svg")} | {"report.html"}
    assert {file.name for file in written.parent.iterdir()} == expected
    assert imread(written.parent / "gap.png").shape[1] == 1600


def test_the_page_of_several_runs_compares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "KINDS", KINDS[:1])
    first = tiny_run(tmp_path / "first")
    second = tiny_run(tmp_path / "second")

    def improve(event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "evaluation" and event["step"] == 2:
            event["student_nats"] = np.log([16.0, 5.0]).tolist()
        return event

    change_metrics(second, improve)
    text = write_report([first, second, first], tmp_path / "report").read_text(encoding="utf-8")
    assert "Comparison of 2 runs" in text
    # Last mean gap: ln 2 for the first run, the mean of ln 1.6 and ln 1 for the second.
    assert "0.693</td>" in text and "0.235</td>" in text
    assert "<td>20.00</td><td class=best>16.00</td>" in text
    assert "<td>10.00</td><td class=best>5.00</td>" in text


def test_the_page_says_what_share_of_a_step_waited_for_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "KINDS", KINDS[:1])
    page = write_report([tiny_run(tmp_path / "tiny")], tmp_path / "report")
    assert "<dt>waiting for data</dt><dd>25.00%" in page.read_text(encoding="utf-8")


def test_the_same_run_gives_the_same_svg_without_a_date(runs: list[RunRecord]) -> None:
    first, second = (svg_bytes(figures.gap_to_teacher(runs[:1])) for _ in range(2))
    assert first == second
    assert b"<dc:date>" not in first and b"matplotlib.org" not in first


def test_an_unfinished_run_without_a_teacher_has_the_figures_that_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "png_bytes", lambda figure: b"")
    path = write_run(tmp_path / "run", steps=4, interval=2, teacher=False, finished=False)
    run = load_run(path)
    assert run.gap is None and run.mean_gap is None and not run.finished
    assert all(np.isnan(row.teacher) and np.isnan(row.ratio) for row in domain_rows(run))
    page = write_report([path], tmp_path / "report")
    names = {file.stem for file in page.parent.glob("*.svg")}
    expected = {"perplexity", "weights", "shares", "speed", "loss", "learning_rate", "throughput"}
    assert names == expected | {"overview"}
    assert "not finished" in Page(page).shown


def test_a_run_that_was_measured_once_can_be_reported(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=0, finished=False)
    page = write_report([path], tmp_path / "report")
    assert {file.stem for file in page.parent.glob("*.svg")} == {"perplexity"}
    row = domain_rows(load_run(path))[0]
    assert np.isfinite(row.before) and np.isnan(row.after) and np.isnan(row.share)
    assert row.ratio == pytest.approx(row.before / row.teacher)


def test_runs_with_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "seed0", tmp_path / "b" / "seed0", tmp_path / "b" / "seed1"]
    runs = with_unique_names([load_run(write_run(path, steps=1)) for path in paths])
    assert [run.name for run in runs] == ["a/seed0", "b/seed0", "seed1"]


def test_what_is_no_run_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run directory.*config\.yaml"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="at least one"):
        write_report([], tmp_path / "report")
    path = write_run(tmp_path / "run", steps=1)
    change_metrics(path, lambda event: None if event["event"] == "evaluation" else event)
    with pytest.raises(UserError, match="holds no evaluation"):
        write_report([path], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("field", ["tokens_seen", "student_nats", "learning_rate", "start_row"])
def test_a_line_without_a_field_is_reported_with_its_file(tmp_path: Path, field: str) -> None:
    path = write_run(tmp_path / "run", steps=1)
    change_metrics(path, lambda event: {k: v for k, v in event.items() if k != field})
    with pytest.raises(StorageError, match=rf"metrics\.jsonl.*{field}"):
        load_run(path)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "run.json"])
def test_a_broken_file_is_reported_with_its_name(tmp_path: Path, name: str) -> None:
    path = write_run(tmp_path / "run", steps=1)
    (path / name).write_text("[1, 2")
    with pytest.raises(StorageError, match=name):
        load_run(path)


def test_an_output_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=0)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="taken"):
        write_report([path], tmp_path / "taken")
