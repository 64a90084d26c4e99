"""`ddk plan`: arithmetic by hand, recorded plans, and whole configs through the TPU compiler."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hub_configs
import jax
import numpy as np
import pytest
import tiny

from ddk_jax import cli
from ddk_jax.config import Config, load_config
from ddk_jax.errors import StorageError, UserError
from ddk_jax.models.decoder import Decoder, num_parameters
from ddk_jax.models.families import spec_from_config
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.chips import CHIPS, known_slices, next_larger
from ddk_jax.parallel.compiled import topology
from ddk_jax.parallel.hlo import Shape
from ddk_jax.parallel.mesh import MESH_AXES
from ddk_jax.parallel.work import Collective, Op, Work
from ddk_jax.plain import to_plain
from ddk_jax.planning import command, slices
from ddk_jax.planning.estimate import Estimate, estimate
from ddk_jax.planning.job import PlannedJob, with_settings
from ddk_jax.planning.minimum import (
    attention_flops,
    matrix_parameters,
    minimum_flops,
    visible_share,
)
from ddk_jax.planning.plan import NOT_MEASURED, Plan, Resident, Speed, StepPlan, make_plan
from ddk_jax.planning.report import plan_json, plan_text
from ddk_jax.planning.search import Candidate, candidates, remedies, search
from ddk_jax.training.loaded import read_shape

ROOT = Path(__file__).parents[1]
PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
GIB = 2**30
QUIET: Callable[[str], None] = lambda _: None  # noqa: E731


def published(name: str) -> ModelSpec:
    return spec_from_config(hub_configs.HUB[name].config)


# --- Chips and slices.


def test_slices_grow_and_have_names_of_their_own() -> None:
    names = [known.name for known in known_slices()]
    assert len(set(names)) == len(names) and {n.split(":")[0] for n in names} == set(CHIPS)
    for chip in CHIPS.values():
        sizes = [math.prod(shape) for shape in chip.slices]
        assert sizes == sorted(set(sizes))
    assert next_larger("v5e:2x2") == "v5e:2x4" and next_larger("v5e:3x1") == "v5e:2x2"
    assert next_larger("v5e:16x16") is None


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_the_compiler_knows_every_slice(chip: Any) -> None:
    for known in known_slices():
        if known.chip is chip:
            devices = topology(known.name)
            assert len(devices) == known.chips and devices[0].device_kind == chip.kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:4x5", r"did you mean v5e:4x"),
        ("v5e4x4", r"did you mean v5e:4x4\?"),
        ("h100:8", "ddk plan --list"),
        ("", "ddk plan --list"),
    ],
)
def test_a_slice_that_does_not_exist(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> list[jax.Device]:
        raise ValueError("libtpu has none")

    monkeypatch.setattr(slices, "topology", unknown)
    with pytest.raises(UserError, match=message):
        slices.open_slice(name)


def test_without_the_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        slices.open_slice("v5e:4x4")


# --- The minimum of FLOPs.


@pytest.mark.parametrize("name", hub_configs.HUB)
def test_matrices_of_well_known_models(name: str) -> None:
    """All parameters but tables, norms and biases: those with one axis beside that of the layers.

    Some of the published counts are of files with tables that are padded.
    """
    spec = published(name)
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(Decoder(spec=spec).abstract())[0]:
        names = [part.key for part in path]
        biases = {"q_bias", "k_bias", "v_bias", "bias", "up_bias", "down_bias", "o_bias"}
        looked_up = names[0] == "embed" and not (spec.tied_head and names[-1] == "table")
        if looked_up or biases & set(names) or any("norm" in part for part in names):
            continue
        total += math.prod(leaf.shape)
    assert matrix_parameters(spec) == total


def test_matrices_of_a_paper_s_pair_by_hand() -> None:
    table = 152_064 * 5_120
    vectors = 40 * (2 * 5_120 + 3 * 5_120) + 5_120
    assert matrix_parameters(published("Qwen1.5-14B")) == 14_167_290_880 - table - vectors


def test_what_attention_cannot_do_without() -> None:
    spec = ModelSpec(
        hidden_size=12,
        num_layers=5,
        num_heads=3,
        num_kv_heads=1,
        ffn_size=7,
        vocab_size=11,
        pattern=("local", "global"),
        window=4,
    )
    pairs = 0
    for layer in range(5):
        for query in range(9):
            first = max(0, query - 3) if layer % 2 == 0 else 0
            pairs += query - first + 1
    assert attention_flops(spec, 9) == pairs * 3 * 4 * 2 * 2
    assert visible_share([spec, spec], 9) == pairs / (5 * 9**2)
    one = 2 * 9 * matrix_parameters(spec) + attention_flops(spec, 9)
    wider = replace(spec, ffn_size=8)
    other = one + 2 * 9 * 5 * 3 * 12
    assert minimum_flops(spec, [wider], rows=6, length=9) == 6 * (3 * one + other)
    assert minimum_flops(spec, [], rows=6, length=9, student_passes=2) == 6 * 2 * one


def test_the_minimum_of_a_paper_s_step() -> None:
    """32 rows of 4,096 tokens on 8 chips: 589 TFLOP of matrices on each, without attention."""
    student, teacher = published("Qwen1.5-1.8B"), published("Qwen1.5-14B")
    rows, length = 32, 4096
    attention = rows * (3 * attention_flops(student, length) + attention_flops(teacher, length))
    matrices = minimum_flops(student, [teacher], rows=rows, length=length) - attention
    tokens = np.float64(rows * length)
    expected = tokens * (2 * 13_388_723_200 + 6 * 1_525_678_080)  # a few parts in 10^5 are vectors
    assert matrices == pytest.approx(expected, rel=1e-3)
    assert matrices / 8 / 1e12 == pytest.approx(589, abs=1)
    assert 0.05 < attention / matrices < 0.1


# --- The estimate.


def test_a_roofline_by_hand() -> None:
    chip, sent = CHIPS["v5e"], Shape("bf16", (1000, 500_000))
    gather = Collective(count=3, bytes=0, wire_bytes=18 * 10**9, sizes={sent: 3})
    bound_by_products = Op(flops=197 * 10**10, bytes=10**6, cycles=0)
    bound_by_memory = Op(flops=10**9, bytes=819 * 10**7, cycles=36 * 10**9)
    work = Work(
        flops=0,
        collectives={"all-gather": gather},
        custom_calls={},
        unknown_loops=0,
        ops={bound_by_products: 7, bound_by_memory: 5},
    )
    given: dict[str, Any] = {"kernel_flops": 197e10, "head_width": 64}
    found = estimate(work, chip, **given, with_cycles=False)
    assert found.operations == pytest.approx(7 * 0.01 / 0.97 + 5 * 0.01 / 0.9)
    assert found.kernels == pytest.approx(0.01 / 0.5 / 0.5)
    assert found.links == pytest.approx(18 / 200 / 0.9)
    assert found.total == pytest.approx(found.operations + found.kernels + found.links)
    cycles = estimate(work, chip, **given, with_cycles=True)
    assert cycles.operations == pytest.approx(7 * 0.01 / 0.97 + 5 * 36 / 1.5 / 2.4)
    assert work.bytes == 7 * 10**6 + 5 * 819 * 10**7


# --- Parts of a run without files.


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_paper_configs_have_the_published_shapes(path: Path) -> None:
    names = {
        "Llama-2-13b-hf": "Llama-2-13b",
        "starcoderbase-3b": None,
        "Llama-2-7b-adapted": None,
        "MiniMA-3B-pruned": None,
    }
    config = load_config(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    for model in (config.teacher, config.student):
        name = Path(model.path).name
        known = names.get(name, name)
        if known is not None:
            made = PlannedJob(config, tuple(jax.devices("cpu"))).start.decoder.spec
            spec = config.teacher.spec if model is config.teacher else made
            assert spec is not None
            assert replace(spec, head_dim=spec.head_width) == replace(
                published(known), head_dim=published(known).head_width
            )
    assert config.data.seq_len == (2048 if "tinyllama" in path.stem else 4096)
    assert config.optim.beta2 == 0.95 and config.student.remat == "full"


def test_sizes_of_students_that_nobody_published_here() -> None:
    by_name = {path.stem: load_config(path).student.spec for path in PAPER}
    assert num_parameters(by_name["starcoder_15.5b_3b"]) == pytest.approx(3.04e9, rel=0.01)
    assert num_parameters(by_name["minima_llama2_7b_3b"]) == pytest.approx(3.0e9, rel=0.03)


def planned(config: Config, count: int = 4) -> PlannedJob:
    return PlannedJob(config, tuple(jax.devices("cpu")[:count]))


def without_files(config: Config, root: Path) -> Config:
    """The tiny run as if it had been written on another machine: shapes in place of files."""
    teacher = replace(config.teacher, path="models/teacher", spec=tiny.TEACHER)
    data = replace(config.data, dir=str(root / "none"), tokenizer="")
    return replace(config, teacher=teacher, data=data)


@pytest.mark.slow
def test_a_planned_run_is_the_run(tiny_root: Path, tmp_path: Path) -> None:
    """The same programs as those of the run itself, with nothing on disk."""
    config = tiny.config(tiny_root, tmp_path, **{"mesh.fsdp": 4, "mesh.data": 1})
    here, elsewhere = planned(config), planned(without_files(config, tmp_path))
    one, other = (list(job.steps()) for job in (here, elsewhere))
    assert [step.name for step in one] == ["train", "evaluation", "teacher evaluation"]
    for a, b in zip(one, other, strict=True):
        assert a.traced.in_avals == b.traced.in_avals
        assert str(a.traced.jaxpr) == str(b.traced.jaxpr)


@pytest.mark.slow
def test_adapters_are_planned(tiny_root: Path, tmp_path: Path) -> None:
    student = {
        "path": str(tiny_root / "teacher"),
        "lora": {"rank": 2},
        "spec": to_plain(tiny.TEACHER),
    }
    config = tiny.config(tiny_root, tmp_path, student=student)
    elsewhere = with_settings(without_files(config, tmp_path), student={"path": "models/student"})
    for one, other in zip(planned(config).steps(), planned(elsewhere).steps(), strict=True):
        assert str(one.traced.jaxpr) == str(other.traced.jaxpr)


def test_what_a_plan_needs_to_be_told(tiny_root: Path, tmp_path: Path) -> None:
    config = without_files(tiny.config(tiny_root, tmp_path), tmp_path)
    assert planned(config).manifest.tokenizer.vocab_size == tiny.VOCABULARY
    assert planned(config).domains == tiny.DOMAINS
    unknown = with_settings(config, teacher={"spec": None, "path": "models none"})
    with pytest.raises(
        UserError, match=r"models none.*or say the teacher's shape in teacher\.spec"
    ):
        planned(unknown).teachers.specs  # noqa: B018
    nothing = with_settings(config, teacher={"path": "", "spec": None})
    with pytest.raises(UserError, match=r"how large the vocabulary is: set student\.spec\.vocab"):
        planned(nothing).manifest  # noqa: B018
    partial = with_settings(config, teacher={"spec": ModelSpec(hidden_size=8, vocab_size=5)})
    with pytest.raises(UserError, match=r"teacher\.spec\.num_layers is missing"):
        planned(partial).teachers.specs  # noqa: B018
    rows = with_settings(config, evaluation={"batch_rows": 6}, mesh={"fsdp": 4, "data": 1})
    with pytest.raises(UserError, match=r"evaluation\.batch_rows = 6: must be a multiple of the 4"):
        list(planned(rows).steps())


def test_the_hub_is_not_asked_for_what_the_config_says(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(path: str, revision: str = "") -> None:
        raise StorageError(f"{path}: the hub cannot be reached")

    monkeypatch.setattr("ddk_jax.training.loaded.resolve", offline)
    config = without_files(tiny.config(tiny_root, tmp_path), tmp_path)
    named = with_settings(config, teacher={"path": "owner/name"})
    assert planned(named).teachers.specs == (tiny.TEACHER,)
    with pytest.raises(StorageError, match=r"owner/name.*in teacher\.spec"):
        planned(with_settings(named, teacher={"spec": None})).teachers.specs  # noqa: B018


def test_a_shape_that_the_files_contradict(tiny_root: Path, tmp_path: Path) -> None:
    config = tiny.config(tiny_root, tmp_path)
    wrong = replace(config.teacher, spec=replace(tiny.TEACHER, num_layers=3, vocab_size=0))
    with pytest.raises(UserError, match=r"the teacher \(.*\) has num_layers = 2, not 3, which"):
        read_shape(wrong, "teacher")
    right = replace(config.teacher, spec=replace(tiny.TEACHER, vocab_size=0))
    assert read_shape(right, "teacher") == read_shape(config.teacher, "teacher")


# --- Text, JSON, and what helps.


def recorded(
    *, gib: float = 12.0, seconds: float = 2.0, topology: str = "v5e:4x4", fits: bool = True
) -> Plan:
    """A plan as from the compiler."""
    step = StepPlan(
        name="train",
        fits=fits,
        allocated_bytes=int(gib * GIB),
        peak_bytes=int(gib * GIB) - 2**20,
        temporary_bytes=3 * GIB,
        code_bytes=2**20,
        scopes={"student": 2 * GIB, "teacher": GIB, "loss": 3 * GIB},
        compile_seconds=21.0,
    )
    gathered = Shape("bf16", (5120, 152064))
    speed = Speed(
        flops_per_step=3 * 10**16,
        flops_ratio=1.25,
        hbm_traffic_bytes=10**12,
        collectives={
            "all-gather": Collective(count=9, bytes=10**9, wire_bytes=10**9, sizes={gathered: 2})
        },
        estimated_seconds=Estimate(operations=seconds - 0.5, kernels=0.3, links=0.2),
        tokens_per_second=524288 / seconds,
        mfu=0.4,
        days=seconds * 30000 / 86400,
    )
    return Plan(
        topology=topology,
        chips=16,
        level="O1",
        mesh={"data": 1, "fsdp": 16, "tensor": 1},
        rows={"per_step": 128, "per_micro_batch": 32, "per_chip": 2, "length": 4096},
        parameters={"student": 1_836_828_672, "teacher": 14_167_290_880},
        hbm_bytes=CHIPS["v5e"].hbm_bytes,
        resident=Resident(GIB // 2, GIB, 2 * GIB),
        minimum_flops=24 * 10**15,
        steps=(step,),
        speed=speed if fits else None,
        host_bytes=2 * GIB,
        assumptions=("v5e: 197 TFLOP/s",),
    )


def test_a_plan_that_fits_in_words() -> None:
    text = plan_text("runs/x", recorded())
    for words in (
        "runs/x on v5e:4x4: 16 chips, data 1 x fsdp 16 x tensor 1",
        "teacher 14,167 M -> student 1,837 M; 128 rows of 4096 tokens a step, in 4 micro-batches",
        "3.000e+16, 1.250 of the minimum",
        "largest bf16[5120,152064] (2 times)",
        "estimate, not measured on a TPU",
        "262,144 tokens/s, MFU 40%, 0.7 days for the run",
        "fits, with 24% of the HBM to spare",
        "compiled at level O1 in 21 s; this took 2.0 GiB of memory",
    ):
        assert words in text, text
    assert text.isascii() and max(map(len, text.splitlines())) <= 120


def test_a_plan_that_does_not_fit_in_words() -> None:
    config, plan = Config(), recorded(gib=17.0, fits=False)
    helps = remedies(config, plan, lambda config, topology: recorded(topology=topology), QUIET)
    text = plan_text("runs/x", plan, helps)
    assert "does not fit, over by 1.25 GiB (train): try" in text
    assert "  --student.remat full   # compiled: fits, with 24% to spare" in text
    assert "tokens/s" not in text
    assert "none fits" in plan_text("runs/x", plan)


def test_json_has_what_is_documented() -> None:
    documented = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for plan in (recorded(), recorded(gib=17.0, fits=False)):
        tree = json.loads(json.dumps(plan_json(plan)))
        for key in tree:
            assert f"`{key}`" in documented, key
        assert tree["fits"] is plan.fits and tree["note"] == NOT_MEASURED
        assert tree["peak_bytes_per_chip"] == plan.peak_bytes
        assert tree["hbm_bytes_per_chip"] == CHIPS["v5e"].hbm_bytes
        assert (tree["flops_ratio"] is None) == (plan.speed is None)
    assert plan_json(recorded())["collectives"]["all-gather"]["sizes"] == {"bf16[5120,152064]": 2}


def test_remedies_are_tried_from_the_cheapest_and_only_those_that_fit_are_named() -> None:
    config = with_settings(Config(), train={"rows_per_step": 256, "micro_rows": 32})
    asked: list[tuple[str, int, str]] = []

    def planner(changed: Config, topology: str) -> Plan:
        asked.append((topology, changed.train.micro_rows, changed.student.remat))
        return recorded(gib=17.0, fits=topology != "v5e:4x4", topology=topology)

    found = remedies(config, recorded(gib=17.0, fits=False), planner, QUIET)
    assert asked == [
        ("v5e:4x4", 32, "full"),
        ("v5e:4x4", 16, "full"),
        ("v5e:4x8", 32, "full"),
        ("v5e:8x8", 64, "full"),
    ]
    assert [remedy.words.split()[:2] for remedy in found] == [
        ["--topology", "v5e:4x8"],
        ["--topology", "v5e:8x8"],
    ]
    assert "--mesh.data 1 --mesh.fsdp 32" in found[0].words


# --- The search.


def cost(option: Candidate) -> tuple[float, float]:
    """GiB and seconds of a layout, as if compiled."""
    models = 60 / (option.fsdp * option.tensor) + 1
    kept = 2.5 if option.remat == "full" else 5
    seconds = 10 + 3 / option.rows_per_chip + option.tensor + (1 if option.remat == "full" else 0)
    return models + kept * option.rows_per_chip / option.tensor, seconds + option.data


def test_the_search_finds_what_trying_everything_would() -> None:
    config = with_settings(Config(), train={"rows_per_step": 128})
    options = list(candidates(config, 16, heads=(40, 16)))
    assert len({option.mesh for option in options}) == 14  # tensor 1, 2, 4, 8
    assert {option.rows_per_chip for option in options} == {1, 2, 4, 8}
    compiled: list[str] = []

    def planner(changed: Config, topology: str) -> Plan:
        mesh, micro = changed.mesh, changed.train.micro_rows
        rows = micro // (mesh.data * mesh.fsdp)
        option = Candidate(mesh.data, mesh.fsdp, mesh.tensor, rows, changed.student.remat)
        compiled.append(str(option))
        gib, seconds = cost(option)
        plan = recorded(gib=gib, seconds=seconds, fits=gib <= 15.75)
        models = int(60 * GIB / (mesh.fsdp * mesh.tensor))
        return replace(plan, resident=Resident(models, 0, 0))

    lines: list[str] = []
    found = search(config, "v5e:4x4", CHIPS["v5e"], options, planner, lines.append)
    expected = min((o for o in options if cost(o)[0] <= 15.75), key=lambda o: cost(o)[1])
    assert found.best is not None and found.best.candidate == expected
    assert len(lines) == len(found.tried) == len(options)
    assert len(compiled) == len(set(compiled)) < 0.8 * len(options)
    for tried in found.tried:
        if tried.plan is None:
            assert tried.skipped and cost(tried.candidate)[0] > 15.75
    with_rows = with_settings(config, **found.best.candidate.settings())
    assert with_rows.train.micro_rows == expected.shards * expected.rows_per_chip


def test_a_search_stops_where_nothing_can_be_faster() -> None:
    config = with_settings(Config(), train={"rows_per_step": 16})
    options = list(candidates(config, 16, heads=(16,)))
    floor = 24e15 / (16 * 0.97 * 197e12)
    planner = lambda config, topology: recorded(seconds=floor)  # noqa: E731
    found = search(config, "v5e:4x4", CHIPS["v5e"], options, planner, QUIET)
    assert [tried.plan is None for tried in found.tried[:3]] == [False, True, True]


def test_layouts_that_rows_or_heads_do_not_allow() -> None:
    config = with_settings(Config(), train={"rows_per_step": 8})
    found = list(candidates(config, 16, heads=(9, 15)))
    assert not found  # 16 chips cannot share 8 rows, and heads are odd
    assert {o.tensor for o in candidates(config, 16, heads=(6,))} == {2}


# --- The command.


@pytest.fixture
def small(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A config on disk, and plans as recorded: by the rows of a micro-batch, 8 do not fit."""

    def fake(config: Config, topology: str, **_: Any) -> Plan:
        slices.find_slice(topology)
        fits = config.train.micro_rows not in (0, 8)
        return recorded(gib=12.0 if fits else 17.0, fits=fits, topology=topology)

    monkeypatch.setattr(command, "make_plan", fake)
    path = tmp_path / "small.yaml"
    config = tiny.config(tiny_root, tmp_path / "run")
    tree = to_plain(replace(config, teacher=replace(config.teacher, spec=tiny.TEACHER)))
    path.write_text(json.dumps(tree))
    yield path


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["plan", *map(str, words)])
    return code, *capsys.readouterr()


