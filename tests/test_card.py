"""The model card: what it names, and what it tells the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml

from ddk_jax.analysis.runs import RunRecord
from ddk_jax.card import model_card, model_name
from ddk_jax.config import Config, OtherTeacherConfig
from ddk_jax.data.shards import Manifest, read_manifest

COMMIT = "0123456789abcdef" * 2 + "01234567"


def licensed(manifest: Manifest, *licences: str) -> Manifest:
    """The manifest with these licences, one for each domain."""
    return replace(
        manifest,
        domains=tuple(
            replace(domain, sources=tuple(replace(s, licence=licence) for s in domain.sources))
            for domain, licence in zip(manifest.domains, licences, strict=True)
        ),
    )


def record() -> RunRecord:
    """Of a run of two steps."""
    one, two = np.ones(2), np.ones((2, len(tiny.DOMAINS)))
    return RunRecord(
        path=Path("run"),
        name="run",
        domains=tiny.DOMAINS,
        config={},
        identity={},
        summary={},
        evaluation_steps=np.array([0, 2]),
        evaluation_tokens=np.array([0, 80]),
        student_nats=2 * two,
        teacher_nats=two[0],
        mixture_tokens=np.array([0, 40]),
        weights=two / len(tiny.DOMAINS),
        shares=two / len(tiny.DOMAINS),
        steps=np.array([1, 2]),
        tokens=np.array([40, 80]),
        loss=one,
        terms={},
        learning_rate=one,
        tokens_per_second=one,
        data_wait=one,
        domain_tokens=20 * two[0],
    )


@pytest.fixture
def parts(tiny_root: Path) -> dict[str, Any]:
    return {
        "config": Config(),
        "step": 2,
        "spec": tiny.TEACHER,
        "manifest": read_manifest(tiny_root / "data"),
        "record": record(),
        "has_figure": False,
    }


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def with_models(config: Config, *, teacher: str, student: str, other: str = "") -> Config:
    others = (OtherTeacherConfig(path=other),) if other else ()
    return replace(
        config,
        teacher=replace(config.teacher, path=teacher, others=others),
        student=replace(config.student, path=student),
    )


def test_models_of_the_hub_are_named_with_their_commits(parts: dict[str, Any]) -> None:
    models = {"owner/teacher": COMMIT, "owner/student": COMMIT[::-1]}
    parts["record"] = replace(parts["record"], identity={"models": models})
    parts["config"] = with_models(
        parts["config"], teacher="owner/teacher", student="owner/student", other="/x/local"
    )
    card = model_card(**parts)
    assert "# Student of owner/teacher and local\n" in card
    assert f"distilled from owner/teacher (commit {COMMIT}) and local with ddk_jax" in card
    assert f"It started from owner/student (commit {COMMIT[::-1]})" in card
    assert front(card)["base_model"] == "owner/student"
    assert front(card)["base_model_relation"] == "finetune"


def test_a_base_that_is_not_on_the_hub_is_not_claimed_to_be(parts: dict[str, Any]) -> None:
    parts["config"] = with_models(parts["config"], teacher="/x/teacher", student="owner/student")
    card = model_card(**parts)  # a directory, since the run recorded no commit
    assert "base_model" not in front(card) and "It started from student " in card
    assert "/x/" not in card


@pytest.mark.parametrize(
    ("licences", "said"),
    [
        (("MIT", "MIT", "MIT"), {"license": "mit"}),
        (("CC BY-SA 4.0",) * 3, {"license": "cc-by-sa-4.0"}),
        (("public domain",) * 3, {"license": "other", "license_name": "public domain"}),
        (("MIT", "MIT", ""), {}),
        (("MIT", "MIT", "Apache-2.0"), {}),
        (("", "", ""), {}),
    ],
)
def test_the_licence_is_that_of_all_sources(
    parts: dict[str, Any], licences: tuple[str, ...], said: dict[str, str]
) -> None:
    parts["manifest"] = licensed(parts["manifest"], *licences)
    found = front(model_card(**parts))
    assert {key: value for key, value in found.items() if key.startswith("license")} == said


def test_names_of_models() -> None:
    assert model_name("runs/one/export") == "export"
    assert model_name("assets:teacher") == "the teacher that ddk_jax ships"
    snapshot = f"/home/me/hub/models--owner--name/snapshots/{COMMIT}"
    assert model_name(snapshot) == f"owner/name (commit {COMMIT})"
    assert model_name("owner/name", COMMIT) == f"owner/name (commit {COMMIT})"
