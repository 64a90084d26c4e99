"""The loop: what it writes, that it trains on what it commanded, why it stops, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml
from tiny import Finished

from ddk_jax.config import Config, load_config
from ddk_jax.errors import DataError, DivergedError, RunHeldError, UserError
from ddk_jax.models import hf
from ddk_jax.training.build import Job
from ddk_jax.training.checkpoint import read_latest
from ddk_jax.training.evaluate import DomainNats, Validation
from ddk_jax.training.lease import RunLease
from ddk_jax.training.loop import train
from ddk_jax.training.metrics import read_metrics

DOMAINS = len(tiny.DOMAINS)
NO_TEACHER = {
    "teacher.path": "",
    "objective.terms": [{"loss": "cross_entropy"}],
    "mixture.controller": "static",
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tiny.use_devices(monkeypatch, 1)
    with tiny.quick_programs(monkeypatch):
        yield


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("ddk_jax")]


# What a run writes.


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_vector(value: Any) -> bool:
    return isinstance(value, list) and len(value) == DOMAINS and all(map(is_number, value))


def has_timing(line: dict[str, Any], *keys: str) -> bool:
    timing = line["timing"]
    return set(timing) == set(keys) and all(is_number(x) and x >= 0 for x in timing.values())


def test_step_lines_have_the_documented_keys_and_types(finished: Finished) -> None:
    steps = finished.of("step")
    assert [line["step"] for line in steps] == list(range(1, tiny.STEPS + 1))
    for line in steps:
        assert set(line) == {
            *("event", "step", "tokens", "loss", "terms", "domain_nats", "domain_tokens"),
            *("learning_rate", "grad_norm", "skipped", "timing"),
        }
        assert type(line["step"]) is type(line["tokens"]) is type(line["skipped"]) is int
        assert all(type(count) is int for count in line["domain_tokens"])
        assert is_number(line["loss"]) and is_number(line["grad_norm"]) and line["grad_norm"] > 0
        assert set(line["terms"]) == set(line["domain_nats"]) == {"cross_entropy", "forward_kl"}
        assert all(map(is_number, line["terms"].values()))
        assert all(map(is_vector, line["domain_nats"].values()))
        assert line["skipped"] == 0
        assert has_timing(line, "seconds", "tokens_per_second", "data_wait_seconds")
        assert line["timing"]["data_wait_seconds"] <= line["timing"]["seconds"]


def test_evaluation_lines_have_the_documented_keys_and_types(finished: Finished) -> None:
    lines = finished.of("evaluation")
    assert [line["step"] for line in lines] == [0, 4, 8, 12]
    steps = finished.of("step")
    for line in lines:
        assert set(line) == {
            *("event", "step", "tokens_seen", "domains", "student_nats", "teacher_nats"),
            *("tokens", "timing"),
        }
        assert line["domains"] == list(tiny.DOMAINS)
        assert is_vector(line["student_nats"]) and is_vector(line["teacher_nats"])
        assert is_vector(line["tokens"]) and min(line["tokens"]) > 0
        assert line["teacher_nats"] == lines[0]["teacher_nats"]
        assert line["tokens_seen"] == (steps[line["step"] - 1]["tokens"] if line["step"] else 0)
        assert has_timing(line, "seconds")


def test_mixture_lines_have_the_documented_keys_and_types(finished: Finished) -> None:
    lines = finished.of("mixture")
    assert [(line["step"], line["start_row"]) for line in lines] == [(0, 0), (4, 32), (8, 64)]
    for line in lines:
        assert set(line) == {
            *("event", "step", "start_row", "domains", "weights", "gap", "gap_kind", "controller"),
            *("ratio", "share", "slope", "loss_weights"),
        }
        assert line["loss_weights"] is None
        assert line["domains"] == list(tiny.DOMAINS)
        assert is_vector(line["weights"]) and sum(line["weights"]) == pytest.approx(1, abs=1e-12)
        assert is_vector(line["gap"]) and is_vector(line["ratio"])
        np.testing.assert_allclose(np.log(line["ratio"]), line["gap"], atol=1e-12)
        assert (line["gap_kind"], line["controller"]) == ("loss_difference", "ddk")


def test_mixture_lines_say_what_was_drawn_and_how_fast_it_was_learned(finished: Finished) -> None:
    first, *lines = finished.of("mixture")
    assert first["share"] is None and first["slope"] is None
    tokens = {line["step"]: line["domain_tokens"] for line in finished.of("step")}
    nats = {line["step"]: np.array(line["student_nats"]) for line in finished.of("evaluation")}
    for before, line in zip([first, *lines], lines, strict=False):
        drawn = np.sum([tokens[s] for s in range(before["step"] + 1, line["step"] + 1)], axis=0)
        np.testing.assert_allclose(line["share"], drawn / drawn.sum(), rtol=1e-12)
        slope = (nats[line["step"]] - nats[before["step"]]) / drawn.sum() * 1e6
        np.testing.assert_allclose(line["slope"], slope, rtol=1e-9)


def test_the_mixture_follows_the_measured_gaps_by_the_paper_s_equations(finished: Finished) -> None:
    gaps = [
        np.subtract(line["student_nats"], line["teacher_nats"])
        for line in finished.of("evaluation")[:-1]
    ]
    weights = np.exp(gaps[0]) / np.exp(gaps[0]).sum()
    for line, gap in zip(finished.of("mixture"), gaps, strict=True):
        if line["step"]:
            measured = weights * np.exp(gap)
            weights = 0.5 * measured / measured.sum() + 0.5 / DOMAINS
        np.testing.assert_allclose(line["gap"], gap, rtol=1e-12)
        np.testing.assert_allclose(line["weights"], weights, rtol=1e-12)
    first, last = (finished.of("mixture")[i]["weights"] for i in (0, -1))
    assert max(abs(np.subtract(first, last))) > 0.02, "a run in which nothing moves shows nothing"


def test_checkpoint_lines_and_directories(finished: Finished) -> None:
    lines = finished.of("checkpoint")
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(set(line) == {"event", "step", "timing"} for line in lines)
    assert all(has_timing(line, "seconds") for line in lines)
    kept = sorted(path.name for path in (finished.run_dir / "checkpoints").iterdir())
    assert kept == ["12", "8"]


def test_a_line_of_a_step_precedes_what_follows_from_it(finished: Finished) -> None:
    order = [
        (line["step"], ("step", "evaluation", "mixture").index(line["event"]))
        for line in finished.lines
        if line["event"] != "checkpoint"
    ]
    assert order == sorted(order)


def test_the_run_directory_says_what_the_run_was(finished: Finished) -> None:
    run_dir = finished.run_dir
    assert {path.name for path in run_dir.iterdir()} == {
        *("config.yaml", "run.json", "metrics.jsonl", "log.txt", "checkpoints", "summary.json"),
    }
    assert load_config(run_dir / "config.yaml") == finished.config
    record = json.loads((run_dir / "run.json").read_text())
    assert record["config_digest"] == finished.config.digest()
    assert {"ddk_jax", "python", "packages", "devices"} <= set(record)
    assert "jax" in record["packages"]
    log = (run_dir / "log.txt").read_text()
    for event in ("event=start", "event=evaluation", "event=mixture", "event=save_start step=12"):
        assert event in log
    assert "event=end step=12 reason=steps" in log


def test_the_summary_agrees_with_the_metrics(finished: Finished) -> None:
    stored = json.loads((finished.run_dir / "summary.json").read_text())
    assert set(stored) == {
        *("steps", "tokens", "stop_reason", "domains", "student_nats_before"),
        *("student_nats_after", "teacher_nats", "weights", "tokens_per_domain", "config_digest"),
        *("average_weights", "timing"),
    }
    evaluations, steps = finished.of("evaluation"), finished.of("step")
    assert stored["stop_reason"] == "steps" and stored["steps"] == tiny.STEPS
    assert stored["student_nats_before"] == evaluations[0]["student_nats"]
    assert stored["student_nats_after"] == evaluations[-1]["student_nats"]
    assert stored["teacher_nats"] == evaluations[0]["teacher_nats"]
    weights = [line["weights"] for line in finished.of("mixture")]
    assert stored["weights"] == weights[-1]
    np.testing.assert_allclose(stored["average_weights"], np.mean(weights, axis=0), rtol=1e-12)
    counts = np.sum([line["domain_tokens"] for line in steps], axis=0)
    assert stored["tokens_per_domain"] == counts.tolist()
    assert stored["tokens"] == steps[-1]["tokens"] == counts.sum()
    assert set(stored["timing"]) == {"wall_seconds", "tokens_per_second"}
    assert stored == json.loads(json.dumps(dataclasses.asdict(finished.summary)))


def test_the_student_of_the_last_checkpoint_measures_what_the_last_evaluation_says(
    finished: Finished,
) -> None:
    job = Job(finished.config)
    restored = read_latest(finished.run_dir / "checkpoints", job.abstract_state())
    assert restored is not None and restored.step == tiny.STEPS
    nats = job.measure(job.student, restored.state.params["student"])
    assert nats.nats.tolist() == finished.summary.student_nats_after


def test_the_learning_rate_of_every_step(finished: Finished) -> None:
    peak, final, warmup = 0.03, 0.003, 2
    for line in finished.of("step"):
        step = line["step"]
        progress = (step - warmup) / (tiny.STEPS - warmup)
        falling = final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
        expected = peak * step / warmup if step <= warmup else falling
        assert line["learning_rate"] == pytest.approx(expected, rel=1e-6)


# The rows that it trains on.


def test_the_loop_trains_on_the_mixture_that_it_commanded(finished: Finished) -> None:
    """Rows of every domain, counted after every step, against the weights written so far."""
    commands = {line["start_row"]: np.array(line["weights"]) for line in finished.of("mixture")}
    commanded, drawn = np.zeros(DOMAINS), np.zeros(DOMAINS)
    weights = np.zeros(DOMAINS)
    for step in range(1, tiny.STEPS + 1):
        weights = commands.get((step - 1) * tiny.ROWS, weights)
        commanded += weights * tiny.ROWS
        rows = finished.batches[step].domain
        drawn += np.bincount(rows, minlength=DOMAINS)
        assert np.abs(drawn - commanded).max() <= 1.1


def test_the_tokens_of_a_step_are_those_of_its_rows(finished: Finished) -> None:
    total = 0
    for line in finished.of("step"):
        batch = finished.batches[line["step"]]
        counts = [0] * DOMAINS
        for segments, role, domain in zip(batch.segment_ids, batch.role, batch.domain, strict=True):
            for t in range(tiny.SEQ_LEN):
                counts[domain] += bool(segments[t] == segments[t + 1] and role[t + 1] > 0)
        total += sum(counts)
        assert line["domain_tokens"] == counts
        assert line["tokens"] == total


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(
    finished: Finished, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.use_devices(monkeypatch, 8)
    train(tiny.config(tiny_root, tmp_path))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for one, eight in zip(
        finished.of("step"), [x for x in lines if x["event"] == "step"], strict=True
    ):
        assert eight["domain_tokens"] == one["domain_tokens"]
        assert eight["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for term, nats in one["terms"].items():
            assert eight["terms"][term] == pytest.approx(nats, rel=1e-5)
    for event, key in (("evaluation", "student_nats"), ("mixture", "weights")):
        ours = [line[key] for line in lines if line["event"] == event]
        np.testing.assert_allclose(ours, [x[key] for x in finished.of(event)], rtol=1e-5)


@pytest.mark.slow
def test_micro_batches_give_the_losses_of_whole_batches(
    finished: Finished, tiny_root: Path, tmp_path: Path
) -> None:
    train(tiny.config(tiny_root, tmp_path, **{"train.micro_rows": 2, "train.max_intervals": 1}))
    losses = [x["loss"] for x in tiny.lasting_metrics(tmp_path) if x["event"] == "step"]
    expected = [line["loss"] for line in finished.of("step")][: tiny.INTERVAL]
    assert losses == pytest.approx(expected, rel=1e-5)


# The teacher.


@pytest.mark.slow
def test_the_teacher_is_measured_once_for_all_runs(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_root / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "teacher_nats", ignore_errors=True)
    measured: list[int] = []
    original = Validation.nats

    def counting(validation: Validation, models: Any, *args: Any, **options: Any) -> DomainNats:
        measured.append(models.models[0].spec.hidden_size)
        return original(validation, models, *args, **options)

    monkeypatch.setattr(Validation, "nats", counting)
    # Ends with its first measurement: the discrepancy is under this.
    changes = {"data.dir": str(tmp_path / "data"), "train.stop_discrepancy": 100.0}
    summaries = [
        train(tiny.config(tiny_root, tmp_path / name, **changes | {"run.seed": seed}))
        for seed, name in enumerate(("one", "two"))
    ]
    teacher, student = tiny.TEACHER.hidden_size, tiny.STUDENT["hidden_size"]
    assert measured == [teacher, student, student]
    assert summaries[0].teacher_nats == summaries[1].teacher_nats
    assert summaries[0].student_nats_before != summaries[1].student_nats_before
    # Other rows, another result.
    train(tiny.config(tiny_root, tmp_path / "3", **changes | {"evaluation.rows_per_domain": 4}))
    assert measured[3:] == [teacher, student]


@pytest.mark.slow
def test_training_without_a_teacher(tiny_root: Path, tmp_path: Path) -> None:
    changes = {"mixture.prior": "natural", "mixture.interval_steps": 1, "train.max_intervals": 2}
    summary = train(tiny.config(tiny_root, tmp_path, **NO_TEACHER | changes))
    assert summary.teacher_nats is None and summary.stop_reason == "intervals"
    lines = tiny.lasting_metrics(tmp_path)
    assert {line["teacher_nats"] for line in lines if line["event"] == "evaluation"} == {None}
    mixtures = [line for line in lines if line["event"] == "mixture"]
    sizes = [d.train.tokens for d in Job(tiny.config(tiny_root, tmp_path)).manifest.domains]
    assert [line["step"] for line in mixtures] == [0, 1]
    for line in mixtures:
        assert line["gap"] is None and line["controller"] == "static"
        np.testing.assert_allclose(line["weights"], np.array(sizes) / sum(sizes), rtol=1e-12)


def test_a_gap_needs_a_teacher(tiny_root: Path, tmp_path: Path) -> None:
    changes = NO_TEACHER | {"mixture.controller": "ddk"}
    with pytest.raises(UserError, match=r"set teacher\.path, or mixture\.controller to static"):
        train(tiny.config(tiny_root, tmp_path, **changes))
    with pytest.raises(UserError, match=r"train\.stop_discrepancy compares with a teacher"):
        train(tiny.config(tiny_root, tmp_path, **NO_TEACHER | {"train.stop_discrepancy": 0.1}))


# The controller in the loop.


def with_teacher_nats(monkeypatch: pytest.MonkeyPatch, nats: float) -> None:
    """Let the teacher have the same loss in every domain."""
    result = DomainNats(np.full(DOMAINS, nats), np.ones(DOMAINS))
    monkeypatch.setattr(Job, "teacher_nats", lambda job: result)


def test_the_warm_up_keeps_the_prior(tiny_root: Path, tmp_path: Path) -> None:
    changes = {"mixture.warmup_intervals": 2, "mixture.interval_steps": 1}
    train(tiny.config(tiny_root, tmp_path, **changes | {"train.max_intervals": 3}))
    lines = [x for x in tiny.lasting_metrics(tmp_path) if x["event"] == "mixture"]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[:2]:
        np.testing.assert_allclose(line["weights"], 1 / DOMAINS, rtol=1e-12)
    gap = np.array(lines[2]["gap"])
    np.testing.assert_allclose(lines[2]["weights"], np.exp(gap) / np.exp(gap).sum(), rtol=1e-9)


def test_an_extreme_mixture_is_warned_of_once(
    tiny_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with_teacher_nats(monkeypatch, 0.1)  # the student's 5.5 nats are a ratio of e^5.4
    changes = {"mixture.gap": "ppl_ratio", "mixture.interval_steps": 1, "train.max_intervals": 3}
    with caplog.at_level(logging.WARNING, logger="ddk_jax"):
        train(tiny.config(tiny_root, tmp_path, **changes))
    (warning,) = [text for text in messages(caplog) if "mixture is extreme" in text]
    assert "loss_difference" in warning and "mixture.warmup_intervals" in warning
    assert "mixture is extreme" in (tmp_path / "log.txt").read_text()


# Why it stops.


@pytest.mark.parametrize(
    ("changes", "reason", "steps"),
    [
        ({"train.max_tokens": 200}, "tokens", 2),
        ({"train.max_intervals": 1, "mixture.interval_steps": 3}, "intervals", 3),
    ],
)
def test_stop_conditions(
    tiny_root: Path, tmp_path: Path, changes: dict[str, Any], reason: str, steps: int
) -> None:
    summary = train(tiny.config(tiny_root, tmp_path, **NO_TEACHER | changes))
    assert (summary.stop_reason, summary.steps) == (reason, steps)
    lines = tiny.lasting_metrics(tmp_path)
    # Measured where it stopped, wherever that is; no weights for rows that never come.
    assert [x["step"] for x in lines if x["event"] == "evaluation"] == [0, steps]
    assert [x["step"] for x in lines if x["event"] == "mixture"] == [0]
    assert json.loads((tmp_path / "summary.json").read_text())["stop_reason"] == reason


def test_it_stops_when_the_discrepancy_is_small(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_teacher_nats(monkeypatch, 4.0)
    changes = {"train.stop_discrepancy": 1.0, "mixture.interval_steps": 2}
    summary = train(tiny.config(tiny_root, tmp_path, **changes))
    assert summary.stop_reason == "discrepancy" and 0 < summary.steps < tiny.STEPS
    nats = [x["student_nats"] for x in tiny.lasting_metrics(tmp_path) if x["event"] == "evaluation"]
    gaps = np.mean(nats, axis=1) - 4.0
    assert gaps[-1] < 1.0 and (gaps[:-1] >= 1.0).all()


def broken_teacher(tiny_root: Path, directory: Path) -> Path:
    """The teacher with weights so large that its logits are not finite."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_root / "teacher", directory)
    (directory / "SHA256SUMS").unlink()
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def last_params(config: Config, run_dir: Path) -> list[np.ndarray]:
    restored = read_latest(run_dir / "checkpoints", Job(config).abstract_state())
    assert restored is not None
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored.state.params)]


