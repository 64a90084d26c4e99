"""The student of a run as a model directory that others can load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp

from ddk_jax.analysis import figures
from ddk_jax.analysis.drawing import png_bytes
from ddk_jax.analysis.runs import load_run
from ddk_jax.card import FIGURE, model_card
from ddk_jax.data.shards import read_manifest
from ddk_jax.models import hf
from ddk_jax.places import AnyPath, resolve_path
from ddk_jax.training.trained import load_student
from ddk_jax.training.transfer import TransferLine

_log = logging.getLogger(__name__)

Place = TypeVar("Place", str, Path)


def export_run(run_dir: AnyPath, out: Place, *, dtype: str = "float32") -> Place:
    """Write the student of a run's newest checkpoint as a Hugging Face model directory.

    The directory appears whole or not at all (in a bucket: SHA256SUMS last); an earlier export in
    its place is replaced.

    Args:
      run_dir: the run directory, or its place in a bucket; the prepared data that its config names
        must still be there.
      out: where to: a directory, or a place in a bucket such as `gs://bucket/student`.
      dtype: type of the written weights, `float32` or `bfloat16`.

    Returns:
      `out`.

    Raises:
      UserError: not a run, no checkpoint yet, or something else lies at `out`.
      StorageError: something cannot be read or written.
    """
    student = load_student(run_dir)
    config, spec = student.config, student.decoder.spec
    assert config is not None and student.step is not None
    record = load_run(run_dir)
    has_figure = len(record.weights) > 1 and len(record.steps) > 0
    card = model_card(
        config=config,
        step=student.step,
        spec=spec,
        manifest=read_manifest(resolve_path(config.data.dir)),
        record=record,
        has_figure=has_figure,
    )
    shown = {FIGURE: png_bytes(figures.mixture_weights([record]))} if has_figure else {}
    with TransferLine(str(out)) as line:
        hf.export(
            student.params,
            spec,
            out,
            tokenizer_dir=student.tokenizer,
            dtype=jnp.dtype(dtype),
            card=card,
            files=shown,
            progress=line.update,
        )
    _log.info("event=export step=%d dir=%s", student.step, out)
    return out
