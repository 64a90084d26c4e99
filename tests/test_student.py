"""Students of which adapters alone learn, in whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from ddk_jax.errors import UserError
from ddk_jax.models import hf
from ddk_jax.plain import to_plain
from ddk_jax.training.build import Job
from ddk_jax.training.checkpoint import read_latest
from ddk_jax.training.export import export_run
from ddk_jax.training.loop import train


def lora_config(root: Path, run_dir: Path, **changes: Any) -> Any:
    student = {"path": str(root / "teacher"), "lora": {"rank": 2, "targets": ["q", "v", "down"]}}
    return tiny.config(root, run_dir, **{"student": student} | changes)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch, tiny.quick_programs(monkeypatch):
        tiny.use_devices(monkeypatch, 1)
        yield


@pytest.fixture(scope="module")
def adapted(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of adapters; its student starts as the teacher, and learns from the labels."""
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    train(lora_config(tiny_root, run_dir))
    return run_dir


@pytest.mark.slow
def test_adapters_learn_and_are_all_that_a_checkpoint_holds(tiny_root: Path, adapted: Path) -> None:
    job = Job(lora_config(tiny_root, adapted))
    restored = read_latest(adapted / "checkpoints", job.abstract_state())
    assert restored is not None and restored.step == tiny.STEPS
    learned = restored.state.params["student"]
    E, H, D, F = 24, 2, 12, 32
    shapes = jax.tree.map(lambda leaf: leaf.shape, learned["layers"]["0"])
    assert shapes == {
        "attn": {
            "q": {"a": (2, E, 2), "b": (2, 2, H, D)},
            "v": {"a": (2, E, 2), "b": (2, 2, 1, D)},
        },
        "mlp": {"down": {"a": (2, F, 2), "b": (2, 2, E)}},
    }
    before, after = (
        job.measure(job.student, job.start.whole(x)).nats
        for x in (job.initial_state().params["student"], learned)
    )
    # The frozen head of random values leaves little to gain.
    assert (after < before).all() and after.mean() < before.mean() - 0.01


@pytest.mark.slow
def test_an_export_has_the_adapters_merged_and_the_rest_as_it_was(
    tiny_root: Path, adapted: Path, tmp_path: Path
) -> None:
    base, out = hf.load(tiny_root / "teacher"), hf.load(export_run(adapted, tmp_path / "student"))
    changed = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, one), other in zip(
            jax.tree_util.tree_flatten_with_path(base)[0], jax.tree.leaves(out), strict=True
        )
        if not np.array_equal(one, other)
    }
    assert changed == {"layers.0.attn.q", "layers.0.attn.v", "layers.0.mlp.down"}
    job = Job(lora_config(tiny_root, adapted))
    restored = read_latest(adapted / "checkpoints", job.abstract_state())
    assert restored is not None
    ours = job.measure(job.student, job.start.whole(restored.state.params["student"]))
    np.testing.assert_allclose(job.measure(job.student, out).nats, ours.nats, rtol=1e-5)


@pytest.mark.slow
def test_adapters_go_with_the_student_that_they_were_trained_on(
    tiny_root: Path, tmp_path: Path
) -> None:
    other = tiny.write_teacher(tmp_path / "student", tiny_root / "tokenizer", seed=3)
    student = {"path": str(other), "lora": {"rank": 2}}
    changes = {"student": student, "train.steps": 2, "checkpoint.every_steps": 1}
    train(tiny.config(tiny_root, tmp_path / "run", **changes))
    tiny.write_teacher(other, tiny_root / "tokenizer", seed=4)
    with pytest.raises(UserError, match=r"student\.path has changed"):
        train(tiny.config(tiny_root, tmp_path / "run", **changes | {"train.steps": 3}))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"spec": dict(tiny.STUDENT), "lora": {"rank": 2}}, r"set student\.path"),
        ({"path": "teacher", "lora": {"rank": 0}}, r"student\.lora: rank = 0"),
        ({"path": "teacher", "lora": {"rank": 1, "targets": ["qkv"]}}, "needs names out of q, k"),
        ({"path": "teacher", "lora": {"rank": 1}, "frozen": True}, "choose one of them"),
    ],
)
def test_impossible_adapters_are_refused(
    tiny_root: Path, tmp_path: Path, student: dict[str, Any], message: str
) -> None:
    if "path" in student:
        student = student | {"path": str(tiny_root / "teacher")}
    with pytest.raises(UserError, match=message):
        Job(tiny.config(tiny_root, tmp_path, student=student)).check()


def test_the_yaml_of_adapters_is_read_back(tiny_root: Path, tmp_path: Path) -> None:
    config = lora_config(tiny_root, tmp_path)
    assert to_plain(config)["student"]["lora"] == {
        "rank": 2,
        "alpha": 0.0,
        "targets": ["q", "v", "down"],
    }