@pytest.mark.slow
def test_a_teacher_that_overflows_ends_the_run_with_a_diagnosis(
    tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = broken_teacher(tiny_root, tmp_path / "teacher")
    changes = {"teacher.path": str(teacher), "train.max_skipped_in_a_row": 3}
    config = tiny.config(tiny_root, tmp_path / "run", **changes | {"checkpoint.every_steps": 2})
    with pytest.raises(DivergedError) as caught:
        train(config)
    assert caught.value.exit_code == 70
    assert "at step 3: 3 updates in a row" in str(caught.value)
    assert "rows 0 to 23" in str(caught.value)
    assert all(name in str(caught.value) for name in tiny.DOMAINS)
    lines = tiny.lasting_metrics(tmp_path / "run")
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["skipped"] for line in steps] == [1, 1, 1]
    assert steps[0]["loss"] is None and is_number(steps[0]["terms"]["cross_entropy"])
    assert steps[0]["learning_rate"] == steps[2]["learning_rate"]  # that of an update never made
    assert [line["gap"] for line in lines if line["event"] == "mixture"] == [[None] * DOMAINS]
    assert any("keeps its weight" in text for text in messages(caplog))
    assert all(np.isfinite(leaf).all() for leaf in last_params(config, tmp_path / "run"))
    # A second start goes on from the last checkpoint, to the same end.
    with pytest.raises(DivergedError, match="at step 3: 3 updates in a row"):
        train(config)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e30, 3e38])
