"""How often a mixture goes through its domains: what to expect, and limits that it keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from ddk_jax.errors import DataError

REPEATS = 4.0
"""Epochs above which repeated text is worth less and less (arXiv 2305.16264)."""


def expected_epochs(
    weights: Float64[np.ndarray, " domains"], sizes: Int64[np.ndarray, " domains"], rows: int
) -> Float64[np.ndarray, " domains"]:
    """How often each domain is gone through in so many rows under constant weights."""
    return weights * rows / sizes


def shortages(
    names: Sequence[str],
    weights: Float64[np.ndarray, " domains"],
    sizes: Int64[np.ndarray, " domains"],
    rows: int,
) -> list[str]:
    """One sentence for each domain that is too small for its share of a run of so many rows."""
    epochs = expected_epochs(weights, sizes, rows)
    return [
        f"domain {name}: {size:,} rows are too few for {weight:.1%} of {rows:,}: it will be gone "
        f"through {times:.1f} times"
        for name, size, weight, times in zip(
            names, sizes.tolist(), weights.tolist(), epochs.tolist(), strict=True
        )
        if times > REPEATS
    ]


def within_limits(
    weights: Float64[np.ndarray, " domains"],
    drawn: Int64[np.ndarray, " domains"],
    sizes: Int64[np.ndarray, " domains"],
    max_epochs: Float64[np.ndarray, " domains"],
    rows: int,
) -> Float64[np.ndarray, " domains"]:
    """Weights under which the next rows take no domain past its limit.

    What a domain may not have goes to the others in proportion to their weights. Apply it to what a
    controller commands, every time it does, with the rows until the next time; the controller's own
    state stays as it is.

    Args:
        weights: commanded; they sum to 1.
        drawn: rows that each domain gave so far.
        sizes: rows of each domain.
        max_epochs: how often a domain may be gone through; 0: no limit.
        rows: rows for which the weights will hold.

    Raises:
        DataError: no domain with weight may give so many rows: the run has to end.
    """
    left = np.where(max_epochs > 0, np.floor(max_epochs * sizes) - drawn, np.inf)
    # A schedule may give a domain one row more than its share.
    most = np.maximum(left - 1, 0.0) / rows
    given = weights.astype(np.float64)
    full = np.zeros(given.size, bool)
    for _ in range(given.size):
        over = ~full & (given > most)
        if not over.any():
            return given
        full |= over
        rest, others = 1.0 - most[full].sum(), weights[~full].sum()
        if others <= 0.0:
            break
        given = np.where(full, most, weights * (rest / others))
    if full.all() or weights[~full].sum() <= 0.0:
        raise DataError(
            "every domain with weight is at its data.domains max_epochs: add text, raise a limit, "
            "or train for fewer steps"
        )
    return given
