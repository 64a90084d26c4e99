"""A real pretrained teacher and a student that is cut from it: `configs/smollm2.yaml` in small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from ddk_jax.config import Config, DomainConfig, SourceConfig, load_config
from ddk_jax.models.decoder import num_parameters
from ddk_jax.models.prune import Size
from ddk_jax.training.corpus import prepare_corpus
from ddk_jax.training.loop import train
from ddk_jax.training.pruning import Pruned, prune_model

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[1] / "configs/smollm2.yaml"
SIZE = Size(layers=23, hidden=432, neurons=640, groups=2)
"""What the config's comment has `ddk prune` leave."""


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tiny.use_devices(monkeypatch, 1)
    yield


@pytest.fixture(scope="module")
def pair(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config over two shipped domains: 20 steps of 2 rows of 128 tokens."""
    root = tmp_path_factory.mktemp("pair")
    config = load_config(CONFIG)
    domains = tuple(
        DomainConfig(
            name=name,
            sources=(SourceConfig(path=f"assets:corpus/{name}.jsonl.xz"),),
            max_documents=60,
        )
        for name in ("code_python", "encyclopedia")
    )
    config = replace(
        config,
        run=replace(config.run, dir=str(root / "run")),
        data=replace(config.data, dir=str(root / "data"), seq_len=128, domains=domains),
        teacher=replace(config.teacher, path=str(smollm2)),
        student=replace(config.student, path=str(root / "student")),
        mixture=replace(config.mixture, interval_steps=10),
        optim=replace(config.optim, warmup_steps=2),
        train=replace(config.train, steps=20, rows_per_step=2),
        evaluation=replace(config.evaluation, rows_per_domain=4),
    )
    prepare_corpus(config, progress=lambda _: None)
    return config


def cut(config: Config, out: str, method: str) -> Pruned:
    return prune_model(
        config.teacher.path, out, data=config.data.dir, size=SIZE, method=method,
        rows=8, seq_len=128,
    )  # fmt: skip


def test_a_student_cut_from_the_teacher_learns_from_it(pair: Config) -> None:
    student = cut(pair, pair.student.path, "activation")
    assert 0.9 * 50e6 < num_parameters(student.spec) < 1.1 * 50e6
    # Random values say as much about the next token as a uniform guess, or less.
    assert np.mean(student.nats) < 0.75 * math.log(student.spec.vocab_size)
    summary = train(pair)
    assert summary.steps == 20 and 5000 < summary.tokens <= 20 * 2 * 128
    assert summary.teacher_nats is not None
    before, after, teacher = (
        np.array(nats, np.float64)
        for nats in (summary.student_nats_before, summary.student_nats_after, summary.teacher_nats)
    )
    # 5,000 tokens close more than a tenth of the gap, in both domains.
    assert np.all(after - teacher < 0.9 * (before - teacher)) and np.all(after > teacher)


def test_what_matters_on_data_is_not_what_comes_first(pair: Config, tmp_path: Path) -> None:
    """Taken by number, the parts are worse than no model at all."""
    student = cut(pair, str(tmp_path), "first")
    assert np.mean(student.nats) > math.log(student.spec.vocab_size)