def test_a_learning_rate_that_is_far_too_large_never_reaches_a_checkpoint_as_nan(
    tiny_root: Path, tmp_path: Path, rate: float
) -> None:
    """The second makes an infinite update of finite gradients."""
    changes = {"optim.learning_rate": rate, "train.max_skipped_in_a_row": 3}
    config = tiny.config(tiny_root, tmp_path, **changes | {"checkpoint.every_steps": 1})
    with pytest.raises(DivergedError, match="updates in a row were not finite"):
        train(config)
    assert all(np.isfinite(leaf).all() for leaf in last_params(config, tmp_path))


# Objectives of other kinds.


def terms(config: Config, run_dir: Path) -> dict[str, list[float]]:
    train(config)
    steps = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["event"] == "step"]
    return {name: [line["terms"][name] for line in steps] for name in steps[0]["terms"]}


@pytest.mark.slow
def test_a_mixture_of_copies_of_the_teacher_is_the_teacher(
    finished: Finished, tiny_root: Path, tmp_path: Path
) -> None:
    others = [{"path": str(tiny_root / "teacher"), "weight": 3.0, "domains": {"echo": 0.0}}]
    config = tiny.config(tiny_root, tmp_path, **{"teacher.others": others})
    found = terms(config, tmp_path)
    for name, values in found.items():
        expected = [line["terms"][name] for line in finished.of("step")]
        np.testing.assert_allclose(values, expected, rtol=1e-4)


