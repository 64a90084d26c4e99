"""metrics.jsonl: whole lines, no duplicates after a resume, the same text for the same run."""

from __future__ import annotations

import io
import json
import logging
import math
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_jax.errors import StorageError
from ddk_jax.training.metrics import (
    CheckpointEvent,
    EvaluationEvent,
    Event,
    MetricsWriter,
    MixtureEvent,
    ProgressLine,
    StepEvent,
    StepTiming,
    Timing,
    read_metrics,
    to_json,
    truncate_after,
)


def step_event(step: int, **changes: Any) -> StepEvent:
    fields: dict[str, Any] = {
        "step": step,
        "tokens": np.int64(step * 100),
        "loss": np.float32(0.1),
        "terms": {"cross_entropy": 2.5, "forward_kl": jnp.float32(0.25)},
        "domain_nats": {
            "cross_entropy": np.array([1.0, np.nan], np.float32),
            "forward_kl": [0.5, math.inf],
        },
        "domain_tokens": np.array([60, 0]),
        "learning_rate": 3e-5,
        "grad_norm": np.float64(1.5),
        "skipped": jnp.int32(0),
        "timing": StepTiming(seconds=0.5, tokens_per_second=200.0, data_wait_seconds=0.01),
    }
    return StepEvent(**{**fields, **changes})


def evaluation_event(step: int) -> EvaluationEvent:
    return EvaluationEvent(
        step=step,
        tokens_seen=step * 100,
        domains=("code", "prose"),
        student_nats=np.array([3.0, 4.0]),
        teacher_nats=None,
        tokens=[1000, 2000],
        timing=Timing(seconds=1.0),
    )


def mixture_event(step: int) -> MixtureEvent:
    return MixtureEvent(
        step=step,
        start_row=step * 8,
        domains=["code", "prose"],
        weights=np.array([0.25, 0.75]),
        gap=[0.5, np.float64(np.nan)],
        gap_kind="loss_difference",
        controller="ddk",
        ratio=np.array([1.6, np.inf]),
        share=[0.3, 0.7],
        slope=None,
    )


def checkpoint_event(step: int) -> CheckpointEvent:
    return CheckpointEvent(step=step, timing=Timing(seconds=0.2))


def write(path: Path, *events: Event) -> None:
    with MetricsWriter(path) as writer:
        for event in events:
            writer.write(event)


# Lines.


def test_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, step_event(1), evaluation_event(1), mixture_event(1), checkpoint_event(1))
    assert read_metrics(path) == [
        {
            "event": "step",
            "step": 1,
            "tokens": 100,
            "loss": float(np.float32(0.1)),
            "terms": {"cross_entropy": 2.5, "forward_kl": 0.25},
            "domain_nats": {"cross_entropy": [1.0, None], "forward_kl": [0.5, None]},
            "domain_tokens": [60, 0],
            "learning_rate": 3e-5,
            "grad_norm": 1.5,
            "skipped": 0,
            "timing": {"seconds": 0.5, "tokens_per_second": 200.0, "data_wait_seconds": 0.01},
        },
        {
            "event": "evaluation",
            "step": 1,
            "tokens_seen": 100,
            "domains": ["code", "prose"],
            "student_nats": [3.0, 4.0],
            "teacher_nats": None,
            "tokens": [1000, 2000],
            "timing": {"seconds": 1.0},
        },
        {
            "event": "mixture",
            "step": 1,
            "start_row": 8,
            "domains": ["code", "prose"],
            "weights": [0.25, 0.75],
            "gap": [0.5, None],
            "gap_kind": "loss_difference",
            "controller": "ddk",
            "ratio": [1.6, None],
            "share": [0.3, 0.7],
            "slope": None,
            "loss_weights": None,
        },
        {"event": "checkpoint", "step": 1, "timing": {"seconds": 0.2}},
    ]


def test_each_line_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(step_event(1))
        assert len(read_metrics(path)) == 1
        writer.write(step_event(2))
        assert [event["step"] for event in read_metrics(path)] == [1, 2]
        writer.sync()


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, step_event(1))
    write(path, step_event(2))
    assert [event["step"] for event in read_metrics(path)] == [1, 2]


def test_without_a_file_nothing_is_written() -> None:
    """For the other processes of a run."""
    with MetricsWriter(None) as writer:
        writer.write(step_event(1))
        writer.sync()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_equal_floats_give_equal_text_and_come_back(value: float) -> None:
    text = json.dumps(to_json({"x": value}))
    assert text == json.dumps(to_json({"x": np.float64(value)}))
    assert json.loads(text)["x"] == value


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.floats(width=32).map(np.float32)
    | st.integers(0, 100).map(np.int32)
    | st.lists(st.floats(width=32), max_size=4).map(lambda x: np.array(x, np.float32)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values)
def test_everything_becomes_strict_json(value: Any) -> None:
    plain = to_json(value)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_numbers_that_are_not_finite_are_null() -> None:
    values = [math.nan, math.inf, np.float32(-np.inf), np.array([1.0, np.nan]), jnp.float32(np.nan)]
    assert to_json(values) == [None, None, None, [1.0, None], None]
    assert to_json(jnp.array([1.5, np.inf], jnp.bfloat16)) == [1.5, None]
    assert to_json({"b": np.bool_(True), "n": np.int64(2**40)}) == {"b": True, "n": 2**40}


# Reading.


@pytest.mark.parametrize("torn", [b'{"event": "step", "st', b"", b'{"event": "step", "step": 3}'])
def test_a_torn_last_line_is_ignored(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, step_event(1), step_event(2))
    with path.open("ab") as file:
        file.write(torn)
    assert [event["step"] for event in read_metrics(path)] == [1, 2]


