"""The line that shows how far a transfer is, by a clock that the tests turn."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tiny

from ddk_jax.training import loaded, transfer
from ddk_jax.training.transfer import TransferLine

GIB = 2**30


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_quick_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO, "ddk_jax"), TransferLine("m", clock=clock) as line:
        for i in range(10):
            clock.now += 0.2
            line.update("reading", i, 10)
    assert caplog.messages == []


def test_without_a_terminal_there_is_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO, "ddk_jax"), TransferLine("m", clock=clock) as line:
        for done in range(1, 41):
            clock.now += 1
            line.update("reading", done * GIB, 40 * GIB)
    assert caplog.messages == [
        "reading m: 15.0 of 40.0 GiB",
        "reading m: 30.0 of 40.0 GiB",
        "reading m: 40.0 GiB in 40 s",
    ]


def test_on_a_terminal_there_is_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transfer, "is_watched", lambda: True)
    clock = Clock()
    with TransferLine("m", clock=clock) as line:
        line.update("verifying", 1, 10)
        assert capsys.readouterr().err == ""
        clock.now += 5
        line.update("verifying", 5, 10)
        line.update("reading", 2 * GIB, 4 * GIB)
    shown = capsys.readouterr().err
    assert "verifying m" in shown and "reading m" in shown and "4.00G" in shown


def test_an_error_is_not_followed_by_how_long_it_took(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    with (
        caplog.at_level(logging.INFO, "ddk_jax"),
        pytest.raises(OSError),
        TransferLine("m", clock=clock) as line,
    ):
        clock.now += 9
        line.update("reading", 1, 10)
        raise OSError
    assert caplog.messages == []


def test_loading_a_model_tells_the_line(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transfer, "_NOTICEABLE_SECONDS", 0.0)
    path = str(tiny_root / "teacher")
    mesh = tiny.make_mesh()
    with caplog.at_level(logging.INFO, "ddk_jax"):
        model = loaded.load_model(path, mesh, dtype="float32", params_dtype="float32")
        assert model.digest
    said = "\n".join(caplog.messages)
    assert f"reading {path}: 0.0 GiB in 0 s" in said and f"hashing {path}: 0.0 GiB" in said
