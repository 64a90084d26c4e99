"""The doctor: it finds what would stop a run, says what to do, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny

from ddk_jax import doctor
from ddk_jax.config import Config, RunConfig
from ddk_jax.doctor import Check, examine
from ddk_jax.inspection import size_text

MACHINE = ("versions", "devices", "memory", "run directory", "hub token", "disk")


def look(root: Path, run_dir: Path, **changes: Any) -> dict[str, Check]:
    return {check.name: check for check in examine(tiny.config(root, run_dir, **changes))}


def bad(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.ok}


def files(root: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(root.rglob("*")):
        yield str(path), path.stat().st_mtime_ns


def test_a_sound_config_on_this_machine(tiny_root, tmp_path):
    before = [*files(tiny_root)]
    checks = look(tiny_root, tmp_path / "runs" / "new")
    assert bad(checks) == set()
    assert all(check.value and not check.advice for check in checks.values())
    assert set(MACHINE) < checks.keys()
    assert "data = teacher" in checks["tokenizers"].value
    assert "0.2 forward_kl; controller ddk on loss_difference" in checks["settings"].value
    # Neither the run directory nor anything else was made.
    assert [*files(tiny_root)] == before and [*tmp_path.iterdir()] == []


def test_without_a_config_only_the_machine_is_looked_at(tmp_path):
    assert [check.name for check in examine(Config())] == list(MACHINE)
    elsewhere = Config(run=RunConfig(dir=str(tmp_path)))
    assert [check.name for check in examine(elsewhere)] == list(MACHINE)


def test_versions_are_held_against_what_the_package_asks_for(tiny_root, tmp_path, monkeypatch):
    asked = [
        "jax>=999",
        "numpy",
        "no-such-package",
        'other-missing ; extra == "tpu"',
        'third-missing ; python_version < "3"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    checks = look(tiny_root, tmp_path)
    assert bad(checks) == {"versions"}
    advice = checks["versions"].advice
    assert f"jax>=999, but {jax.__version__} is installed" in advice
    assert "no-such-package is missing" in advice
    assert "numpy" not in advice and "other" not in advice and "third" not in advice


def test_a_source_tree_without_metadata_is_fine(monkeypatch):
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert doctor._versions().ok


def test_an_overlooked_accelerator(monkeypatch):
    monkeypatch.setattr(doctor, "_ACCELERATORS", ("null",))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert doctor._devices().ok  # on purpose
    monkeypatch.delenv("JAX_PLATFORMS")
    check = doctor._devices()
    assert not check.ok and "/dev/null is there" in check.advice


def test_devices_that_cannot_be_had(monkeypatch):
    def busy() -> list[jax.Device]:
        raise RuntimeError("Unable to initialize backend 'tpu':\n the TPU is already in use")

    monkeypatch.setattr(jax, "devices", busy)
    check = doctor._devices()
    assert not check.ok and "already in use" in check.value and "\n" not in check.value
    assert "lsof" in check.advice


def test_little_memory(tiny_root, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_host_memory", lambda: 1000.0)
    assert bad(look(tiny_root, tmp_path)) == {"memory", "memory estimate"}


@pytest.mark.parametrize("place", ["environment", "file", "nowhere"])
def test_the_hub_token_is_never_shown(place, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    if place == "environment":
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    if place == "file":
        (tmp_path / "token").write_text("hf_secret")
    check = doctor._hub_token()
    assert check.ok and "secret" not in str(check)
    assert check.value.startswith("absent" if place == "nowhere" else "present")


def test_a_run_directory_that_cannot_be_written(tiny_root, tmp_path):
    (tmp_path / "file").write_text("")
    checks = look(tiny_root, tmp_path / "file" / "run")
    assert bad(checks) == {"run directory"}
    assert "choose another run.dir" in checks["run directory"].advice


def test_data_that_is_not_prepared(tiny_root, tmp_path):
    checks = look(tiny_root, tmp_path, **{"data.dir": str(tmp_path / "nowhere")})
    assert bad(checks) == {"data", "tokenizers", "models", "memory estimate"}
    assert "run ddk prepare" in checks["data"].value


def test_data_of_other_domains(tiny_root, tmp_path):
    domains = [{"name": "words", "sources": [{"path": str(tiny_root / "words.jsonl")}]}]
    checks = look(tiny_root, tmp_path, **{"data.domains": domains})
    assert "data" in bad(checks) and "ddk prepare" in checks["data"].value


def test_a_teacher_with_another_tokenizer(tiny_root, tmp_path):
    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer", swapped=True)
    teacher = tiny.write_teacher(tmp_path / "teacher", tokenizer)
    checks = look(tiny_root, tmp_path / "run", **{"teacher.path": str(teacher)})
    assert "tokenizers" in bad(checks)
    assert "teacher and data differ: token" in checks["tokenizers"].value
    assert "data.tokenizer" in checks["tokenizers"].advice


def test_a_teacher_without_a_tokenizer_is_said_but_allowed(tiny_root, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_root / "teacher", teacher)
    (teacher / "tokenizer.json").unlink()
    checks = look(tiny_root, tmp_path / "run", **{"teacher.path": str(teacher)})
    assert bad(checks) == set()
    assert "the teacher has no tokenizer.json" in checks["tokenizers"].value


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"mixture.gap": "ratio"}, "settings", "did you mean"),
        ({"mesh.fsdp": 3, "mesh.data": 1}, "settings", "does not fit 8 devices"),
        (
            {"objective.terms": [{"loss": "cross_entropy", "temperature": 2.0}]},
            *("settings", "no temperature"),
        ),
        ({"evaluation.batch_rows": 3}, "models", "multiple of the 8 devices"),
        ({"student.spec.hidden_size": 0}, "models", "hidden_size is missing"),
        ({"teacher.path": "/nowhere/at/all"}, "models", "no such directory"),
    ],
)
def test_settings_that_cannot_be_run(tiny_root, tmp_path, changes, name, words):
    checks = look(tiny_root, tmp_path, **changes)
    assert not checks[name].ok and words in checks[name].value, checks
    assert "\n" not in checks[name].value


def test_the_memory_estimate_by_hand(tiny_root, tmp_path, monkeypatch):
    """On one device: 16 bytes a parameter, the float32 teacher, three chunks of 64 x 257 logits."""
    tiny.use_devices(monkeypatch, 1)
    checks = look(tiny_root, tmp_path)
    # embeddings + 2 layers of (attention + MLP + norms) + the last norm
    student = 257 * 16 + 2 * (16 * 8 * 6 + 3 * 16 * 24 + 2 * 16) + 16
    teacher = 257 * 24 + 2 * (24 * 12 * 6 + 3 * 24 * 32 + 2 * 24) + 24
    total = 16 * student + 4 * teacher + 3 * 4 * 64 * 257
    assert f"student of {student:,} parameters, teacher of {teacher:,}" in checks["models"].value
    assert checks["memory estimate"].value.startswith(f"{size_text(total)} of ")


def test_a_model_that_does_not_fit(tiny_root, tmp_path):
    big = {f"student.spec.{name}": 2**15 for name in ("hidden_size", "ffn_size")}
    big |= {"student.spec.num_layers": 200, "student.spec.num_heads": 256}
    checks = look(tiny_root, tmp_path, **big)
    assert bad(checks) == {"memory estimate", "disk"}
    assert "mesh.fsdp" in checks["memory estimate"].advice
    assert "TiB: free some space" in checks["disk"].advice


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**29, "1.5 GiB"), (2**70, "1048576.0")],
)
def test_sizes(size, text):
    assert size_text(size).startswith(text)


def test_memory_of_the_host():
    assert 0 < doctor._host_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
