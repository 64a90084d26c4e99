"""DDK's equations 1 and 2, and its ablations.

Source: DDK, arXiv 2407.16154, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ddk_jax.mixture.controller import (
    Controller,
    Memory,
    Moment,
    Observation,
    check,
    normalised,
    with_uniform,
)
from ddk_jax.mixture.gaps import GAPS, Values


def equation_1(gap: Values) -> Values:
    """Log weights that are proportional to exp(gap). Without a floor: gaps in the tens are one-hot.

    Args:
        gap: [n] finite gaps.

    Returns:
        [n] log weights of sum 1.
    """
    return normalised(gap)


def equation_2(log_weights: Values, gap: Values, alpha: float) -> Values:
    """The factor smooth update: weights times exp(gap), mixed with the uniform distribution.

    Args:
        log_weights: [n] current log weights.
        gap: [n] finite gaps.
        alpha: share of the measured part, from 0 to 1.

    Returns:
        [n] log weights of sum 1, each weight at least `(1 - alpha) / n`.
    """
    return with_uniform(normalised(log_weights + gap), 1.0 - alpha)


@dataclass(frozen=True, kw_only=True)
class FollowsGap(Controller):
    """A controller for which the gap can be chosen."""

    gap: str = "ppl_ratio"
    """`ppl_ratio` (the paper), `loss_difference` or `loss_ratio`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.gap in GAPS, self, "gap", f"must be one of {', '.join(GAPS)}")

    @property
    def gap_kind(self) -> str:
        """The chosen gap."""
        return self.gap


@dataclass(frozen=True, kw_only=True)
class DDK(FollowsGap):
    """The paper's controller: equation 1 once, then equation 2, which is cumulative.

    Equation 1 has no floor. From the first equation 2 on, every domain of N keeps at least
    `(1 - alpha) / N`.
    """

    name: ClassVar[str] = "ddk"

    alpha: float = 0.5
    """Share of the measured weights in equation 2, from 0 to 1; the rest is uniform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0.0 <= self.alpha <= 1.0, self, "alpha", "must be from 0 to 1")

    def redistribute(
        self, log_weights: Values, signal: Values, memory: Memory, moment: Moment
    ) -> tuple[Values, Memory]:
        """Equation 1 at the first update, then equation 2."""
        if moment.first:
            return equation_1(signal), {}
        return equation_2(log_weights, signal, self.alpha), {}


@dataclass(frozen=True, kw_only=True)
class DDKWithoutSmoothing(FollowsGap):
    """The paper's ablation "w/o FS": equation 1 afresh at every measurement."""

    name: ClassVar[str] = "ddk_without_smoothing"

    def redistribute(
        self, log_weights: Values, signal: Values, memory: Memory, moment: Moment
    ) -> tuple[Values, Memory]:
        """Equation 1; what the weights were does not matter."""
        return equation_1(signal), {}


@dataclass(frozen=True, kw_only=True)
class Static(FollowsGap):
    """The prior for ever. With a uniform prior this is the paper's ablation "ES".

    Gaps are measured for the record only.
    """

    name: ClassVar[str] = "static"

    @property
    def needs(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def signal(self, seen: Observation) -> Values:
        """0: there is nothing to follow."""
        return np.zeros(seen.student_nats.shape)

    def redistribute(
        self, log_weights: Values, signal: Values, memory: Memory, moment: Moment
    ) -> tuple[Values, Memory]:
        """The same weights, bit by bit."""
        return log_weights, {}