def test_exit_codes_of_the_command(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, small, "--topology", "v5e:4x4", "--train.micro-rows", "4")
    assert (code, "fits, with 24%" in out, err) == (0, True, "")
    large = ("--train.rows-per-step", "128")
    code, out, err = said(capsys, small, "--topology", "v5e:2x2", *large)
    assert code == 3 and "does not fit, over by 1.25 GiB" in out
    assert "does not fit v5e:2x2" in err and "trying --student.remat full" in err
    code, out, _ = said(capsys, small, "--topology", "v5e:4x4", "--json", *large)
    assert code == 3 and json.loads(out)["fits"] is False
    code, _, err = said(capsys, small, "--topology", "v5x:4x4")
    assert code == 64 and "did you mean v5e:4x4?" in err
    code, _, err = said(capsys, small)
    assert code == 64 and "--topology v5e:4x4" in err


def test_slices_are_listed_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "--list")
    assert code == 0
    for known in known_slices():
        assert f"\n{known.name} " in out


# --- Through the compiler.


SLICES = {
    "qwen1.5_14b_1.8b": "v5e:4x4",
    "qwen1.5_14b_4b": "v5e:4x4",
    "qwen1.5_7b_1.8b": "v5e:2x4",
    "llama2_13b_tinyllama_1.1b": "v5e:2x4",
    "starcoder_15.5b_3b": "v5e:4x4",
    "minima_llama2_7b_3b": "v5e:4x4",
}


