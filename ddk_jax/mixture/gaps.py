"""How far the student is behind the teacher, domain by domain.

A gap is a function of two losses in nats per token that grows with the student's and falls with the
teacher's. It may be negative or under one: a student may be better than its teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64

Values = Float64[np.ndarray, "domains"]
"""One value for each domain."""

LARGEST_GAP = 1e100
"""Gaps saturate here, so that log weights, which add gaps up, stay finite."""


def ppl_ratio(student_nats: Values, teacher_nats: Values) -> Values:
    """Ratio of the perplexities: what the paper uses (rho; arXiv 2407.16154, equation 1)."""
    return np.exp(student_nats - teacher_nats)


def loss_difference(student_nats: Values, teacher_nats: Values) -> Values:
    """Difference of the losses: the logarithm of `ppl_ratio`, for students that are far behind."""
    return student_nats - teacher_nats


def loss_ratio(student_nats: Values, teacher_nats: Values) -> Values:
    """Ratio of the losses: weighs a nat more where the teacher's loss is small."""
    return student_nats / teacher_nats


GAPS: dict[str, Callable[[Values, Values], Values]] = {
    "ppl_ratio": ppl_ratio,
    "loss_difference": loss_difference,
    "loss_ratio": loss_ratio,
}
"""The gaps by the name that `mixture.gap` gives them."""


def measure(gap: str, student_nats: npt.ArrayLike, teacher_nats: npt.ArrayLike) -> Values:
    """Computes a gap for every domain that was measured.

    Args:
        gap: a key of `GAPS`.
        student_nats: [D] mean validation loss of the student, nats per token.
        teacher_nats: [D] the teacher's.

    Returns:
        [D] the gap, at most `LARGEST_GAP` in size; NaN where a loss is not finite (as that of a
        domain without tokens) or where the gap is not defined (0 / 0).

    Raises:
        ValueError: the two losses are not vectors of one length.
    """
    student = np.asarray(student_nats, np.float64)
    teacher = np.asarray(teacher_nats, np.float64)
    if student.ndim != 1 or student.shape != teacher.shape:
        raise ValueError(
            f"student_nats has shape {student.shape} and teacher_nats {teacher.shape}: "
            "both need one loss for each domain"
        )
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        values = GAPS[gap](student, teacher)
    values = np.clip(values, -LARGEST_GAP, LARGEST_GAP)
    return np.where(np.isfinite(student) & np.isfinite(teacher), values, np.nan)


def discrepancy(student_nats: npt.ArrayLike, teacher_nats: npt.ArrayLike) -> float:
    """Mean over the domains of student minus teacher, in nats per token.

    It is what `train.stop_discrepancy` bounds. Every domain counts the same, whatever its size;
    one without a finite measurement is left out. If all are, the result is NaN, which is under no
    threshold.
    """
    difference = measure("loss_difference", student_nats, teacher_nats)
    measured = difference[~np.isnan(difference)]
    return float(measured.mean()) if measured.size else float("nan")
