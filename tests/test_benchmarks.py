"""The benchmarks run, and compare the same thing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from ddk_jax.errors import UserError

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = {"tokens": 24, "student": 5, "teacher": 7, "vocab": 150, "chunk": 10}


@pytest.fixture(scope="module")
def scripts() -> Any:
    """From the name of a script to its module."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def losses(scripts: Any) -> Any:
    return scripts("losses")


@pytest.fixture(scope="module")
def step(scripts: Any) -> Any:
    return scripts("step")


@pytest.fixture(scope="module")
def gpu(scripts: Any) -> Any:
    return scripts("gpu")


def run(*words: str, script: str = "losses.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, script, *words]
    return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_tiny_comparison(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    sizes = "--tokens 24 --hidden 5 --teacher-hidden 7 --vocab 150 --chunk 10 --repeats 2"
    done = run("--losses", "bild", *sizes.split(), "--markdown", "--json", str(target))
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| bild |"))
    head = next(line for line in done.stdout.splitlines() if line.startswith("| loss |"))
    assert row.count("|") == head.count("|")
    assert " ms" not in head  # ratios only, in what goes into a page

    found = json.loads(target.read_text("utf-8"))
    assert found["options"]["tokens"] == 24
    measured = found["losses"]["bild"]
    ways = {"chunked", "dense"} | ({"torch"} if "torch" in found["setting"] else set())
    assert set(measured["seconds"]) == ways
    assert all(len(times) == 2 and min(times) > 0 for times in measured["seconds"].values())
    if sys.platform == "linux":
        assert set(measured["peak_bytes"]) == ways
    assert measured["compiled_bytes"]["chunked"] < measured["compiled_bytes"]["dense"]


def test_a_name_that_is_no_loss_is_refused() -> None:
    done = run("--losses", "forward_kl,top_k_overlap")
    assert done.returncode == 1
    assert "'top_k_overlap' is none of: cross_entropy" in done.stderr


@pytest.mark.slow
@pytest.mark.torch
def test_torch_computes_the_same_losses(losses: ModuleType) -> None:
    pytest.importorskip("torch")
    problem = losses.make_problem(losses.Sizes(**TINY))
    compared = [case for case in losses.cases("") if "torch" in losses.ways_of(case)]
    assert len(compared) == 15
    for case in compared:
        prepared = {way: losses.prepare(way, case, problem, 10) for way in ("dense", "torch")}
        losses.check(case, {way: p.answer(p.run()) for way, p in prepared.items()})


def test_nothing_is_timed_that_does_not_agree(losses: ModuleType) -> None:
    (case,) = losses.cases("forward_kl")
    good = losses.Answer(2.0, np.ones((1, 3, 2), np.float32), np.ones((2, 5), np.float32))
    losses.check(case, {"chunked": good, "torch": good._replace(value=2.0001)})
    for wrong in (
        good._replace(value=2.001),
        good._replace(value=float("nan")),
        good._replace(kernel=1.02 * good.kernel),
        good._replace(hidden=np.nan * good.hidden),
    ):
        with pytest.raises(ValueError, match=r"forward_kl: .* torch"):
            losses.check(case, {"chunked": good, "torch": wrong})


def test_ratios_are_taken_pair_by_pair(losses: ModuleType) -> None:
    (case,) = losses.cases("forward_kl")
    seconds = {"chunked": [1.0, 10.0, 4.0], "torch": [2.0, 10.0, 2.0]}
    middle, low, high = losses.Measured(case=case, seconds=seconds).ratio("torch")
    assert (low, middle, high) == (0.75, 1.0, 1.5)


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("slice_name", ["v5e:1x1", "v5e:2x4"])
def test_a_loss_is_compiled_for_absent_chips(losses: ModuleType, slice_name: str) -> None:
    (case,) = losses.cases("forward_kl")
    sizes = losses.Sizes(tokens=2048, student=128, teacher=256, vocab=8192, chunk=256)
    found = losses.compile_loss(case, slice_name, sizes)
    for kept in ("float32", "bfloat16"):
        assert found.flops[kept] == pytest.approx(1, abs=0.01)
    assert found.temporary_bytes["bfloat16"] < found.temporary_bytes["float32"]
    title, *cells = losses.tpu_table([found])[1]
    assert title == "forward_kl" and len(cells) == 4 and all(cells)


def test_the_pipeline_is_measured(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    sizes = "--tokens 400000 --seq-len 128 --rows 8 --batches 3"
    done = run(*sizes.split(), "--json", str(target), script="pipeline.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text("utf-8"))
    assert found["best_fit"]["cut"] == 0.0 < found["sequential"]["cut"]
    assert all(one["tokens_per_second"] > 0 and one["padding"] < 0.1 for one in found.values())


@pytest.mark.slow
@pytest.mark.torch
def test_generation_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    target = tmp_path / "found.json"
    sizes = "--batches 2 --prompt 8 --new 4 --repeats 2 --markdown"
    done = run(*sizes.split(), "--json", str(target), script="generate.py")
    assert done.returncode == 0, done.stderr  # both chose the same tokens
    assert "| 15 M, random | 2 of 8 |" in done.stdout
    (row,) = json.loads(target.read_text("utf-8"))["rows"]
    for way in ("ours", "transformers"):
        assert len(row["read"][way]) == len(row["whole"][way]) == 2
        assert min(row["read"][way]) > 0


# The whole step: contenders that take turns

SERVING = """
import contest
channel = contest.private_stdout()
print("a library prints")
steps = iter([2.5, 2.25])
contest.serve(lambda: next(steps), channel)
"""
TINY_TASK = {"rows": 2, "seq_len": 16, "vocab": 64, "hidden": 64, "layers": 1}


def contender(scripts: Any, log: Path, program: str) -> Any:
    """A process that runs a few lines with `contest` at hand."""
    command = [sys.executable, "-c", program]
    return scripts("contest").Contender("it", command, log, {"PYTHONPATH": str(FOLDER)})


def test_a_contender_takes_steps_and_its_prints_do_no_harm(scripts: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with contender(scripts, log, SERVING) as one:
        one.wait()
        first = one.step()
        one.forget_peak()
        second = one.step()
    assert (first.loss, second.loss) == (2.5, 2.25)
    assert first.seconds >= 0
    if sys.platform == "linux":
        assert 2**20 < second.peak_bytes < 2**30
    assert log.read_text("utf-8") == "a library prints\n"


@pytest.mark.parametrize("program", ["raise SystemExit('it is broken')", SERVING])
def test_a_contender_that_ends_says_why(scripts: Any, tmp_path: Path, program: str) -> None:
    with contender(scripts, tmp_path / "log", program) as one:
        with pytest.raises(ValueError, match=r"it has ended:\n(.*\n)*(it is broken|StopIteration)"):
            one.wait()
            for _ in range(3):
                one.step()


def test_the_table_of_steps(step: ModuleType) -> None:
    found = step.Measured(
        seconds={"ours": [1.0, 1.0, 3.0], "torch": [2.0, 4.0, 4.0], "tunix": [4.0, 4.0, 4.0]},
        peak_bytes={"ours": [2**30] * 2, "torch": [2**31] * 2, "tunix": [3 * 2**30] * 2},
    )
    assert step.rendered(step.cpu_table(found), markdown=True).splitlines() == [
        "|  | seconds | time, ratio | peak MiB | memory, ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| ours | 1.00 (1.00-2.00) |  | 1024 |  |",
        "| torch | 4.00 (3.00-4.00) | 0.50 (0.38-0.62) | 2048 | 0.50 |",
        f"| Tunix {step.TUNIX} | 4.00 (4.00-4.00) | 0.25 (0.25-0.50) | 3072 | 0.33 |",
    ]


def test_where_no_peak_is_told_the_table_is_empty(step: ModuleType) -> None:
    found = step.Measured(
        seconds={"ours": [1.0], "torch": [2.0]}, peak_bytes={"ours": [0], "torch": [0]}
    )
    assert [row[3:] for row in step.cpu_table(found)[1:]] == [["", ""], ["", ""]]


def test_contenders_with_another_loss_are_not_timed(step: ModuleType) -> None:
    step.check({"ours": [5.0, 4.0], "torch": [5.004, 4.0]})
    for wrong in ([5.006, 4.0], [5.0, float("nan")]):
        with pytest.raises(ValueError, match=r"losses of the first steps: ours .* torch"):
            step.check({"ours": [5.0, 4.0], "torch": wrong})


def test_an_unknown_contender_is_refused(step: ModuleType) -> None:
    assert step.chosen("torch,tunix") == ["torch", "tunix"] and step.chosen("") == []
    with pytest.raises(ValueError, match="'tenix' is none of: torch, tunix"):
        step.main(["cpu", "--against", "torch,tenix"])


def test_the_environment_for_tunix_is_made_once(
    step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    def recorded(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        called.append(command)
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(step.subprocess, "run", recorded)
    python = step.tunix_python(tmp_path)
    step.tunix_python(tmp_path, "libtpu==1")
    made, first, second = called
    assert made[:3] == [sys.executable, "-m", "venv"]
    assert first[:4] == [python, "-m", "pip", "install"]
    assert f"google-tunix=={step.TUNIX}" in first
    assert second == [*first, "libtpu==1"]


def test_without_an_environment_tunix_is_left_out(
    step: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")

    monkeypatch.setattr(step.subprocess, "run", failing)
    options = step.Cpu(against="tunix", cache=tmp_path)
    assert list(step.commands_of(options, tmp_path)) == ["ours"]
    told = capsys.readouterr().out
    assert "ERROR: no network" in told and "Tunix is left out" in told


def test_two_programs_of_one_step(step: ModuleType) -> None:
    gib = step.GIB
    part = {"flops": 16e12, "hbm_bytes": 100e9, "seconds": 0.2}
    found = step.together(
        {
            "teacher": part | {"peak_bytes": 4 * gib},
            "train": part | {"peak_bytes": 6 * gib},
            "resident_bytes": {"teacher": 3 * gib, "train": gib // 2},
        }
    )
    assert step.tpu_table({"it": found})[1] == ["it", "7.00", "32.0", "200", "400"]


@pytest.mark.slow
@pytest.mark.torch
def test_torch_takes_the_same_steps(scripts: Any, step: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    step.write_task(tmp_path, step.Cpu(**TINY_TASK))
    ours = scripts("our_step").from_folder(tmp_path, {"objective": {"logits_mib": 0.002}})
    theirs = scripts("torch_step").make_step(tmp_path)
    losses = np.array([[ours(), theirs()] for _ in range(4)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-5)
    assert losses[-1, 0] < losses[0, 0] - 1e-3  # it does learn


@pytest.mark.slow
@pytest.mark.torch
def test_tiny_steps_in_turn(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    target = tmp_path / "found.json"
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in TINY_TASK.items()]
    often = ["--against=torch", "--runs=1", "--repeats=2", "--markdown", f"--json={target}"]
    done = run("cpu", *sizes, *often, script="step.py")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("| torch |")]
    found = json.loads(target.read_text("utf-8"))
    assert set(found["seconds"]) == set(found["peak_bytes"]) == {"ours", "torch"}
    assert all(len(each) == 2 and min(each) > 0 for each in found["seconds"].values())


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_our_step_is_compiled_for_an_absent_chip(step: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    shape = "vocab_size: 512, num_layers: 2, num_heads: 2, num_kv_heads: 1, ffn_size: 256"
    config.write_text(
        "data: {seq_len: 256}\n"
        f"teacher: {{path: nowhere, spec: {{{shape}, hidden_size: 256}}}}\n"
        f"student: {{spec: {{{shape}, hidden_size: 128}}}}\n"
        "train: {rows_per_step: 4}\n"
    )
    found = step.our_figures(step.Tpu(config=config))
    assert 2**20 < found.peak_bytes < 2**28
    needed = 1024 * (2 * 770_000 + 6 * 390_000)
    assert needed < found.flops < 2 * needed
    assert found.hbm_bytes > 0 and found.seconds > 0


# One GPU


def test_without_a_gpu_one_line_says_so(gpu: ModuleType) -> None:
    with pytest.raises(UserError, match=r"jax finds no GPU: .*--tiny") as refused:
        gpu.measure(gpu.Options())
    assert refused.value.exit_code == 64 and "\n" not in str(refused.value)


def test_too_little_memory_has_an_advice(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(gpu, "stepping", exhausted)
    monkeypatch.setattr(gpu, "random_teacher", lambda job: None)
    with pytest.raises(UserError, match=r"too little memory for it: try --remat full"):
        gpu.measure(gpu.Options(tiny=True))


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362), ("cpu", 0)],
)
def test_the_peak_of_a_device(gpu: ModuleType, kind: str, tflops: float) -> None:
    assert gpu.peak_flops(gpu.Options(), kind) == 1e12 * tflops
    assert gpu.peak_flops(gpu.Options(peak_tflops=100), kind) == 1e14


def test_our_mfu_is_that_of_the_figure_to_compare_with(gpu: ModuleType) -> None:
    teacher, student = gpu.PAIRS["1b-1b"]
    flops = gpu.minimum_flops(student, [teacher], rows=32, length=1024)
    of_reference = flops / (32 * 1024) * 26_800 / gpu.peak_flops(gpu.Options(), "H100")
    assert of_reference == pytest.approx(0.28, abs=0.005)


def test_the_figures_of_a_gpu_in_words(gpu: ModuleType) -> None:
    found = {
        "device": "NVIDIA H100 80GB HBM3",
        "versions": {"jax": "0.10.2"},
        "pair": "1b-1b",
        "rows": 32,
        "seq_len": 1024,
        "tokens_per_second": 43_210.4,
        "mfu": 0.4512,
        "peak_bytes": 60 * 2**30,
        "step_seconds": [0.75, 0.76, 0.77],
        "losses": [6.0, 5.0],
    }
    assert gpu.described(found).splitlines() == [
        "NVIDIA H100 80GB HBM3; jax 0.10.2",
        "1b-1b, 32 x 1024 tokens: 43,210 tokens/s, step 0.760 s (0.755-0.765), MFU 45.1%",
        "peak memory 60.00 GiB",
        "loss 6.000 -> 5.000",
    ]
    unknown = gpu.described(found | {"mfu": None, "peak_bytes": None})
    assert "MFU not known (--peak-tflops)" in unknown and "not told by this device" in unknown


@pytest.mark.slow
def test_a_tiny_pair_goes_the_way_of_a_gpu(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    done = run("--tiny", "--repeats=2", f"--json={target}", script="gpu.py")
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert line + "\n" == target.read_text("utf-8")
    found = json.loads(line)
    assert len(found["step_seconds"]) == 2 and found["tokens_per_second"] > 0
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.slow
def test_the_script_for_gpus_ends_with_a_code_without_one() -> None:
    done = run(script="gpu.py")
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("jax finds no GPU: ") and done.stderr.count("\n") == 1
