"""A student cut from a teacher: the directory that it is written to, and what it is worth."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import tiny

from ddk_jax.data.prepare import prepare as prepare_data
from ddk_jax.errors import UserError
from ddk_jax.models import hf
from ddk_jax.models.prune import Size
from ddk_jax.quickstart import quickstart_config
from ddk_jax.training.pruning import prune_model
from ddk_jax.training.trained import measure_model


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tiny.use_devices(monkeypatch, 1)
    with tiny.quick_programs(monkeypatch):
        yield


def test_a_student_is_written_as_a_model_directory(tiny_root, tmp_path):
    teacher = tiny_root / "teacher"
    size = Size(layers=1, hidden=18, neurons=20)
    result = prune_model(str(teacher), tmp_path / "s", data=str(tiny_root / "data"), size=size)
    spec = hf.read_spec(tmp_path / "s")
    assert spec == result.spec
    assert (spec.num_layers, spec.hidden_size, spec.ffn_size) == (1, 18, 20)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_width) == (2, 1, 12)
    cut, whole = hf.load(tmp_path / "s"), hf.load(teacher)
    np.testing.assert_array_equal(
        cut["embed"]["table"], np.asarray(whole["embed"]["table"])[:, result.kept.hidden]
    )
    assert result.tokens > 0 and np.all(np.isfinite(result.nats))
    found = measure_model(str(tmp_path / "s"), data=str(tiny_root / "data"), rows=16)
    np.testing.assert_allclose(found.nats, result.nats, rtol=1e-5)
    card = (tmp_path / "s" / "README.md").read_text()
    assert "cut from teacher" in card and "| hidden width | 24 | 18 |" in card
    assert str(tiny_root) not in card and f"measured on {result.tokens:,} tokens" in card


def test_a_student_that_nothing_is_cut_from_is_the_teacher(tiny_root, tmp_path):
    teacher, data = tiny_root / "teacher", str(tiny_root / "data")
    result = prune_model(str(teacher), tmp_path / "s", data=data, size=Size(), method="first")
    assert result.spec == result.teacher_spec and result.tokens == 0
    np.testing.assert_array_equal(result.nats, result.teacher_nats)
    name = "model.safetensors"
    assert (tmp_path / "s" / name).read_bytes() == (teacher / name).read_bytes()


def test_a_width_that_files_cannot_have_is_changed_and_said(tiny_root, tmp_path, caplog):
    data, size = str(tiny_root / "data"), Size(hidden=17)
    with caplog.at_level("WARNING", "ddk_jax"):
        result = prune_model(
            str(tiny_root / "teacher"), tmp_path, data=data, size=size, method="first"
        )
    assert result.spec.hidden_size == 16
    assert "hidden 17 is not possible with 2 heads" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": Size(layers=3)}, "3 layers cannot be left: the model has 2"),
        ({"rows": 0}, "--rows 0"),
        ({"teacher": "{root}/nowhere"}, "no such directory"),
        ({"data": "{root}/nowhere"}, "run ddk prepare"),
        ({"seq_len": 17}, "at most 16"),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny_root, tmp_path, changes, message):
    words = {"teacher": "{root}/teacher", "data": "{root}/data", "size": Size()} | changes
    words |= {key: words[key].format(root=tiny_root) for key in ("teacher", "data")}
    with pytest.raises(UserError, match=message):
        prune_model(out=tmp_path / "s", **words)
    assert not (tmp_path / "s").exists()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The quickstart's data."""
    config = quickstart_config(tmp_path_factory.mktemp("shipped"))
    prepare_data(config.data, progress=lambda _: None)
    return config.data.dir


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradient", "activation"])
def test_the_shipped_teacher_leaves_a_student_that_knows_something(shipped, tmp_path, method):
    """At half its size, a student starts far under a random one and under a cut by number."""
    size = Size(layers=3, hidden=192, groups=1, neurons=512)
    found = {
        name: prune_model(
            "assets:teacher", tmp_path / name, data=shipped, size=size, method=name, rows=8
        )
        for name in (method, "first")
    }
    nats = {name: float(np.mean(result.nats)) for name, result in found.items()}
    # Random values say as much about the next token as a uniform guess, or less.
    guess = math.log(found["first"].spec.vocab_size)
    assert nats[method] < 0.7 * guess
    assert nats[method] < nats["first"] - 0.5
