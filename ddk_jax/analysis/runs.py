"""The record of one run: what its directory says happened, as arrays.

Legend: E evaluations, M mixture decisions, S finished steps, D domains.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float64, Int64

from ddk_jax.errors import StorageError, UserError
from ddk_jax.places import AnyPath, bucket_errors, resolve_place, whole_path
from ddk_jax.training.metrics import read_metrics


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """Everything that the figures and tables need from one run directory.

    A value that the run did not measure, or wrote as null, is NaN. A run that was stopped early, or
    is still going, has an empty `summary`.
    """

    path: AnyPath
    """The run directory."""
    name: str
    """How tables and legends call the run."""
    domains: tuple[str, ...]
    """Domains in the order of the config; the order of every D axis below."""
    config: Mapping[str, Any]
    """The resolved config, as in config.yaml."""
    identity: Mapping[str, Any]
    """run.json: digest and versions. Empty when the file is missing."""
    summary: Mapping[str, Any]
    """summary.json. Empty for a run that has not finished."""

    evaluation_steps: Int64[np.ndarray, "E"]
    """Finished optimiser steps at each evaluation."""
    evaluation_tokens: Int64[np.ndarray, "E"]
    """Tokens trained on before each evaluation."""
    student_nats: Float64[np.ndarray, "E D"]
    """Validation cross-entropy of the student, nats per token."""
    teacher_nats: Float64[np.ndarray, "D"] | None
    """Validation cross-entropy of the frozen teacher, nats per token; None without a teacher."""

    mixture_tokens: Int64[np.ndarray, "M"]
    """Training tokens before the first row that was drawn with each weight vector."""
    weights: Float64[np.ndarray, "M D"]
    """Mixture weights; each holds until the next one starts."""
    shares: Float64[np.ndarray, "M D"]
    """Share of the training tokens that were drawn under each weight vector; NaN before any."""

    steps: Int64[np.ndarray, "S"]
    """Numbers of the finished steps, from 1."""
    tokens: Int64[np.ndarray, "S"]
    """Cumulative training tokens after each step."""
    loss: Float64[np.ndarray, "S"]
    """Objective, nats per token."""
    terms: Mapping[str, Float64[np.ndarray, "S"]]
    """Each term of the objective by name, nats per token, before its weight."""
    learning_rate: Float64[np.ndarray, "S"]
    """Learning rate of each step."""
    tokens_per_second: Float64[np.ndarray, "S"]
    """Training throughput of each step."""
    data_wait: Float64[np.ndarray, "S"]
    """Share of each step's wall time spent waiting for data, 0 to 1."""
    domain_tokens: Float64[np.ndarray, "D"]
    """Training tokens drawn from each domain."""

    @property
    def finished(self) -> bool:
        """Whether the run ended by itself and wrote its summary."""
        return bool(self.summary)

    @property
    def gap(self) -> Float64[np.ndarray, "E D"] | None:
        """Student minus teacher, nats per token, at each evaluation; None without a teacher."""
        return None if self.teacher_nats is None else self.student_nats - self.teacher_nats[None]

    @property
    def mean_gap(self) -> Float64[np.ndarray, "E"] | None:
        """Mean of the gap over the domains."""
        return None if self.gap is None else over_domains(np.mean, self.gap)

    @property
    def worst_gap(self) -> Float64[np.ndarray, "E"] | None:
        """Largest gap of any domain."""
        return None if self.gap is None else over_domains(np.max, self.gap)

    @property
    def learning_speed(self) -> Float64[np.ndarray, "E D"]:
        """Fall of the student's loss since the evaluation before, nats per million tokens of all.

        NaN at the first one.
        """
        tokens = np.diff(self.evaluation_tokens, prepend=self.evaluation_tokens[:1])
        fall = -np.diff(self.student_nats, axis=0, prepend=self.student_nats[:1])
        none = np.full_like(fall, np.nan)
        return np.divide(1e6 * fall, tokens[:, None], out=none, where=tokens[:, None] > 0)

    @property
    def final_weights(self) -> Float64[np.ndarray, "D"]:
        """The last weights that the controller set; NaN when the run logged none."""
        return self.weights[-1] if len(self.weights) else np.full(len(self.domains), np.nan)

    @property
    def token_share(self) -> Float64[np.ndarray, "D"]:
        """Share of the training tokens that came from each domain; NaN before the first step."""
        total = self.domain_tokens.sum()
        return self.domain_tokens / total if total else np.full(len(self.domains), np.nan)

    @property
    def trained_steps(self) -> int:
        """Finished optimiser steps."""
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def trained_tokens(self) -> int:
        """Tokens trained on."""
        return int(self.tokens[-1]) if len(self.tokens) else 0


