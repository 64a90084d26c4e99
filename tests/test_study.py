"""Studies: YAML to runs, the miniature of the whole command, statistics, costs, tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from scipy import stats

from ddk_jax.cli import main
from ddk_jax.config import load_config, save_config
from ddk_jax.errors import DivergedError, RunHeldError, UserError
from ddk_jax.models.spec import ModelSpec
from ddk_jax.study import grid as grid_module
from ddk_jax.study.costs import RunCost, forward_flops, training_cost
from ddk_jax.study.figures import weight_curves
from ddk_jax.study.grid import Grid, Part, estimate
from ddk_jax.study.page import write_page
from ddk_jax.study.plan import Cell, Study, load_study
from ddk_jax.study.results import (
    Measured,
    Result,
    StudyResults,
    read_json,
    result_digest,
    write_json,
)
from ddk_jax.study.statistics import mean, paired, t_distribution, t_quantile
from ddk_jax.study.tables import (
    MEASURES,
    differences_table,
    mean_gap,
    measures_table,
    tables,
    worst_gap,
)
from ddk_jax.training.lease import RunLease

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))
LABELS = {"objective": {"terms": [{"loss": "cross_entropy"}]}}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tiny.use_devices(monkeypatch, 1)
    with tiny.quick_programs(monkeypatch):
        yield


def write_study(root: Path, directory: Path, **tree: Any) -> Path:
    """A study of the tiny run; its base has the natural mixture and no controller."""
    base = tiny.config(root, directory / "unused", **{"mixture.controller": "static"})
    weights = {"words": 8.0, "digits": 3.0, "echo": 1.0}
    mixture = replace(base.mixture, prior_weights=weights, settings={})
    directory.mkdir(parents=True, exist_ok=True)
    save_config(replace(base, mixture=mixture), directory / "base.yaml")
    described = {
        "base": str(directory / "base.yaml"),
        "dir": str(directory / "made"),
        "reference": "kd",
        "rows_per_domain": 4,
        "methods": {"kd": {}, "ddk": {"mixture": {"controller": "ddk"}}},
        **tree,
    }
    (directory / "study.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    return directory / "study.yaml"


# --- the miniature


@pytest.mark.slow
def test_a_miniature_of_the_study(
    tiny_root: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tiny_root, tmp_path, seeds=[0, 1])
    assert main(["study", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "student untouched" in printed and "ddk" in printed
    made = tmp_path / "made"
    results = read_json(StudyResults, made / "results.json")
    assert [(r.method, r.seed) for r in results.results] == [
        ("kd", 0),
        ("ddk", 0),
        ("kd", 1),
        ("ddk", 1),
    ]
    assert results.starved == [2]
    for result in results.results:
        measured = result.measured
        assert measured is not None and result.tokens > 0
        # Learning has closed a part of the gap, by the same teacher for all.
        assert mean_gap(measured) < mean_gap(results.untouched)
        assert measured.teacher_nats == results.untouched.teacher_nats
        assert len(result.curve_gap) == len(result.curve_tokens) == 4
        assert len(result.curve_weights[0]) == 3
    kd, ddk = results.results[:2]
    assert kd.cost.evaluation == 0 < ddk.cost.evaluation
    assert kd.weights == pytest.approx([8 / 12, 3 / 12, 1 / 12])
    assert {p.name for p in made.glob("*.svg")} == {"gaps.svg", "ratios.svg", "weights.svg"}
    assert "| ddk |" in (made / "study.md").read_text()

    # Called again, it trains no more and says the same; a lost result is measured again.
    before = (made / "results.json").read_bytes()
    (made / "ddk" / "rate_0.03" / "seed_1" / "result.json").unlink()
    assert main(["study", str(path)]) == 0
    again = read_json(StudyResults, made / "results.json")
    assert [r.measured for r in again.results] == [r.measured for r in results.results]
    assert main(["study", str(path), "--collect"]) == 0
    assert len((made / "results.json").read_bytes()) == pytest.approx(len(before), abs=20)


@pytest.mark.slow
def test_stages_a_search_and_axes(tiny_root: Path, tmp_path: Path, quick: None) -> None:
    doremi = {
        "stages": {
            "reference": LABELS,
            "proxy": {
                "teacher": {"path": "{reference}/export"},
                "objective": {"terms": [{"loss": "cross_entropy"}, {"loss": "clipped_excess"}]},
                "mixture": {"controller": "doremi", "prior": "uniform", "prior_weights": {}},
            },
        },
        "mixture": {"prior": "{proxy}", "prior_weights": {}},
        **LABELS,
    }
    path = write_study(
        tiny_root,
        tmp_path,
        common={"train": {"steps": 8}},
        methods={"kd": {}, "cpt_doremi": doremi, "ddk": {"mixture": {"controller": "ddk"}}},
        axes={"alpha": {"method": "ddk", "key": "mixture.alpha", "values": [0.2]}},
        search={"method": "kd", "rates": [0.0001, 0.03], "leaders": 1, "factors": [0.5]},
    )
    done = Grid(load_study(path)).run()
    keys = [(method, f"{rate:g}") for method, _, rate in done]
    assert keys[:2] == [("kd", "0.0001"), ("kd", "0.03")]  # the chosen one is not run twice
    assert keys[2:5] == [("cpt_doremi", "0.03"), ("ddk", "0.03"), ("ddk_alpha_0.2", "0.03")]
    assert len(keys) == 6 and keys[5][1] == "0.015"
    main_run = tmp_path / "made/cpt_doremi/rate_0.03/seed_0"
    proxy = json.loads((main_run / "proxy/summary.json").read_text())
    run = json.loads((main_run / "run/summary.json").read_text())
    assert run["weights"] == pytest.approx(proxy["average_weights"])
    assert not np.allclose(proxy["average_weights"], 1 / 3)
    results = Grid(load_study(path)).gather()
    result = results.of("cpt_doremi")[0]
    assert result is not None and result.cost.stages > 0 == result.cost.teacher
    assert set(results.rates.values()) == {0.03}
    assert results.axes == {"alpha": {"0.2": "ddk_alpha_0.2"}}
    titles = [table.title for table in tables(results)]
    assert "Ablation: alpha" in titles and "Other learning rates" in titles
    write_page(results, tmp_path / "page")
    assert (tmp_path / "page/ablations.svg").is_file()


# --- from YAML to runs


def changed(tiny_root: Path, tmp_path: Path, **tree: Any) -> Any:
    return load_study(write_study(tiny_root, tmp_path, **tree))


def test_a_method_is_the_base_with_its_changes(tiny_root: Path, tmp_path: Path) -> None:
    study = changed(
        tiny_root,
        tmp_path,
        seeds=[3, 5],
        common={"optim": {"learning_rate": 0.01}},
        methods={"kd": {}, "cpt": LABELS, "equal": {"mixture": {"prior_weights": {}}}},
    )
    kd, cpt, equal = (study.cell(method, 5) for method in ("kd", "cpt", "equal"))
    assert kd.config.run.seed == 5 and kd.config.optim.learning_rate == kd.rate == 0.01
    assert kd.config.run.dir == str(tmp_path / "made/kd/rate_0.01/seed_5/run")
    assert replace(kd.config, run=cpt.config.run, objective=cpt.config.objective) == cpt.config
    assert [term.loss for term in cpt.config.objective.terms] == ["cross_entropy"]
    assert kd.config.mixture.prior_weights and not equal.config.mixture.prior_weights
    assert study.cell("kd", 5, 0.2).directory.parent.name == "rate_0.2"
    assert [cell.seed for cell in study.cells()] == [3, 3, 3, 5, 5, 5]
    assert kd.row_tokens == tiny.STEPS * tiny.ROWS * tiny.SEQ_LEN


def test_stages_know_the_directories_of_those_before(tiny_root: Path, tmp_path: Path) -> None:
    stages = {"one": LABELS, "two": {"teacher": {"path": "{one}/export"}}}
    methods = {"kd": {}, "two": {"stages": stages, "mixture": {"prior": "{two}"}}}
    cell = changed(tiny_root, tmp_path, methods=methods).cell("two", 0)
    assert [stage.name for stage in cell.stages] == ["one", "two", "run"]
    first, second, last = (stage.config for stage in cell.stages)
    assert second.teacher.path == f"{first.run.dir}/export"
    assert last.mixture.prior == second.run.dir and last.teacher == first.teacher
    assert last.objective == second.objective != first.objective  # stages share the base alone


def test_axes_make_methods_of_values(tiny_root: Path, tmp_path: Path) -> None:
    study = changed(
        tiny_root,
        tmp_path,
        axes={
            "gamma": {"method": "ddk", "key": "objective.terms.1.weight", "values": [0.2, 0.5]},
            "gap": {"method": "ddk", "key": "mixture.gap", "values": ["loss_ratio"]},
        },
    )
    assert study.methods == ["kd", "ddk", "ddk_gamma_0.5", "ddk_gap_loss_ratio"]
    # The value that the method has already is the method itself, and not run twice.
    assert study.axes["gamma"] == {"0.2": "ddk", "0.5": "ddk_gamma_0.5"}
    weights = [term.weight for term in study.cell("ddk_gamma_0.5", 0).config.objective.terms]
    assert weights == [1.0, 0.5]


def test_a_variant_of_a_method_with_stages_may_be_the_method(
    tiny_root: Path, tmp_path: Path
) -> None:
    staged = {"stages": {"one": {}}, "mixture": {"prior": "{one}", "alpha": 0.3}}
    axes = {"alpha": {"method": "two", "key": "mixture.alpha", "values": [0.3, 0.4]}}
    study = changed(tiny_root, tmp_path, methods={"kd": {}, "two": staged}, axes=axes)
    assert study.axes["alpha"] == {"0.3": "two", "0.4": "two_alpha_0.4"}
    varied = study.cell("two_alpha_0.4", 0)
    assert varied.config.mixture.prior == varied.stages[0].config.run.dir


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sedes": [1]}, "unknown key sedes: did you mean seeds"),
        ({"dir": "gs://bucket/study"}, "needs a folder"),
        ({"seeds": [1, 1]}, "needs different numbers"),
        ({"reference": "ddkk"}, "reference = 'ddkk': did you mean ddk"),
        ({"methods": {"kd": {}, "x": {"mixtrue": {}}}}, "methods.x: run: unknown key mixtrue"),
        ({"methods": {"kd": {}, "a/b": {}}}, "'a/b': not a name"),
        ({"methods": {"kd": {"stages": {"run": {}}}}}, "'run': not a name"),
        ({"search": {"method": "kd", "rates": []}}, "needs positive learning rates"),
        ({"search": {"method": "kdd", "rates": [0.1]}}, "search.method = 'kdd': did you mean kd"),
        (
            {"axes": {"a": {"method": "kd", "key": "objective.terms.7.weight", "values": [1]}}},
            "objective.terms.7.weight: the config has no such place",
        ),
        (
            {"axes": {"a": {"method": "kd", "key": "train.stpes", "values": [1]}}},
            "unknown key train.stpes: did you mean steps",
        ),
    ],
)
def test_a_mistake_in_a_study_is_one_line(
    tiny_root: Path, tmp_path: Path, tree: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        changed(tiny_root, tmp_path, **tree)
    assert "study.yaml" in str(error.value)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_runs_of_ours(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    assert len(study.cells()) == len(study.config.seeds) * len(study.methods)
    for first in study.config.first:
        # What the runs start from is what the earlier run makes.
        assert f"{load_config(first).run.dir}/export" == study.base.student.path


# --- the grid, with results out of a hat


def result(method: str, seed: int, rate: float, gap: float = 1.0) -> Result:
    return Result(
        method=method,
        seed=seed,
        rate=rate,
        digest="made up",
        tokens=1000,
        row_tokens=1200,
        measured=None if math.isnan(gap) else measured(gap),
        cost=RunCost(
            student=1e12, teacher=2e12, evaluation=3e10, teacher_evaluation=0.0, uncached=6e10
        ),
        weights=(0.5, 0.5),
        curve_tokens=(0, 1000),
        curve_gap=((2.0, 2.0), (gap, gap)),
        curve_weights=((0.9, 0.1),),
        seconds=60.0,
    )


def measured(gap: float) -> Measured:
    return Measured(
        nats=(3.0 + gap, 2.0 + 2 * gap),
        teacher_nats=(3.0, 2.0),
        forward_kl=(gap, gap),
        overlap=(0.5, 0.6),
        bytes_per_token=(4.0, 2.0),
    )


def fill(grid: Grid, gaps: dict[tuple[str, float], float]) -> dict[Any, Result]:
    """Results of all cells that are known, until no more appear; `gaps` by method and rate."""
    done: dict[Any, Result] = {}
    while todo := [cell for cell in grid.plan(done) if cell.key not in done]:
        for cell in todo:
            gap = gaps.get((cell.method, cell.rate), 1.0)
            done[cell.key] = result(cell.method, cell.seed, cell.rate, gap)
    return done


def test_a_search_comes_first_and_the_leaders_last(tiny_root: Path, tmp_path: Path) -> None:
    search = {"method": "kd", "rates": [0.1, 0.2, 0.4], "leaders": 2}
    methods = {"kd": {}, "cpt": LABELS, "ddk": {"mixture": {"controller": "ddk"}}}
    grid = Grid(changed(tiny_root, tmp_path, seeds=[0, 1], methods=methods, search=search))
    assert [cell.key for cell in grid.plan({})] == [("kd", 0, r) for r in (0.1, 0.2, 0.4)]
    # A rate that diverges is not chosen.
    gaps = {("kd", 0.1): math.nan, ("kd", 0.2): 0.5, ("kd", 0.4): 0.6}
    done = fill(grid, gaps | {("ddk", 0.2): 0.4, ("cpt", 0.2): 0.9})
    assert grid.chosen_rate(done) == 0.2 and grid.leaders(done, 0.2) == ["ddk", "kd"]
    checked = [key for key in done if key[0] != "kd" and key[2] != 0.2]
    assert checked == [("ddk", 0, 0.1), ("ddk", 0, 0.4)]
    # Of 3 + 6 + 4 runs, KD's at the chosen, the half and the double rate are there already.
    assert len(done) == 3 + 5 + 2


def test_parts_share_the_cells(tiny_root: Path, tmp_path: Path) -> None:
    assert Part.parse("") == Part(0, 1) and Part.parse("2/3") == Part(1, 3)
    for text in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="such as 2/4"):
            Part.parse(text)


def simulate(monkeypatch: pytest.MonkeyPatch, nap: Callable[[float], None]) -> list[Any]:
    """Cells get a result without running, and waiting is `nap`. Returns what was run, in order."""
    ran = []

    def run_cell(study: Study, cell: Cell) -> Result:
        ran.append((cell.method, cell.seed))
        return result_of(study, cell)

    monkeypatch.setattr(grid_module, "run_cell", run_cell)
    monkeypatch.setattr(grid_module, "measure_untouched", lambda study: measured(2.0))
    monkeypatch.setattr(grid_module.time, "sleep", nap)
    return ran


def result_of(study: Study, cell: Cell) -> Result:
    made = result(cell.method, cell.seed, cell.rate)
    return replace(made, digest=result_digest(study, cell))


def test_a_cell_that_another_process_holds_is_looked_at_later(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = changed(tiny_root, tmp_path, seeds=[0, 1])
    naps = []
    held = RunLease(study.cell("kd", 0).directory)

    def nap(seconds: float) -> None:
        naps.append(seconds)
        held.__exit__(None, None, None)

    ran = simulate(monkeypatch, nap)
    held.__enter__()
    first = Grid(study, Part(0, 2))
    assert len(first.run()) == 2 and ran == [("kd", 1), ("kd", 0)] and len(naps) == 1
    # The rest is for the others; a call without a part takes it.
    assert len(Grid(study).run()) == 4 and ran[2:] == [("ddk", 0), ("ddk", 1)]
    # The results of another study are not those of this one.
    assert not Grid(changed(tiny_root, tmp_path, seeds=[0, 1], rows_per_domain=5)).done()


def test_what_another_process_has_finished_meanwhile_is_taken(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held until it is measured, and the untouched student likewise."""
    study = changed(tiny_root, tmp_path)
    cell = study.cell("kd", 0)
    leases = [RunLease(study.directory), RunLease(cell.directory)]
    left = iter(leases)

    def nap(seconds: float) -> None:
        write_json(measured(3.0), study.untouched)
        lease = next(left)
        if lease is leases[1]:
            write_json(result_of(study, cell), cell.directory / grid_module.RESULT)
        lease.__exit__(None, None, None)

    ran = simulate(monkeypatch, nap)
    for lease in leases:
        lease.__enter__()
    assert len(Grid(study).run()) == 2 and ran == [("ddk", 0)]
    assert read_json(Measured, study.untouched) == measured(3.0)
    # As if it had come between the look for results and the lease.
    Grid(study)._try(cell)
    assert ran == [("ddk", 0)] and not list(study.directory.rglob("run.lock"))