def test_a_broken_line_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\nnonsense\n')
    with pytest.raises(StorageError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is this a run directory"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_an_unwritable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        MetricsWriter(tmp_path)


# Resuming.


def run(first: int, last: int) -> Iterator[Event]:
    """What a loop writes: an evaluation and a checkpoint every second step, saved a step late."""
    for step in range(first, last + 1):
        yield step_event(step)
        if step % 2 == 0:
            yield evaluation_event(step)
            yield mixture_event(step)
        elif step > 1:
            yield checkpoint_event(step - 1)


def without_clock(path: Path) -> list[dict[str, Any]]:
    events = [event for event in read_metrics(path) if event["event"] != "checkpoint"]
    return [{k: v for k, v in event.items() if k != "timing"} for event in events]


@pytest.mark.parametrize("killed_at", range(17))
@pytest.mark.parametrize("torn", [b"", b'{"event": "st'])
def test_resumed_lines_equal_those_of_an_uninterrupted_run(
    tmp_path: Path, killed_at: int, torn: bytes
) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "metrics.jsonl"
    write(whole, *run(1, 8))
    written = list(run(1, 8))[:killed_at]
    write(resumed, *written)
    with resumed.open("ab") as file:
        file.write(torn)
    # The newest checkpoint may be at any even step whose lines are all there.
    for step in {max((e.step for e in written if e.event == "mixture"), default=-1), -1}:
        before = resumed.read_bytes()
        later = sum(event.step > step for event in written)
        assert truncate_after(resumed, step) == later
        orphan = tmp_path / "metrics.jsonl.orphan"
        lines = orphan.read_text().splitlines() if orphan.exists() else []
        assert len(lines) == later
        write(resumed, *run(max(step, 0) + 1, 8))
        assert without_clock(resumed) == without_clock(whole)
        resumed.write_bytes(before)
        orphan.unlink(missing_ok=True)


def test_truncating_twice_changes_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *run(1, 6))
    assert truncate_after(path, 4) == 4
    kept = path.read_bytes()
    inode = path.stat().st_ino
    assert truncate_after(path, 4) == 0
    assert path.read_bytes() == kept
    assert path.stat().st_ino == inode


def test_a_start_from_scratch_also_moves_step_0(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert truncate_after(path, -1) == 0
    write(path, evaluation_event(0), step_event(1))
    assert truncate_after(path, 0) == 1
    assert truncate_after(path, -1) == 1
    assert read_metrics(path) == []
    assert [event["step"] for event in read_metrics(tmp_path / "metrics.jsonl.orphan")] == [1, 0]


def test_unreadable_lines_do_not_stop_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, step_event(1))
    with path.open("ab") as file:
        file.write(b'nonsense\n[1]\n{"event": "step"}\n{"event": "step", "step": "x"}\n\xff\n')
    write(path, step_event(2))
    assert truncate_after(path, 2) == 5
    assert [event["step"] for event in read_metrics(path)] == [1, 2]
    assert "moved unreadable lines" in caplog.text


lines = st.binary(max_size=20) | st.sampled_from(
    [b'{"step": 1}', b'{"step": 2.5}', b'{"step": []}']
)


@given(st.lists(lines, max_size=5).map(b"\n".join), st.integers(-1, 3))
def test_no_content_breaks_a_resume(content: bytes, step: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.jsonl"
        path.write_bytes(content)
        truncate_after(path, step)
        assert all(event["step"] <= step for event in read_metrics(path))


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from ddk_jax.errors import StorageError
    from ddk_jax.training.metrics import CheckpointEvent, MetricsWriter, Timing

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with MetricsWriter(Path(sys.argv[1])) as writer:
        try:
            for step in range(100):
                writer.write(CheckpointEvent(step=step, timing=Timing(seconds=0.5)))
        except StorageError as error:
            print(error)
            sys.exit(error.exit_code)
"""


def test_a_full_disk_is_a_clean_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == 74, child.stderr
    assert f"cannot write {path}" in child.stdout
    assert [event["step"] for event in read_metrics(path)] == list(range(len(read_metrics(path))))
    assert 10 < len(read_metrics(path)) < 20


# Progress.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with (
        caplog.at_level(logging.INFO, logger="ddk_jax"),
        ProgressLine(steps=25, first_step=4, log_every_steps=10, clock=clock) as progress,
    ):
        for step in range(5, 26):
            clock.now += 60.0 if step == 5 else 4.0
            progress.update(step, loss=2.0 + step, tokens_per_second=12345.6)
    assert stream.getvalue() == ""
    assert [record.getMessage() for record in caplog.records] == [
        "step 10/25  loss 12.0000  12,346 tokens/s  0:01:00 left",
        "step 20/25  loss 22.0000  12,346 tokens/s  0:00:20 left",
        "step 25/25  loss 27.0000  12,346 tokens/s  0:00:00 left",
    ]


def test_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with (
        caplog.at_level(logging.INFO, logger="ddk_jax"),
        ProgressLine(steps=3, log_every_steps=1) as progress,
    ):
        for step in (1, 2, 3):
            progress.update(step, loss=0.5, tokens_per_second=2000.0)
    assert "3/3" in stream.getvalue()
    assert "loss 0.5000, 2,000 tokens/s" in stream.getvalue()
    assert caplog.records == []


def test_no_bar_for_the_other_processes_of_a_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    caplog.set_level(logging.WARNING, logger="ddk_jax")
    with ProgressLine(steps=1, log_every_steps=1, shown=False) as progress:
        progress.update(1, loss=0.5, tokens_per_second=2000.0)
    assert stream.getvalue() == "" and caplog.records == []