def load_run(directory: str | PathLike[str]) -> RunRecord:
    """Reads a run directory, finished or not.

    Args:
        directory: A directory that `ddk train` or `ddk quickstart` wrote, or its place in a bucket.

    Returns:
        The record, with NaN where nothing was measured.

    Raises:
        UserError: The directory is not a run, or the run has not evaluated its student yet.
        StorageError: A file in it cannot be read or is not what it should be.
    """
    path = resolve_place(directory)
    for needed in ("config.yaml", "metrics.jsonl"):
        with bucket_errors(path, "read"):
            missing = not (path / needed).is_file()
        if missing:
            raise UserError(
                f"{path} is not a run directory (it has no {needed}): give the directory that "
                f"`ddk train` wrote, the config's run.dir"
            )
    config = _read_config(path / "config.yaml")
    events = read_metrics(path / "metrics.jsonl")
    evaluations = [event for event in events if event.get("event") == "evaluation"]
    if not evaluations:
        raise UserError(
            f"{path / 'metrics.jsonl'} holds no evaluation: there is nothing to report until the "
            f"run has measured its student once"
        )
    steps = [event for event in events if event.get("event") == "step"]
    mixtures = [event for event in events if event.get("event") == "mixture"]
    identity, summary = _read_json(path / "run.json"), _read_json(path / "summary.json")
    try:
        record = _record(path, config, evaluations, mixtures, steps)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StorageError(
            f"{path / 'metrics.jsonl'}: a line lacks a field or has one of the wrong type "
            f"({type(error).__name__}: {error}); was it written by another version of this package?"
        ) from error
    return dataclasses.replace(record, identity=identity, summary=summary)


