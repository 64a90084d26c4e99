"""Nats per token of a model on every domain's validation rows, and the teacher's, measured once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float64

from ddk_jax.training.state import Batch
from ddk_jax.training.step import EvalStep

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


def cached(directory: Path, key: dict[str, Any], compute: Callable[[], DomainNats]) -> DomainNats:
    """`compute()`, or what an earlier call with the same key stored in `directory`.

    Teacher and validation rows are frozen, so all runs over one prepared corpus share the result.

    Args:
      directory: where results are kept, one JSON file each.
      key: JSON-able; everything that the result depends on.
      compute: makes the result when it is not there.
    """
    canonical = json.dumps(key, sort_keys=True)
    path = directory / f"{hashlib.sha256(canonical.encode()).hexdigest()[:16]}.json"
    try:
        stored = json.loads(path.read_text())
        # As text: a key's tuples come back from JSON as lists.
        if json.dumps(stored["key"], sort_keys=True) == canonical:
            nats, tokens = (np.array(stored[x], np.float64) for x in ("nats", "tokens"))
            return DomainNats(nats, tokens)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or torn: measure again
    result = compute()
    if np.all(np.isfinite(result.nats)):
        stored = {"key": key, "nats": result.nats.tolist(), "tokens": result.tokens.tolist()}
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(stored, indent=1))
            partial.replace(path)
        except OSError as error:  # a read-only corpus: the next run measures again
            _log.warning("%s: the measurement cannot be kept (%s)", directory, error.strerror)
    return result
