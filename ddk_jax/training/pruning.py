"""A student cut from its teacher: measured on prepared data, written as a model directory."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jaxtyping import Float64

from ddk_jax import __version__
from ddk_jax.card import model_name
from ddk_jax.config import Config, DataConfig, EvalConfig, MeshConfig, TeacherConfig
from ddk_jax.data.rows import predicted_tokens
from ddk_jax.data.shards import TOKENIZER
from ddk_jax.errors import UserError
from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder, num_parameters
from ddk_jax.models.hub import resolve
from ddk_jax.models.prune import Kept, Size, choose, first, nearest_size, prune
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.mesh import param_shardings
from ddk_jax.places import resolve_path
from ddk_jax.training.build import Job
from ddk_jax.training.importance import Method, measure_importance, sampled_batches
from ddk_jax.training.state import place_batch

_log = logging.getLogger(__name__)

_LONGEST_ROW = 512

Choice: TypeAlias = Method | Literal["first"]
"""What parts are chosen by; `first` takes the first ones of everything."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What was cut, and what it did."""

    teacher: str
    out: str
    method: str
    spec: ModelSpec
    """Of the student."""
    teacher_spec: ModelSpec
    kept: Kept
    """The parts of the teacher that the student has."""
    tokens: int
    """That the importance was measured on; 0 with `first`."""
    domains: tuple[str, ...]
    teacher_nats: Float64[np.ndarray, "D"]
    """Mean cross-entropy on validation rows of every domain, nats per token."""
    nats: Float64[np.ndarray, "D"]
    """The student's, before any training."""

    @property
    def sizes(self) -> list[tuple[str, int, int]]:
        """What there is of everything in the teacher, and in the student."""
        counts = (
            ("layers", lambda spec: spec.num_layers),
            ("hidden width", lambda spec: spec.hidden_size),
            ("query heads", lambda spec: spec.num_heads),
            ("key/value heads", lambda spec: spec.num_kv_heads),
            ("inner width of an MLP", lambda spec: spec.ffn_size),
            ("parameters", num_parameters),
        )
        return [(name, count(self.teacher_spec), count(self.spec)) for name, count in counts]


def prune_model(
    teacher: str,
    out: str | Path,
    *,
    data: str,
    size: Size,
    method: Choice = "activation",
    rows: int = 16,
    seq_len: int = 0,
    seed: int = 0,
    dtype: str = "float32",
) -> Pruned:
    """Cut a student from a teacher by what matters on data, and write it as a model directory.

    Args:
      teacher: Hugging Face model directory, or hub id.
      out: where to; an earlier export in its place is replaced.
      data: directory of prepared data. Training rows say what matters, validation rows what the cut
        has cost.
      size: what is to be left; the hidden width becomes the nearest one that files of the family
        can express, which is said.
      method: see `measure_importance`; or `first`.
      rows: rows of each domain, of both kinds.
      seq_len: tokens that a row predicts; 0: as many as the model allows, at most 512.
      seed: draws the training rows.
      dtype: type of the written weights, `float32` or `bfloat16`.

    Raises:
      UserError: more is to be left than there is, the teacher is no supported model, its tokenizer
        is not the data's, or something else lies at `out`.
      DataError: there is no sound prepared data.
      StorageError: something cannot be read or written.
    """
    if rows < 1:
        raise UserError(f"--rows {rows}: needs at least 1")
    origin = resolve(teacher)
    spec = hf.read_spec(origin.directory)
    if seq_len > spec.max_positions:
        raise UserError(
            f"--seq-len {seq_len}: {teacher} is made for at most {spec.max_positions} positions"
        )
    found = nearest_size(spec, size)
    if found.hidden != (size.hidden or spec.hidden_size):
        _log.warning(
            "hidden %d is not possible with %d heads in a model of the family %s: %d is taken",
            size.hidden or spec.hidden_size,
            (found.groups or spec.num_kv_heads) * (spec.num_heads // spec.num_kv_heads),
            spec.family,
            found.hidden,
        )
    job = _job(teacher, data, rows, seq_len or min(spec.max_positions, _LONGEST_ROW))
    (model,) = job.teachers.loaded
    importance, tokens = first(spec), 0
    if method != "first":
        batches = list(
            sampled_batches(job.train_rows, rows, job.config.evaluation.batch_rows, seed)
        )
        tokens = sum(int(predicted_tokens(batch, len(job.domains)).sum()) for batch in batches)
        importance = measure_importance(
            model.decoder,
            model.params,
            (place_batch(job.mesh, len(batch.domain), *batch) for batch in batches),
            method=method,
            mesh=job.mesh,
            plan=job.validation.plan(spec.vocab_size),
        )
    kept = choose(importance, found)
    params, made = prune(model.params, spec, kept)
    result = Pruned(
        teacher=model_name(teacher),
        out=str(out),
        method=method,
        spec=made,
        teacher_spec=spec,
        kept=kept,
        tokens=tokens,
        domains=job.domains,
        teacher_nats=job.measure(model.decoder, model.params).nats,
        nats=_nats(job, replace(model.decoder, spec=made), params),
    )
    tokenizer = origin.tokenizer_dir()
    if not (tokenizer / "tokenizer.json").is_file():
        tokenizer = resolve_path(data) / TOKENIZER
    hf.export(
        params,
        made,
        out,
        tokenizer_dir=tokenizer,
        dtype=jnp.dtype(dtype),
        card=pruned_card(result),
    )
    return result


def _job(teacher: str, data: str, rows: int, seq_len: int) -> Job:
    """What reads the teacher and the data, and measures."""
    return Job(
        Config(
            data=DataConfig(dir=data, seq_len=seq_len),
            teacher=TeacherConfig(path=teacher, dtype="float32"),
            evaluation=EvalConfig(rows_per_domain=rows, batch_rows=math.lcm(4, jax.device_count())),
            mesh=MeshConfig(data=1, fsdp=-1),
        )
    )


def _nats(job: Job, decoder: Decoder, params: Any) -> Float64[np.ndarray, "D"]:
    shardings = param_shardings(job.mesh, decoder.logical_axes(), decoder.abstract())
    return job.measure(decoder, jax.device_put(params, shardings)).nats


_FRONT = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["ddk_jax", "pruning"],
}


def pruned_card(result: Pruned) -> str:
    """The text of README.md, with the metadata that the Hugging Face hub reads."""
    _, before, after = result.sizes[-1]
    by = {
        "gradient": "the gradients of the loss by their masks",
        "activation": "the squares of what they pass on",
        "first": "their numbers, the first ones",
    }[result.method]
    measured = f", measured on {result.tokens:,} tokens" if result.tokens else ""
    layers = ", ".join(map(str, result.kept.layers))
    rows = [f"| {name} | {old:,} | {new:,} |" for name, old, new in result.sizes]
    table = "\n".join(["| | teacher | student |", "| --- | --- | --- |", *rows])
    return f"""---
{yaml.safe_dump(_FRONT, sort_keys=False)}---

# Cut from {result.teacher}

A {result.spec.family} model of {after:,} parameters, cut from {result.teacher}
({before:,}) with ddk_jax {__version__}. It has not been trained since: it is where a
distillation starts, not a model to use.

{table}

Hidden dimensions, heads and neurons were chosen by {by}{measured}.
Layers {layers} of the teacher are left, counted from 0. On validation text
({", ".join(result.domains)}) the loss is {np.mean(result.nats):.3f} nats per token, the teacher's
{np.mean(result.teacher_nats):.3f}.
"""
