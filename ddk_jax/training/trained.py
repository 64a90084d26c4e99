"""Trained models: the student of a run or a model directory, opened and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64, Int64

from ddk_jax.config import Config, DataConfig, EvalConfig, MeshConfig, load_config
from ddk_jax.data.shards import TOKENIZER
from ddk_jax.data.tokenize import Tokenizer, same_tokens
from ddk_jax.errors import UserError
from ddk_jax.losses.objective import Roles, make_term
from ddk_jax.models.decoder import Decoder
from ddk_jax.places import AnyPath, resolve_path, resolve_place
from ddk_jax.tasks.examples import read_tasks
from ddk_jax.tasks.scores import TaskScore, score_tasks
from ddk_jax.training.build import Job
from ddk_jax.training.checkpoint import read_latest
from ddk_jax.training.loaded import compute_dtype, load_model
from ddk_jax.training.rundir import is_run

# Parameters and rows are both cut over all devices: the most memory that there is, for any number.
_MESH = MeshConfig(data=1, fsdp=-1)
_LONGEST_ROW = 1024


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model with its parameters on the devices."""

    decoder: Decoder
    params: Any
    tokenizer: Path
    """Directory with its tokenizer.json."""
    config: Config | None
    """The config of the run that it is the student of."""
    step: int | None
    """Finished optimiser steps of that run."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How well a model predicts the validation text of every domain."""

    model: str
    data: str
    domains: tuple[str, ...]
    nats: Float64[np.ndarray, "D"]
    """Mean cross-entropy in nats per predicted token."""
    bits_per_byte: Float64[np.ndarray, "D"]
    """nats / ln 2 * tokens / bytes, both counted over the whole validation split; unlike nats, it
    compares models that have different tokenizers."""
    perplexity: Float64[np.ndarray, "D"]
    """exp(nats)."""
    tokens: Int64[np.ndarray, "D"]
    """Predicted tokens that the means are over."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a model stands to its teacher on the validation text of every domain."""

    model: str
    teacher: str
    data: str
    roles: Roles
    """Tokens that the means are over."""
    domains: tuple[str, ...]
    terms: dict[str, Float64[np.ndarray, "D"]]
    """Means over tokens: `cross_entropy` and `teacher_cross_entropy` on the labels, `forward_kl`,
    all in nats; `top_k_overlap`, the share of the teacher's 8 largest logits among the model's."""
    tokens: Int64[np.ndarray, "D"]


def open_model(path: str) -> TrainedModel:
    """Open a Hugging Face model, directory or hub id, or the newest student of a run directory.

    Raises:
      UserError: it is neither, or holds a model that is not supported.
      StorageError: a file is missing or damaged.
    """
    if is_run(place := resolve_place(path)):
        return load_student(place)
    dtype = compute_dtype("auto")
    mesh = Job(Config(mesh=_MESH)).mesh
    loaded = load_model(path, mesh, dtype=dtype, params_dtype=dtype)
    return TrainedModel(
        decoder=loaded.decoder,
        params=loaded.params,
        tokenizer=loaded.origin.tokenizer_dir(),
        config=None,
        step=None,
    )


def load_student(run_dir: AnyPath) -> TrainedModel:
    """The student of a run's newest good checkpoint, float32; changes nothing in the directory.

    Raises:
      UserError: the directory is not a run, or the run has saved no checkpoint yet.
      DataError: the run's prepared data, which names the vocabulary, is gone.
      StorageError: no checkpoint can be read.
    """
    if not is_run(run_dir):
        raise UserError(f"{run_dir}: not a run directory (no config.yaml)")
    config = load_config(run_dir / "config.yaml")
    job = Job(replace(config, mesh=_MESH))
    student = job.abstract_state().params["student"]
    restored = read_latest(run_dir / "checkpoints", student, under="params/student")
    if restored is None:
        raise UserError(f"{run_dir}: the run has not saved a checkpoint yet; wait for the first")
    return TrainedModel(
        decoder=job.student,
        params=job.start.merged(restored.state),
        tokenizer=resolve_path(config.data.dir) / TOKENIZER,
        config=config,
        step=restored.step,
    )


def measure_model(path: str, *, data: str = "", rows: int = 500, seq_len: int = 0) -> Measurement:
    """Measure a model on the validation split of prepared data.

    Args:
      path: as for `open_model`.
      data: directory of prepared data; empty: that of the run.
      rows: rows of each domain; 0: all of them.
      seq_len: tokens that a row predicts; 0: as in the run, or as many as the model has positions,
        at most 1024.

    Raises:
      UserError: see `open_model`; also no data, data of another tokenizer, or rows too long.
    """
    model = open_model(path)
    job = _measuring_job(path, model, data=data, rows=rows, seq_len=seq_len)
    result = job.measure(model.decoder, model.params)
    splits = [domain.validation for domain in job.manifest.domains]
    tokens_per_byte = np.array([split.tokens / max(split.bytes, 1) for split in splits])
    with np.errstate(over="ignore"):
        perplexity = np.exp(result.nats)
    return Measurement(
        model=path,
        data=job.config.data.dir,
        domains=job.domains,
        nats=result.nats,
        bits_per_byte=result.nats / math.log(2) * tokens_per_byte,
        perplexity=perplexity,
        tokens=result.tokens.astype(np.int64),
    )


