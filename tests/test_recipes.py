"""The recipes of `configs/` that take several runs: each run a few steps long, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from ddk_jax.config import Config, load_config
from ddk_jax.data.prepare import prepare
from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder
from ddk_jax.places import resolve_path
from ddk_jax.quickstart import quickstart_config
from ddk_jax.training.export import export_run
from ddk_jax.training.loop import train
from ddk_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
STEPS = 3
RECIPES = {
    "bild": ("teacher_sft", "student_sft", "kl", "bild"),
    "ted": ("teacher_filters", "student_filters", "ted"),
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tiny.use_devices(monkeypatch, 1)
    with tiny.quick_programs(monkeypatch):
        yield


def shortened(config: Config) -> Config:
    return replace(
        config,
        run=replace(config.run, log_every_steps=1),
        data=replace(config.data, seq_len=64),
        train=replace(config.train, steps=STEPS, rows_per_step=4),
        optim=replace(config.optim, warmup_steps=1),
        mixture=replace(config.mixture, interval_steps=STEPS),
        evaluation=replace(config.evaluation, rows_per_domain=2, batch_rows=2),
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").symlink_to(ROOT / "tasks")
    # What `ddk quickstart` leaves: its data, and a student.
    quickstart = quickstart_config(Path("runs/quickstart"))
    spec = replace(quickstart.student.spec, vocab_size=4096)
    tokenizer = resolve_path("assets:tokenizer")
    student = Decoder(spec=spec).init(jax.random.key(0))
    hf.export(student, spec, Path("runs/quickstart/student"), tokenizer_dir=tokenizer, card="x\n")

    prepared = False
    for name in RECIPES[recipe]:
        config = shortened(load_config(ROOT / "configs" / recipe / f"{name}.yaml"))
        if not prepared:
            data = config.data if config.data.domains else quickstart.data
            prepare(data, progress=lambda _: None)
            prepared = True
        summary = train(config)
        assert summary.steps == STEPS
        export_run(Path(config.run.dir), Path(config.run.dir) / "export")
        lines = [x for x in read_metrics(Path(config.run.dir) / "metrics.jsonl")]
        steps = [line for line in lines if line["event"] == "step"]
        expected = {term.name or term.loss for term in config.objective.terms}
        for line in steps:
            assert set(line["terms"]) == expected
            assert np.isfinite(list(line["terms"].values())).all() and not line["skipped"]


def test_every_recipe_is_tried() -> None:
    folders = {path.parent.name for path in (ROOT / "configs").glob("*/*.yaml")}
    assert folders - {"study", "paper"} == set(RECIPES)
    for recipe, names in RECIPES.items():
        assert {path.stem for path in (ROOT / "configs" / recipe).glob("*.yaml")} == set(names)