def test_every_paper_config_has_a_slice() -> None:
    assert {path.stem for path in PAPER} == set(SLICES)
    for path in PAPER:
        assert f"for {SLICES[path.stem]}" in path.read_text(encoding="utf-8")


def head_gathers(plan: Plan, config: Config) -> int:
    """How often an array as large as a head is gathered on one chip in a step."""
    assert plan.speed is not None
    gathers = plan.speed.collectives.get("all-gather")
    if gathers is None:
        return 0
    assert config.teacher.spec is not None
    specs = (config.student.spec, config.teacher.spec)
    # A wider one is cut to the narrower before it is gathered.
    widths = {spec.vocab_size for spec in specs}
    heads = {width * spec.hidden_size for spec in specs for width in widths}
    return sum(count for shape, count in gathers.sizes.items() if shape.size in heads)


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_paper_configs_fit_their_slices(path: Path) -> None:
    config = load_config(path)
    plan = make_plan(config, SLICES[path.stem])
    assert [step.name for step in plan.steps] == ["train", "evaluation", "teacher evaluation"]
    assert plan.fits and plan.spare >= 0.1, plan_text(path.stem, plan)
    assert plan.speed is not None
    # The student's forward pass twice; nothing else.
    assert 1.0 < plan.speed.flops_ratio < 1.3
    assert head_gathers(plan, config) <= 2  # once each in a step, however many micro-batches
    assert "estimate, not measured on a TPU" in plan_text(path.stem, plan)


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.timeout(600)
def test_four_chips_train_a_paper_s_pair_in_small_steps() -> None:
    config = with_settings(
        load_config(ROOT / "configs" / "paper" / "qwen1.5_14b_1.8b.yaml"),
        train={"rows_per_step": 4, "micro_rows": 4},
        evaluation={"batch_rows": 4},
        objective={"logits_mib": 300.0},
        teacher={"dtype": "int8"},
    )
    plan = make_plan(config, "v5e:2x2", train_only=True)
    assert plan.fits and plan.spare >= 0.15, plan_text("2x2", plan)


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.timeout(600)
def test_one_chip_takes_eight_rows_in_four_gib() -> None:
    plan = make_plan(load_config(ROOT / "configs" / "smollm2_360m_135m_v5e1.yaml"), "v5e:1x1")
    assert plan.fits and plan.peak_bytes <= 4 * GIB
    assert plan.rows["per_step"] == plan.rows["per_chip"] == 8


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_a_search_with_the_compiler(tiny_root: Path, tmp_path: Path) -> None:
    config = without_files(tiny.config(tiny_root, tmp_path), tmp_path)
    options = [Candidate(1, 4, 1, 1, "full"), Candidate(2, 1, 2, 2, "attention")]
    planner = partial(make_plan, level="O0", train_only=True)
    lines: list[str] = []
    found = search(config, "v5e:2x2", CHIPS["v5e"], options, planner, lines.append)
    assert len(lines) == 2 and found.best is not None
    assert found.best.seconds == min(tried.seconds for tried in found.tried) < math.inf
    for tried in found.tried:
        assert tried.plan is not None and tried.plan.fits and tried.plan.speed is not None
        assert tried.plan.mesh == dict(zip(MESH_AXES, tried.candidate.mesh, strict=True))
        assert tried.plan.rows["per_chip"] == tried.candidate.rows_per_chip
        assert NOT_MEASURED in plan_text("tiny", tried.plan)