def test_a_run_that_is_held_says_so_at_once(tiny_root: Path, tmp_path: Path) -> None:
    study = changed(tiny_root, tmp_path)
    cell = study.cell("kd", 0)
    with RunLease(Path(cell.config.run.dir)), pytest.raises(RunHeldError):
        grid_module.run_cell(study, cell)


def test_a_directory_of_another_config_is_refused(tiny_root: Path, tmp_path: Path) -> None:
    study = changed(tiny_root, tmp_path)
    cell = study.cell("kd", 0)
    run_dir = Path(cell.config.run.dir)
    run_dir.mkdir(parents=True)
    other = replace(cell.config, train=replace(cell.config.train, steps=5))
    save_config(other, run_dir / "config.yaml")
    with pytest.raises(UserError, match="holds a run of another config"):
        grid_module.run_cell(study, cell)


def test_a_run_that_diverges_is_a_result_without_a_student(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = changed(tiny_root, tmp_path)

    def diverge(config: Any) -> Any:
        raise DivergedError("diverged at step 3")

    monkeypatch.setattr(grid_module, "_finish", diverge)
    found = grid_module.run_cell(study, study.cell("kd", 0))
    assert found.measured is None and found.cost.total == 0
    write_json(found, tmp_path / "result.json")
    assert read_json(Result, tmp_path / "result.json") == found


def test_the_time_left_follows_from_what_is_done(tiny_root: Path, tmp_path: Path) -> None:
    study = changed(tiny_root, tmp_path, seeds=[0, 1])
    assert "no estimate" in estimate(study.cells(), {})
    done = {r.key: r for r in [result("kd", 0, 0.03)]}  # 60 seconds for 1200 tokens
    todo = study.cells()[1:]
    expected = math.ceil(sum(cell.row_tokens for cell in todo) / 1200)
    assert estimate(todo, done) == f"about {expected} min on one machine"
    assert estimate(todo * 20, done).startswith("about 1 h ")


# --- statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10])
def test_students_t_is_that_of_scipy(freedom: int) -> None:
    for t in (0.0, 0.3, 2.0, 30.0):
        assert t_distribution(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), rel=1e-12)
        assert t_distribution(-t, freedom) == pytest.approx(stats.t.cdf(-t, freedom), abs=1e-12)
    for p in (0.5, 0.8, 0.975, 0.9995):
        assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), abs=1e-8)


