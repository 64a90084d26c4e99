"""The benchmarks run, and compare the same thing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = {"tokens": 24, "student": 5, "teacher": 7, "vocab": 150, "chunk": 10}


@pytest.fixture(scope="module")
def losses() -> Any:
    """The script as a module."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("losses")
    sys.path.remove(str(FOLDER))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "losses.py", *words]
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
    command = [sys.executable, "pipeline.py", *sizes.split(), "--json", str(target)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text("utf-8"))
    assert found["best_fit"]["cut"] == 0.0 < found["sequential"]["cut"]
    assert all(one["tokens_per_second"] > 0 and one["padding"] < 0.1 for one in found.values())