def compare_models(
    path: str,
    teacher: str,
    *,
    data: str = "",
    rows: int = 500,
    seq_len: int = 0,
    roles: Roles = "all",
) -> Comparison:
    """Measure how a model stands to a teacher.

    Args:
      path: as for `open_model`.
      teacher: likewise.
      data: as for `measure_model`.
      rows: likewise.
      seq_len: likewise.
      roles: tokens that count.

    Raises:
      UserError: see `measure_model`; of both models.
    """
    model, other = open_model(path), open_model(teacher)
    job = _measuring_job(path, model, data=data, rows=rows, seq_len=seq_len)
    _check_tokens(teacher, other, job)
    names = ("cross_entropy", "teacher_cross_entropy", "forward_kl", "top_k_overlap")
    objective = tuple(make_term(name, roles=roles) for name in names)
    total, count = job.validation.compare(
        model.decoder, model.params, other.decoder, other.params, objective
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        means = total / count
    return Comparison(
        model=path,
        teacher=teacher,
        data=job.config.data.dir,
        roles=roles,
        domains=job.domains,
        terms=dict(zip(names, means, strict=True)),
        tokens=count[0].astype(np.int64),
    )


def score_model(
    path: str, tasks: Sequence[str], *, limit: int = 0, seed: int = 0, seq_len: int = 0
) -> tuple[TaskScore, ...]:
    """Score a model on tasks.

    Args:
      path: as for `open_model`.
      tasks: files, folders or globs, as for `read_tasks`.
      limit: examples of each task; 0: all of them.
      seed: draws the examples; the same seed draws the same ones for every model.
      seq_len: tokens of the longest input; 0: as in the run, or as many as the model has positions,
        at most 1024.

    Raises:
      UserError: see `open_model`; also a tokenizer with more tokens than the model has embeddings.
      DataError: a file is no task.
    """
    wanted = [task.sample(limit, seed) for task in read_tasks(tasks)]
    model = open_model(path)
    seq_len = _row_length(path, model, seq_len)
    tokenizer, spec = Tokenizer(model.tokenizer), model.decoder.spec
    if tokenizer.vocab_size > spec.vocab_size:
        raise UserError(
            f"{path} has {spec.vocab_size} embeddings, its tokenizer {tokenizer.vocab_size} tokens"
        )
    mesh = Job(Config(mesh=_MESH)).mesh
    return score_tasks(
        model.decoder, model.params, tokenizer, wanted, mesh=mesh, max_tokens=seq_len
    )


def _measuring_job(path: str, model: TrainedModel, *, data: str, rows: int, seq_len: int) -> Job:
    """What measures a model on prepared data."""
    run = model.config
    if not data and run is None:
        raise UserError(f"{path} is a model directory: name prepared data with --data")
    job = Job(
        Config(
            data=DataConfig(
                dir=data or (run.data.dir if run else ""),
                seq_len=_row_length(path, model, seq_len),
            ),
            evaluation=EvalConfig(rows_per_domain=rows, batch_rows=math.lcm(8, jax.device_count())),
            mesh=_MESH,
        )
    )
    _check_tokens(path, model, job)
    return job


def _row_length(path: str, model: TrainedModel, seq_len: int) -> int:
    """The wanted number of tokens, or that of the run, or what the model is made for."""
    longest = model.decoder.spec.max_positions
    if model.config is not None:
        return seq_len or model.config.data.seq_len
    if seq_len > longest:
        raise UserError(f"--seq-len {seq_len}: {path} is made for at most {longest} positions")
    return seq_len or min(longest, _LONGEST_ROW)


def _check_tokens(path: str, model: TrainedModel, job: Job) -> None:
    """Refuse data whose ids mean other text to the model."""
    data_dir = resolve_path(job.config.data.dir)
    if model.decoder.spec.vocab_size < job.manifest.tokenizer.vocab_size:
        raise UserError(
            f"{path} has {model.decoder.spec.vocab_size} embeddings, the tokenizer of {data_dir} "
            f"{job.manifest.tokenizer.vocab_size} tokens: prepare the data with the model's"
        )
    if (model.tokenizer / "tokenizer.json").is_file():
        ours, theirs = Tokenizer(model.tokenizer), Tokenizer(data_dir / TOKENIZER)
        if differences := same_tokens(ours, theirs):
            raise UserError(
                f"{path} and {data_dir} have different tokenizers: {'; '.join(differences)}"
            )