def test_paired_differences_are_a_t_test() -> None:
    ours, reference = np.array([1.0, 1.3, 0.9, 1.2]), np.array([1.1, 1.5, 1.2, 1.25])
    found = paired(ours, reference)
    low, high = stats.ttest_rel(ours, reference).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    error = np.std(ours - reference, ddof=1) / 2
    wanted = (stats.t.ppf(0.975, 3) + stats.t.ppf(0.8, 3)) * error
    assert found.detectable == pytest.approx(wanted) and found.seeds == 4
    # What all seeds share cancels; a pair without one of its halves is left out.
    shared = np.array([5.0, -3.0, 0.5, 2.0])
    assert paired(ours + shared, reference + shared).low == pytest.approx(found.low)
    missing = np.append(ours, math.nan), np.append(reference, 1.0)
    assert paired(*missing) == found


def test_the_detectable_difference_is_found_about_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    seeds, trials = 3, 20_000
    noise = rng.normal(size=(trials, seeds))
    detectable = (t_quantile(0.975, seeds - 1) + t_quantile(0.8, seeds - 1)) / math.sqrt(seeds)
    sample = noise + detectable
    t = sample.mean(axis=1) / (sample.std(axis=1, ddof=1) / math.sqrt(seeds))
    assert 0.75 < np.mean(t > t_quantile(0.975, seeds - 1)) < 0.9