def with_unique_names(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Names each run by the shortest end of its path that no other run shares.

    Args:
        runs: Records of different directories.

    Returns:
        The same records in the same order, renamed where two directories have the same last part.
    """
    runs = list(runs)
    parts = [whole_path(run.path).parts for run in runs]
    named = []
    for run, own in zip(runs, parts, strict=True):
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        named.append(dataclasses.replace(run, name="/".join(own[-depth:])))
    return named


def union_of_domains(runs: Sequence[RunRecord]) -> list[str]:
    """Domains of the first run in the order of its config, then those that only later runs have."""
    return list(dict.fromkeys(domain for run in runs for domain in run.domains))


def perplexity(nats: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """The exponential of nats per token; infinite where it is too large for a float."""
    with np.errstate(over="ignore"):
        return np.exp(nats)


def over_domains(reduce: Any, values: Float64[np.ndarray, "E D"]) -> Float64[np.ndarray, "E"]:
    """Reduces the last axis over its finite entries.

    Args:
        reduce: `np.mean` or `np.max`.
        values: One row per evaluation.

    Returns:
        One value per row; NaN where a row has no finite entry.
    """
    rows = [row[np.isfinite(row)] for row in values]
    return np.array([reduce(row) if row.size else np.nan for row in rows], np.float64)


def _record(
    path: AnyPath,
    config: Mapping[str, Any],
    evaluations: list[dict[str, Any]],
    mixtures: list[dict[str, Any]],
    steps: list[dict[str, Any]],
) -> RunRecord:
    domains = _domains(config, evaluations)
    taught = [event for event in evaluations if event.get("teacher_nats") is not None]
    step_numbers = np.array([event["step"] for event in steps], np.int64)
    step_tokens = np.array([event["tokens"] for event in steps], np.int64)
    timings = [event.get("timing", {}) for event in steps]
    names = dict.fromkeys(name for event in steps for name in event.get("terms", {}))
    return RunRecord(
        path=path,
        name=whole_path(path).name,
        domains=domains,
        config=config,
        identity={},
        summary={},
        evaluation_steps=np.array([event["step"] for event in evaluations], np.int64),
        evaluation_tokens=np.array([event["tokens_seen"] for event in evaluations], np.int64),
        student_nats=_by_domain(evaluations, "student_nats", domains),
        teacher_nats=_by_domain(taught, "teacher_nats", domains)[-1] if taught else None,
        mixture_tokens=_start_tokens(config, mixtures, step_numbers, step_tokens),
        weights=_by_domain([_weighed(event) for event in mixtures], "weights", domains),
        shares=_shares(config, mixtures, steps, evaluations[0]["domains"], domains),
        steps=step_numbers,
        tokens=step_tokens,
        loss=_floats(event["loss"] for event in steps),
        terms={name: _floats(event["terms"].get(name) for event in steps) for name in names},
        learning_rate=_floats(event["learning_rate"] for event in steps),
        tokens_per_second=_floats(timing.get("tokens_per_second") for timing in timings),
        data_wait=_ratio(
            _floats(timing.get("data_wait_seconds") for timing in timings),
            _floats(timing.get("seconds") for timing in timings),
        ),
        domain_tokens=_drawn_tokens(steps, evaluations[0]["domains"], domains),
    )


def _weighed(mixture: dict[str, Any]) -> dict[str, Any]:
    """The event with the weights that a controller moved: those in the loss, if it weighs it."""
    in_loss = mixture.get("loss_weights")
    return mixture if in_loss is None else mixture | {"weights": in_loss}


def _domains(config: Mapping[str, Any], evaluations: list[dict[str, Any]]) -> tuple[str, ...]:
    measured = dict.fromkeys(name for event in evaluations for name in event["domains"])
    configured = [domain["name"] for domain in config.get("data", {}).get("domains") or ()]
    ordered = [name for name in configured if name in measured]
    return tuple(ordered + [name for name in measured if name not in ordered])


def _start_tokens(
    config: Mapping[str, Any],
    mixtures: list[dict[str, Any]],
    step_numbers: Int64[np.ndarray, "S"],
    step_tokens: Int64[np.ndarray, "S"],
) -> Int64[np.ndarray, "M"]:
    """Tokens before the first row of each weight vector; rows of a step carry different counts."""
    if not mixtures:
        return np.zeros(0, np.int64)
    rows_per_step = config["train"]["rows_per_step"]
    start_steps = [event["start_row"] / rows_per_step for event in mixtures]
    known_steps = np.concatenate([np.zeros(1, np.int64), step_numbers])
    known_tokens = np.concatenate([np.zeros(1, np.int64), step_tokens])
    return np.rint(np.interp(start_steps, known_steps, known_tokens)).astype(np.int64)


def _drawn_tokens(
    steps: list[dict[str, Any]], logged: Sequence[str], domains: tuple[str, ...]
) -> Float64[np.ndarray, "D"]:
    """Total training tokens per domain; step lines list their values in the order `logged`."""
    totals = np.zeros(len(domains))
    for event in steps:
        for name, count in zip(logged, event["domain_tokens"], strict=True):
            totals[domains.index(name)] += count
    return totals


def _shares(
    config: Mapping[str, Any],
    mixtures: list[dict[str, Any]],
    steps: list[dict[str, Any]],
    logged: Sequence[str],
    domains: tuple[str, ...],
) -> Float64[np.ndarray, "M D"]:
    """What the steps under each weight vector drew."""
    starts = [event["start_row"] / config["train"]["rows_per_step"] for event in mixtures]
    found = np.full((len(mixtures), len(domains)), np.nan)
    for row, start, end in zip(found, starts, [*starts[1:], np.inf], strict=True):
        within = [event for event in steps if start < event["step"] <= end]
        drawn = _drawn_tokens(within, logged, domains)
        if total := drawn.sum():
            row[:] = drawn / total
    return found


def _by_domain(
    events: list[dict[str, Any]], field: str, domains: tuple[str, ...]
) -> Float64[np.ndarray, "E D"]:
    """One row per event, its values put in the order of `domains`; NaN where it has none."""
    table = np.full((len(events), len(domains)), np.nan)
    for row, event in zip(table, events, strict=True):
        for name, value in zip(event["domains"], event[field], strict=True):
            row[domains.index(name)] = np.nan if value is None else value
    return table


def _floats(values: Iterable[float | None]) -> Float64[np.ndarray, "S"]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _ratio(
    part: Float64[np.ndarray, "S"], whole: Float64[np.ndarray, "S"]
) -> Float64[np.ndarray, "S"]:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def _read_config(path: AnyPath) -> Mapping[str, Any]:
    # The strict reader in `config` would refuse runs of another version, which can be reported.
    try:
        with bucket_errors(path, "read"):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise StorageError(f"{path} is not a config: it should be a YAML mapping")
    return content


def _read_json(path: AnyPath) -> Mapping[str, Any]:
    try:
        with bucket_errors(path, "read"):
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise StorageError(f"{path} should hold one JSON object")
    return content