@pytest.mark.slow
def test_two_teachers_are_measured_as_their_mixture(tiny_root: Path, tmp_path: Path) -> None:
    other = tiny.write_teacher(tmp_path / "other", tiny_root / "tokenizer", seed=5)
    paths = {"teacher.path": str(tiny_root / "teacher"), "teacher.others": [{"path": str(other)}]}
    single = [
        Job(tiny.config(tiny_root, tmp_path, **{"teacher.path": str(p)})).teacher_nats()
        for p in (tiny_root / "teacher", other)
    ]
    both = Job(tiny.config(tiny_root, tmp_path, **paths)).teacher_nats()
    alone = Job(
        tiny.config(
            tiny_root,
            tmp_path,
            **paths
            | {"teacher.others": [{"path": str(other), "weight": 0.0, "domains": {"echo": 1.0}}]}
            | {"teacher.domains": {"echo": 0.0}},
        )
    ).teacher_nats()
    assert both is not None and alone is not None
    first, second = (nats.nats for nats in single if nats is not None)
    echo = tiny.DOMAINS.index("echo")
    np.testing.assert_allclose(alone.nats, np.where(np.arange(3) == echo, second, first), rtol=1e-5)
    # The logarithm is concave: a mixture is at least as good as the mean of its parts.
    assert np.all(both.nats <= (first + second) / 2 + 1e-6)


