"""The corpus of a run, prepared with the tokenizer of its models."""

from __future__ import annotations

from dataclasses import replace

from ddk_jax.config import Config
from ddk_jax.data.prepare import Progress, prepare
from ddk_jax.data.shards import Manifest
from ddk_jax.errors import UserError
from ddk_jax.models.hub import resolve


def prepare_corpus(config: Config, *, progress: Progress, workers: int = 1) -> Manifest:
    """Tokenise what the config's `data` names, unless it is there already.

    Where `data.tokenizer` is empty, the teacher's is taken, or the student's without a teacher.

    Args:
      config: of the run; of its models, no more than the tokenizer is read.
      progress: called with lines of text that say how far it is.
      workers: see `data.prepare.prepare`.

    Raises:
      UserError, DataError: see `data.prepare.prepare`; also when nothing names a tokenizer.
    """
    data = config.data
    if not data.tokenizer:
        model = config.teacher if config.teacher.path else config.student
        if not model.path:
            raise UserError("data.tokenizer: name a directory with tokenizer.json, or a teacher")
        found = resolve(model.path, model.revision).tokenizer_dir()
        data = replace(data, tokenizer=str(found))
    return prepare(data, progress=progress, workers=workers)
