"""Nats per token of a model on every domain's validation rows, and the teacher's, measured once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64

from ddk_jax.data.retokenise import Retokeniser
from ddk_jax.data.rows import DomainRows, HostBatch, predicted_tokens, validation_batches
from ddk_jax.losses.chunked import ChunkPlan
from ddk_jax.losses.objective import Objective
from ddk_jax.models.decoder import Decoder
from ddk_jax.parallel import processes
from ddk_jax.training.micro import Frozen, MicroLoss, Teachers
from ddk_jax.training.state import Batch, local_rows, place_batch
from ddk_jax.training.step import EvalStep, make_comparison_step, make_eval_step

_log = logging.getLogger(__name__)


class DomainNats(NamedTuple):
    """Mean cross-entropy of every domain."""

    nats: Float64[np.ndarray, "D"]
    """Nats per predicted token; NaN for a domain without tokens."""
    tokens: Float64[np.ndarray, "D"]
    """Predicted tokens that the mean is over."""


def measure(step: EvalStep, params: Any, batches: Iterable[Batch], num_domains: int) -> DomainNats:
    """Run `step` over all batches; float32 sums of a batch are added in float64."""
    total, count = np.zeros(num_domains), np.zeros(num_domains)
    for batch in batches:
        sums = jax.device_get(step(params, batch))
        total += sums.total
        count += sums.count
    nats = np.full(num_domains, np.nan)
    np.divide(total, count, out=nats, where=count > 0)
    return DomainNats(nats, count)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation rows of every domain, and what models make of them."""

    rows: Sequence[DomainRows]
    rows_per_domain: int
    """Rows that are taken of each domain; 0: all."""
    batch_rows: int
    mesh: Mesh
    plan: Callable[[int], ChunkPlan]
    """How the losses of models with so many columns are computed."""

    def nats(
        self, models: Teachers, params: tuple[Any, ...], tokens: Retokeniser | None = None
    ) -> DomainNats:
        """Mean cross-entropy of a model, or of a mixture, on the labels of every domain.

        Args:
          models: one or several.
          params: of every one.
          tokens: makes the rows of a model with tokens of its own. All its nats of a text are then
            divided by the tokens of ours, so that the result compares with that of other models.
        """
        mine = local_rows(self.mesh, self.batch_rows, self.batch_rows)
        batches = (self._placed(host, tokens) for host in self._batches(mine))
        found = measure(self._step(models, params, tokens), params, batches, len(self.rows))
        if tokens is None:
            return found
        ours = np.zeros(len(self.rows))
        for host in self._batches():
            ours += predicted_tokens(host, len(self.rows))
        return DomainNats(found.nats * found.tokens / ours, ours)

    def compare(
        self,
        student: Decoder,
        student_params: Any,
        teacher: Decoder,
        teacher_params: Any,
        terms: Objective,
    ) -> tuple[Float64[np.ndarray, "K D"], Float64[np.ndarray, "K D"]]:
        """Sums and counts of every term between two models."""
        loss = MicroLoss(
            student=student,
            teachers=Teachers((teacher,), np.ones((len(self.rows), 1))),
            objective=terms,
            plan=self.plan(max(student.spec.vocab_size, teacher.spec.vocab_size)),
            mesh=self.mesh,
        )
        step = make_comparison_step(loss, num_domains=len(self.rows))
        params, frozen = {"student": student_params, "objective": {}}, Frozen((teacher_params,))
        total, count = np.zeros((2, len(terms), len(self.rows)))
        for host in self._batches(local_rows(self.mesh, self.batch_rows, self.batch_rows)):
            sums = jax.device_get(step(params, frozen, self._placed(host, None)))
            total += sums.total
            count += sums.count
        return total, count

    def _batches(self, places: np.ndarray | None = None) -> Iterator[HostBatch]:
        for rows in self.rows:
            yield from validation_batches(rows, self.rows_per_domain, self.batch_rows, places)

    def _placed(self, host: HostBatch, tokens: Retokeniser | None) -> Batch:
        if tokens is not None and (made := tokens(host).teacher) is not None:
            role = np.minimum(made.segment_ids, 1)
            host = HostBatch(made.tokens, made.segment_ids, role, host.domain)
        return place_batch(self.mesh, self.batch_rows, *host)

    def _step(
        self, models: Teachers, params: tuple[Any, ...], tokens: Retokeniser | None
    ) -> EvalStep:
        if models.models not in self._steps:
            heads = [jax.eval_shape(m.head, p) for m, p in zip(models.models, params, strict=True)]
            plan = self.plan(max(head.kernel.shape[1] for head in heads))
            if tokens is not None:
                plan = replace(plan, vocab_size=tokens.theirs.vocab_size, teacher_vocab_size=0)
            self._steps[models.models] = make_eval_step(
                models, self.mesh, num_domains=len(self.rows), plan=plan
            )
        return self._steps[models.models]

    @cached_property
    def _steps(self) -> dict[tuple[Any, ...], EvalStep]:
        return {}


def cached(directory: Path, key: dict[str, Any], compute: Callable[[], DomainNats]) -> DomainNats:
    """`compute()`, or what an earlier call with the same key stored in `directory`.

    Teacher and validation rows are frozen, so all runs over one prepared corpus share the result.
    Of several processes the first one looks and stores; all or none of them compute.

    Args:
      directory: where results are kept, one JSON file each.
      key: JSON-able; everything that the result depends on.
      compute: makes the result when it is not there.
    """
    canonical = json.dumps(key, sort_keys=True)
    path = directory / f"{hashlib.sha256(canonical.encode()).hexdigest()[:16]}.json"
    if (stored := processes.from_first(lambda: _stored(path, canonical))) is not None:
        nats, tokens = (np.array(values, np.float64) for values in stored)
        return DomainNats(nats, tokens)
    result = compute()
    if np.all(np.isfinite(result.nats)) and processes.is_first():
        _store(path, {"key": key, "nats": result.nats.tolist(), "tokens": result.tokens.tolist()})
    return result


def _stored(path: Path, canonical: str) -> list[list[float]] | None:
    """Nats and tokens, if they are there."""
    try:
        stored = json.loads(path.read_text())
        # As text: a key's tuples come back from JSON as lists.
        if json.dumps(stored["key"], sort_keys=True) == canonical:
            return [np.array(stored[x], np.float64).tolist() for x in ("nats", "tokens")]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or torn: measure again
    return None


def _store(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(path)
    except OSError as error:  # a read-only corpus: the next run measures again
        _log.warning("%s: the measurement cannot be kept (%s)", path.parent, error.strerror)