@pytest.mark.slow
def test_terms_on_inner_states_learn_their_maps(tiny_root: Path, tmp_path: Path) -> None:
    objective = [
        {"loss": "cross_entropy"},
        {"loss": "hidden_mse", "pairs": 2},
        {"loss": "hidden_cosine", "student_layers": [1], "teacher_layers": [2], "weight": 0.5},
        {"loss": "relation_kl", "relation_heads": 4, "weight": 0.1},
    ]
    config = tiny.config(tiny_root, tmp_path, **{"objective.terms": objective})
    found = terms(config, tmp_path)
    assert found["hidden_mse"][-1] < 0.9 * found["hidden_mse"][0]
    assert found["hidden_cosine"][-1] < found["hidden_cosine"][0]
    restored = read_latest(tmp_path / "checkpoints", Job(config).abstract_state())
    assert restored is not None
    before, after = Job(config).initial_state().params, restored.state.params
    shapes = {name: leaf["map"].shape for name, leaf in after["objective"].items()}
    assert shapes == {"hidden_mse": (2, 16, 24), "hidden_cosine": (1, 16, 24)}
    for name in shapes:
        change = np.abs(after["objective"][name]["map"] - before["objective"][name]["map"])
        assert change.max() > 1e-4


@pytest.mark.slow
def test_a_teacher_with_other_tokens(tiny_root: Path, tmp_path: Path) -> None:
    """Its tokens are the data's but for two, exchanged: sorted probabilities are the same."""
    teacher = tiny_root / "teacher"
    params = hf.load(teacher)
    table = np.array(params["embed"]["table"])
    table[[0, 1]] = table[[1, 0]]
    params["embed"]["table"] = jnp.asarray(table)
    other = tmp_path / "other"
    swapped = tiny.write_tokenizer(tmp_path / "swapped", swapped=True)
    hf.export(params, tiny.TEACHER, other, tokenizer_dir=swapped, card="Two tokens exchanged.\n")
    objective = [{"loss": "cross_entropy"}, {"loss": "uld", "weight": 1.5}]
    runs = {
        name: tiny.config(
            tiny_root, tmp_path / name, **{"teacher.path": str(path), "objective.terms": objective}
        )
        for name, path in (("same", teacher), ("crossed", other))
    }
    with pytest.raises(UserError, match="`uld` alone compares across vocabularies"):
        train(tiny.config(tiny_root, tmp_path / "kl", **{"teacher.path": str(other)}))
    assert Job(runs["same"]).retokeniser is None
    assert Job(runs["crossed"]).retokeniser is not None
    same, crossed = (Job(config).teacher_nats() for config in runs.values())
    assert same is not None and crossed is not None
    np.testing.assert_array_equal(crossed.tokens, same.tokens)
    # A row's first token may stand between two of its bytes; apart from that, the same nats.
    np.testing.assert_allclose(crossed.nats, same.nats, rtol=2e-2)
    expected, found = (terms(config, tmp_path / name) for name, config in runs.items())
    np.testing.assert_allclose(found["uld"], expected["uld"], rtol=2e-2)
    np.testing.assert_allclose(found["cross_entropy"], expected["cross_entropy"], rtol=1e-3)