def test_one_seed_has_a_mean_and_no_interval() -> None:
    one = paired(np.array([1.0]), np.array([1.5]))
    assert one.value == -0.5 and math.isnan(one.low) and math.isnan(one.detectable)
    assert mean(np.array([math.nan])).seeds == 0


# --- costs


QWEN_SMALL = ModelSpec(
    hidden_size=2048, num_layers=24, num_heads=16, num_kv_heads=16, ffn_size=5504, vocab_size=151936
)
QWEN_LARGE = ModelSpec(
    hidden_size=5120,
    num_layers=40,
    num_heads=40,
    num_kv_heads=40,
    ffn_size=13696,
    vocab_size=152064,
)
PAPER = {"tokens": 15e9, "measurements": 30}
SAMPLES = 10 * 500
"""Of a measurement, in the paper."""


def test_the_papers_costs_and_the_controllers_share_of_them() -> None:
    small, large = (forward_flops(spec, 4096) for spec in (QWEN_SMALL, QWEN_LARGE))
    labels = training_cost(small, 0.0, tokens=15e9, measurements=0, measured_tokens=0.0)
    kd = training_cost(small, large, tokens=15e9, measurements=0, measured_tokens=0.0)
    # Table 12 of the paper: 1.456e8 and 5.364e8 TFLOPs.
    assert labels.total == pytest.approx(1.456e20, rel=0.25)
    assert kd.total / labels.total == pytest.approx(5.364 / 1.456, rel=0.05)
    # It does not say how long a sample is; its 0.69 % for DDK are about 800 tokens.
    ddk = training_cost(small, large, **PAPER, measured_tokens=SAMPLES * 800.0)
    assert 0.006 < ddk.uncached_overhead <= 0.007
    assert 0.0005 < ddk.overhead <= 0.0025
    # With the cache, samples may be more than twice as long; but not whole rows.
    longer = training_cost(small, large, **PAPER, measured_tokens=SAMPLES * 2000.0)
    packed = training_cost(small, large, **PAPER, measured_tokens=SAMPLES * 4096.0)
    assert longer.overhead <= 0.0025 < packed.overhead
    # 100 packed rows are what 500 samples are.
    rows = training_cost(small, large, **PAPER, measured_tokens=10 * 100 * 4096.0)
    assert rows.uncached_overhead <= 0.007 and rows.overhead <= 0.0025


