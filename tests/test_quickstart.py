"""The quickstart as a user runs it: what it writes, and whether the gap to the teacher closes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddk_jax.analysis.runs import load_run
from ddk_jax.quickstart import quickstart_config


def test_everything_goes_under_the_given_directory(tmp_path: Path) -> None:
    config = quickstart_config(tmp_path, steps=5, seed=3)
    assert {Path(config.run.dir).parent, Path(config.data.dir).parent} == {tmp_path}
    assert (config.train.steps, config.optim.warmup_steps, config.run.seed) == (5, 5, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_student_closes_in_on_its_teacher(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddk_jax", "quickstart", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr
    for path in ("report/report.html", "student/model.safetensors", "run/summary.json"):
        assert (tmp_path / path).is_file()
    run = load_run(tmp_path / "run")
    assert all(name in done.stdout for name in run.domains)
    assert "teacher: " in done.stdout and "student: " in done.stdout

    gap = run.mean_gap
    assert gap is not None
    assert np.mean(np.diff(gap) < 0) >= 0.8
    assert gap[-1] <= 0.6 * gap[0]
    # The mixture was really steered: what was furthest behind at first is not at the end.
    fallen = run.weights.max(axis=0) - run.weights[-1]
    assert np.sum(fallen >= 0.05) >= 3