@pytest.mark.slow
def test_the_two_stages_of_ted(tiny_root: Path, tmp_path: Path) -> None:
    teacher = str(tiny_root / "teacher")
    layers = {"loss": "layer_cross_entropy", "pairs": 2}
    filters = {
        "of_teacher": {"student.path": teacher, "student.spec": {}, "objective.terms": [layers]},
        "of_student": {"objective.terms": [layers | {"through": "teacher"}]},
    }
    for name, changes in filters.items():
        config = tiny.config(tiny_root, tmp_path / name, **changes | {"student.frozen": True})
        nats = terms(config, tmp_path / name)["layer_cross_entropy"]
        assert nats[-1] < nats[0]
        restored = read_latest(tmp_path / name / "checkpoints", Job(config).abstract_state())
        assert restored is not None
        # Nothing but the filters has moved.
        before = tiny.state_digest(Job(config).initial_state().params["student"])
        assert tiny.state_digest(restored.state.params["student"]) == before
    second = [
        {"loss": "forward_kl"},
        {"loss": "hidden_mse", "pairs": 2, "weight": 10.0}
        | {f"{who}_filters": str(tmp_path / f"of_{who}") for who in ("student", "teacher")},
    ]
    config = tiny.config(tiny_root, tmp_path / "two", **{"objective.terms": second})
    found = terms(config, tmp_path / "two")
    assert found["hidden_mse"][-1] < found["hidden_mse"][0]
    job = Job(config)
    learned = job.initial_state().params["objective"]["hidden_mse"]["map"]
    assert learned.shape == (2, 16, 24)
    assert job.frozen_objective["hidden_mse"]["teacher_map"].shape == (2, 24, 24)
    wrong = [second[1] | {"pairs": 1}]
    with pytest.raises(UserError, match=r"has filters of layers \(1, 2\), not of \(2,\)"):
        train(tiny.config(tiny_root, tmp_path / "three", **{"objective.terms": wrong}))
    own = tiny.config(
        tiny_root, tmp_path / "own", **{"objective.terms": [layers], "student.frozen": True}
    )
    train(own)
    wrong = [second[1] | {"student_filters": str(tmp_path / "own")}]
    with pytest.raises(UserError, match="has filters to 16 features, the teacher's are to 24"):
        train(tiny.config(tiny_root, tmp_path / "four", **{"objective.terms": wrong}))