def test_a_forward_pass_is_two_flops_for_every_weight() -> None:
    spec = ModelSpec(hidden_size=8, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=10)
    spec = replace(spec, vocab_size=50)
    weights = 3 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 10) + 8 * 50
    attention = 3 * 4 * 8 * 16
    assert forward_flops(spec, 16) == 2 * weights + attention
    windows = replace(spec, pattern=("local", "global", "global"), window=4)
    assert forward_flops(spec, 16) - forward_flops(windows, 16) == 4 * 8 * (16 - 4)
    assert forward_flops(replace(spec, gated_mlp=False), 16) == 2 * (weights - 3 * 80) + attention


# --- tables


def made_results() -> StudyResults:
    cells = [("kd", 1.0), ("ddk", 0.8), ("kd", 1.1), ("ddk", 0.9)]
    found = [result(m, i // 2, 0.1, gap) for i, (m, gap) in enumerate(cells)]
    return StudyResults(
        study="made",
        reference="kd",
        seeds=(0, 1),
        domains=("code", "prose"),
        prior=(0.8, 0.2),
        rates={"kd": 0.1, "ddk": 0.1, "lost": 0.1},
        untouched=measured(2.0),
        methods=("kd", "ddk", "lost"),
        axes={},
        results=(*found, result("ddk", 0, 0.2, 0.7)),
        packages={"ddk_jax": "1"},
    )


def test_tables_say_what_the_results_are(tmp_path: Path) -> None:
    results = made_results()
    assert results.starved == [1]
    first = measured(1.0)
    assert mean_gap(first) == 1.5 and worst_gap(first) == 2.0
    by_name = {m.name: m.of(first, results) for m in MEASURES}
    assert by_name["gap closed"] == by_name["closed where starved"] == pytest.approx(0.5)
    assert by_name["bits per byte"] == pytest.approx((4 / 4 + 4 / 2) / 2 / math.log(2))
    (row,) = differences_table(results).rows
    expected = paired(np.array([1.2, 1.35]), np.array([1.5, 1.65]))
    assert row[:2] == ("ddk", f"{expected.value:+.4f}")
    found = {table.title: table for table in tables(results)}
    assert [row[0] for row in found["Measures"].rows] == ["student untouched", "kd", "ddk"]
    assert found["Measures"].note.startswith("Means over the seeds 0, 1, with")
    assert measures_table(replace(results, seeds=(0,))).note.startswith("Seed 0. ")
    assert [row[1] for row in found["Other learning rates"].rows] == ["0.1", "0.2"]
    # Untouched, kd and ddk over two seeds, teacher: nats per token of the second domain.
    nats = (6.0, 4.1, 3.7, 2.0)
    row = found["Perplexity by domain"].rows[1]
    assert row == ("prose", "0.200", *(f"{math.exp(x):,.2f}" for x in nats))
    row = found["Bits per byte by domain"].rows[1]
    assert row == ("prose", "0.200", *(f"{x / 2 / math.log(2):.4f}" for x in nats))
    page = write_page(results, tmp_path)
    assert "Differences to kd" in page.read_text() and (tmp_path / "gaps.svg").is_file()
    # Results survive their file, what is missing included.
    lost = replace(results, results=(*results.results, result("lost", 0, 0.1, math.nan)))
    write_json(lost, tmp_path / "results.json")
    assert read_json(StudyResults, tmp_path / "results.json") == lost
    assert [row[1:3] for row in tables(lost)[0].rows][-1] == ("0.00 M", "-")


def test_the_weights_of_every_method_are_inside_the_figure() -> None:
    results = made_results()
    first, *others = results.results
    flat = replace(first, curve_weights=((0.5, 0.5),))
    figure = weight_curves(replace(results, results=(flat, *others)))
    for panel in figure.axes:
        low, high = panel.get_ylim()
        assert low == 0 and high > 0.9
        assert max(np.max(line.get_ydata()) for line in panel.lines) <= high


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    assert read_json(Result, tmp_path / "none.json") is None
    (tmp_path / "x.json").write_text('{"method": "kd"}')
    with pytest.raises(UserError, match=r"x\.json: not a result"):
        read_json(Result, tmp_path / "x.json")
