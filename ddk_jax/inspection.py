"""What a directory holds: a run, prepared data or a model, as text for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddk_jax.analysis.runs import load_run
from ddk_jax.analysis.tables import MEAN, aligned_table, domain_table, number
from ddk_jax.data.shards import is_prepared
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import UserError
from ddk_jax.models import hf
from ddk_jax.models.decoder import num_parameters
from ddk_jax.models.directory import CONFIG, file_size, read_json, weight_files
from ddk_jax.models.hub import Resolved, resolve
from ddk_jax.places import AnyPath, bucket_errors, resolve_place, storage_errors
from ddk_jax.prepared import describe_data
from ddk_jax.tasks.scores import TaskScore
from ddk_jax.training.checkpoint_files import saved_steps, set_aside
from ddk_jax.training.metrics import read_metrics
from ddk_jax.training.pruning import Pruned
from ddk_jax.training.rundir import is_run
from ddk_jax.training.trained import Comparison, Measurement

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def describe(path: str) -> str:
    """Say what a directory is and the main facts about it.

    Raises:
      UserError: there is no such directory, or it is none that this package knows.
      DataError, StorageError: it is one, but damaged.
    """
    directory = resolve_place(path)
    if is_run(directory):
        with bucket_errors(directory, "read"):
            return _describe_run(directory)
    if isinstance(directory, Path) and is_prepared(directory):
        return describe_data(directory)
    model = resolve(path)
    with storage_errors(model.directory):
        is_model = (model.directory / CONFIG).is_file()
    if is_model:
        return _describe_model(model)
    raise UserError(
        f"{path}: neither a run (config.yaml), nor prepared data (manifest.json), nor a model "
        f"({CONFIG})"
    )


def size_text(num_bytes: int | float) -> str:
    """A number of bytes for people, in powers of 1024."""
    power = 0
    while num_bytes >= 1024 and power < len(_UNITS) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:.0f} {_UNITS[power]}" if power == 0 else f"{num_bytes:.1f} {_UNITS[power]}"


def _describe_run(directory: AnyPath) -> str:
    metrics = directory / "metrics.jsonl"
    events = read_metrics(metrics) if metrics.is_file() else []
    evaluated = any(event.get("event") == "evaluation" for event in events)
    steps = [event for event in events if event.get("event") == "step"]
    last = steps[-1] if steps else {"step": 0, "tokens": 0}
    identity, summary = _object(directory / "run.json"), _object(directory / "summary.json")
    versions = {"ddk_jax": identity.get("ddk_jax"), **identity.get("packages", {})}
    checkpoints = directory / "checkpoints"
    saved = [*map(str, reversed(saved_steps(checkpoints))), *set_aside(checkpoints)]
    state = f"finished ({summary.get('stop_reason')})" if summary else "not finished"
    facts = {
        "run": str(directory),
        "state": state,
        "progress": f"{last['step']:,} steps, {last['tokens']:,} tokens",
        "checkpoints": ", ".join(saved) or "none yet",
        "config digest": identity.get("config_digest", "unknown"),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value),
        "devices": ", ".join(identity.get("devices", ())),
        "holds": ", ".join(sorted(path.name for path in directory.iterdir())),
    }
    table = domain_table(load_run(directory)) if evaluated else "no evaluation yet"
    return f"{_facts(facts)}\n\n{table}"


def _describe_model(model: Resolved) -> str:
    directory = model.directory
    spec, config = hf.read_spec(directory), read_json(directory / CONFIG)
    facts = {
        "model": str(model),
        "family": spec.family,
        "parameters": f"{num_parameters(spec):,}",
        "layers": f"{spec.num_layers} of width {spec.hidden_size}, feed-forward {spec.ffn_size}",
        "heads": f"{spec.num_heads} of width {spec.head_width}, {spec.num_kv_heads} for keys and "
        "values",
        "vocabulary": f"{spec.vocab_size:,}, head {'tied' if spec.tied_head else 'not tied'}",
        "positions": f"{spec.max_positions:,}",
        "weights": f"{_weights_text(model)}, "
        f"{config.get('dtype') or config.get('torch_dtype') or 'type not stated'}",
        "tokenizer": _tokenizer_text(model.tokenizer_dir()),
    }
    return _facts(facts)


def _weights_text(model: Resolved) -> str:
    try:
        files = weight_files(model.directory)
    except UserError:
        if model.repo:  # they are fetched when they are read
            return "not (all) downloaded"
        raise
    size = sum(map(file_size, files))
    return f"{len(files)} file{'s' * (len(files) > 1)}, {size_text(size)}"


def _tokenizer_text(directory: Path) -> str:
    if not (directory / "tokenizer.json").is_file():
        return "none"
    tokenizer = Tokenizer(directory)
    return f"{tokenizer.vocab_size:,} tokens, end token {tokenizer.end_token!r}"


def _facts(facts: Mapping[str, str]) -> str:
    """Names and values in two columns."""
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())


def _object(file: AnyPath) -> Mapping[str, Any]:
    """A JSON object; empty when there is no such file."""
    return read_json(file) if file.is_file() else {}


def measurement_table(result: Measurement) -> str:
    """A measurement in columns; the mean perplexity is that of the mean nats, so geometric."""
    header = ("domain", "nats/token", "bits/byte", "perplexity", "tokens")
    rows = zip(result.nats, result.bits_per_byte, result.perplexity, result.tokens, strict=True)
    mean = float(np.mean(result.nats))
    last = (mean, np.mean(result.bits_per_byte), np.exp(mean), np.sum(result.tokens))
    cells = [
        (name, *map(number, map(float, row), (".4f", ".4f", ",.2f", ",.0f")))
        for name, row in zip([*result.domains, MEAN], [*rows, last], strict=True)
    ]
    return aligned_table(header, cells)


def comparison_table(result: Comparison) -> str:
    """A comparison in columns, with the means over the domains."""
    header = ("domain", "nats", "teacher's", "KL", "overlap@8", "tokens")
    rows = list(zip(*result.terms.values(), result.tokens, strict=True))
    last = (*(np.mean(values) for values in result.terms.values()), np.sum(result.tokens))
    cells = [
        (name, *map(number, map(float, row), (".4f", ".4f", ".4f", ".4f", ",.0f")))
        for name, row in zip([*result.domains, MEAN], [*rows, last], strict=True)
    ]
    return aligned_table(header, cells)


def pruning_table(result: Pruned) -> str:
    """What is left of a teacher, and the loss by domain before and after the cut."""
    cells = [(name, f"{old:,}", f"{new:,}") for name, old, new in result.sizes]
    layers = ", ".join(map(str, result.kept.layers))
    nats = zip(result.teacher_nats, result.nats, strict=True)
    rows = [(np.mean(result.teacher_nats), np.mean(result.nats))]
    losses = [
        (name, *(number(float(value), ".4f") for value in pair))
        for name, pair in zip([*result.domains, MEAN], [*nats, *rows], strict=True)
    ]
    return "\n\n".join(
        [
            aligned_table(("left of the teacher", "teacher", "student"), cells),
            f"layers of the teacher: {layers}",
            aligned_table(("nats per token", "teacher", "student"), losses),
        ]
    )


def score_table(scores: Sequence[TaskScore]) -> str:
    """Scores of tasks in columns, a row for each metric; `majority` and `chance` need no model."""
    header = ("task", "examples", "metric", "value", "stderr", "majority", "chance", "truncated")
    rows = []
    for score in scores:
        first = (score.task, f"{score.examples:,}/{score.available:,}")
        last = f"{score.truncated:,}"
        for name, metric in score.metrics.items():
            baselines = score.baselines if name.startswith("acc") else {}
            style = ",.2f" if name.endswith("perplexity") else ".4f"
            figures = (metric.value, metric.stderr, *map(baselines.get, header[5:7]))
            cells = ("-" if x is None else number(x, style) for x in figures)
            rows.append((*first, name, *cells, last))
            first, last = ("", ""), ""
    return aligned_table(header, rows)