# A run that is there already.


def copy_of(finished: Finished, tiny_root: Path, target: Path) -> Path:
    """The finished run in another place, as if it had always been there."""
    shutil.copytree(finished.run_dir, target)
    moved = tiny.config(tiny_root, target)
    summary = json.loads((target / "summary.json").read_text())
    (target / "summary.json").write_text(json.dumps(summary | {"config_digest": moved.digest()}))
    return target


def test_a_finished_run_is_not_run_again(
    finished: Finished, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = copy_of(finished, tiny_root, tmp_path / "run")
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name != "log.txt"}
    with monkeypatch.context() as patch:
        patch.delattr(Job, "measure")
        patch.delattr(Job, "train_step")
        summary = train(tiny.config(tiny_root, run_dir))
    digest = tiny.config(tiny_root, run_dir).digest()
    assert summary == dataclasses.replace(finished.summary, config_digest=digest)
    after = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name != "log.txt"}
    assert after == before


def test_a_finished_run_under_a_harmless_other_setting_keeps_its_record(
    finished: Finished, tiny_root: Path, tmp_path: Path
) -> None:
    run_dir = copy_of(finished, tiny_root, tmp_path / "run")
    summary = train(tiny.config(tiny_root, run_dir, **{"run.log_every_steps": 5}))
    ours, theirs = dataclasses.asdict(summary), dataclasses.asdict(finished.summary)
    for key in ours.keys() - {"timing", "config_digest"}:
        assert ours[key] == theirs[key]
    assert tiny.lasting_metrics(run_dir) == tiny.lasting_metrics(finished.run_dir)
    assert not (run_dir / "metrics.jsonl.orphan").exists()


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(
    finished: Finished, tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And another learning rate is allowed, and said."""
    run_dir = copy_of(finished, tiny_root, tmp_path / "run")
    changes = {"train.steps": 13, "optim.learning_rate": 0.01}
    with caplog.at_level(logging.INFO, logger="ddk_jax"):
        summary = train(tiny.config(tiny_root, run_dir, **changes))
    assert (summary.steps, summary.stop_reason) == (13, "steps")
    assert "optim.learning_rate changes: 0.03 -> 0.01" in messages(caplog)
    assert "train.steps changes: 12 -> 13" in messages(caplog)
    assert "event=resume step=12" in messages(caplog)
    steps = [x["step"] for x in tiny.lasting_metrics(run_dir) if x["event"] == "step"]
    assert steps == list(range(1, 14))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", 1),
        ("data.seq_len", 8),
        ("student.spec.ffn_size", 16),
        ("mixture.alpha", 0.25),
        ("mixture.interval_steps", 3),
        ("train.rows_per_step", 16),
        ("objective.terms", [{"loss": "cross_entropy"}]),
    ],
)
def test_settings_that_would_change_the_meaning_of_a_run_are_refused(
    finished: Finished, tiny_root: Path, tmp_path: Path, key: str, value: Any
) -> None:
    run_dir = copy_of(finished, tiny_root, tmp_path / "run")
    with pytest.raises(UserError, match=rf"holds a run with other settings.*{key}") as caught:
        train(tiny.config(tiny_root, run_dir, **{key: value, "run.log_every_steps": 2}))
    assert "log_every_steps" not in str(caught.value)  # that one may change
    assert load_config(run_dir / "config.yaml") == finished.config


def test_other_data_under_the_same_name_is_refused(
    finished: Finished, tiny_root: Path, tmp_path: Path
) -> None:
    """The domains in another order, prepared where the old ones were."""
    run_dir = copy_of(finished, tiny_root, tmp_path / "run")
    for name in ("data", "teacher"):
        shutil.copytree(tiny_root / name, tmp_path / name)
    manifest = tmp_path / "data" / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["domains"] = tree["domains"][::-1]
    manifest.write_text(json.dumps(tree))
    changes = {"data.dir": str(tmp_path / "data"), "data.domains": []}
    with pytest.raises(UserError, match=r"not the data and the teacher that .* was trained on"):
        train(tiny.config(tiny_root, run_dir, **changes))
    with pytest.raises(DataError, match="run `ddk prepare`"):
        train(tiny.config(tiny_root, run_dir, **{"data.dir": str(tmp_path / "data")}))


@pytest.mark.parametrize("what", ["data.dir", "teacher.path"])
def test_other_content_under_the_same_names_is_refused(
    finished: Finished, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The same settings, domains and shapes, but other documents, or another teacher."""
    run_dir = copy_of(finished, tiny_root, tmp_path / "run")
    if what == "data.dir":
        other = dataclasses.replace(Job(finished.config).manifest, inputs_digest="other")
        monkeypatch.setattr("ddk_jax.training.build.read_manifest", lambda _: other)
    else:
        monkeypatch.setattr("ddk_jax.models.hf.file_digest", lambda *_: "other")
    with pytest.raises(UserError, match=rf"the content of {what} has changed"):
        train(tiny.config(tiny_root, run_dir, **{"run.log_every_steps": 2}))


def test_a_directory_without_a_checkpoint_takes_any_config(tiny_root: Path, tmp_path: Path) -> None:
    """A mistake in the first config can be corrected in place; a torn file is no obstacle."""
    with pytest.raises(UserError, match="has 200 embeddings"):
        train(tiny.config(tiny_root, tmp_path, **{"student.spec.vocab_size": 200}))
    (tmp_path / "config.yaml").write_text("student: {spec: {")
    summary = train(tiny.config(tiny_root, tmp_path, **NO_TEACHER | {"train.max_intervals": 1}))
    assert summary.steps == tiny.INTERVAL
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored["mixture"]["controller"] == "static"


def test_a_second_writer_is_refused(tiny_root: Path, tmp_path: Path) -> None:
    config = tiny.config(tiny_root, tmp_path)
    with RunLease(tmp_path), pytest.raises(RunHeldError) as caught:
        train(config)
    assert caught.value.exit_code == 75
    assert not (tmp_path / "config.yaml").exists()


def test_a_domain_is_gone_through_no_more_often_than_its_limit(
    tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`echo` has 30 rows, and would give 32 of the 96."""
    config = tiny.config(tiny_root, tmp_path / "run", **{"mixture": {"controller": "static"}})
    domains = tuple(
        dataclasses.replace(d, max_epochs=0.5 if d.name == "echo" else 0.0)
        for d in config.data.domains
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, domains=domains))
    config = dataclasses.replace(
        config, mixture=dataclasses.replace(config.mixture, interval_steps=4)
    )
    summary = train(config)
    assert summary.steps == tiny.STEPS
    job = Job(config)
    restored = read_latest(tmp_path / "run" / "checkpoints", job.abstract_state())
    assert restored is not None
    drawn = restored.host["pipeline"]["schedule"]["drawn"]
    rows = len(job.train_rows[2])
    assert drawn[2] <= rows // 2 and sum(drawn) == tiny.STEPS * tiny.ROWS
    lines = tiny.lasting_metrics(tmp_path / "run")
    weights = [line["weights"][2] for line in lines if line["event"] == "mixture"]
    assert weights[0] == pytest.approx(1 / 3) and weights[-1] == 0
