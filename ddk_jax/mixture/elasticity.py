"""Shares by what a domain's tokens still do for its gap; `docs/mixture.md` has the derivation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float64

from ddk_jax.mixture.controller import (
    Controller,
    Memory,
    Moment,
    Observation,
    check,
    normalised,
    with_uniform,
)
from ddk_jax.mixture.gaps import Values, measure

KEPT = (1.0, 0.9, 0.8, 0.6)
"""Candidates for the share of what was learned of a domain that is left an interval later."""
START_INTERVALS = (10.0, 10.0, 5.0, 2.5)
"""How many intervals of the prior the student starts with: the steady states, 1 / (1 - kept)."""
MOST = 10.0
"""An elasticity counts as at most this many times the common one, and at least its inverse."""
CONFIDENCE = 2.0
"""Standard deviations that have to be exceeded before noise is no explanation."""
SMALLEST = 1e-6
"""A gap counts as at least this share of the largest."""

History = Float64[np.ndarray, "times domains"]


class Slopes(NamedTuple):
    """How gaps fall with the logarithm of the tokens that are remembered, by least squares."""

    falls: Values
    """Nats per factor e of the domain's own tokens."""
    spread: Values
    """Sum of the squared deviations of the logarithms; 0 where they did not move."""
    squares: float
    """Sum of the squared residuals, less what all domains have in common at a time."""


@dataclass(frozen=True, kw_only=True)
class Elasticity(Controller):
    """Ours: shares proportional to gap^power times its elasticity in the domain's own tokens.

    The elasticity -dlog(gap) / dlog(tokens) is estimated from the last `window` measurements: how
    the gap moved when the domain was drawn more, or less. A domain whose gap is large but does not
    answer to its tokens gets little; one that has answered well gets more. Estimates are shrunk
    towards the common elasticity as far as noise can explain their differences, so that without
    evidence the shares are proportional to gap^power. The gap is the difference of the losses.
    """

    name: ClassVar[str] = "elasticity"

    power: float = 2.0
    """What is minimised is the mean of gap^power: 1 the mean gap, 2 the mean square; the larger,
    the more the worst domain counts."""
    rate: float = 0.5
    """How far an update goes to its target, in log weights: over 0, at most 1."""
    floor: float = 0.2
    """Share of the uniform distribution: every domain of N keeps at least `floor / N`."""
    window: int = 12
    """Measurements that the elasticities are estimated from; at least 3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1.0 <= self.power <= 100.0, self, "power", "must be from 1 to 100")
        check(0.0 < self.rate <= 1.0, self, "rate", "must be over 0 and at most 1")
        check(0.0 <= self.floor <= 1.0, self, "floor", "must be from 0 to 1")
        check(self.window >= 3, self, "window", "needs at least 3 measurements")

    def remember(self, memory: Memory, seen: Observation, weights: Values) -> Memory:
        """The last gaps [m, D] and the logarithms of the tokens remembered then [m, kept, D]."""
        gap = measure(self.gap_kind, seen.student_nats, seen.teacher_nats)[None]
        if not memory:
            start = np.log(np.multiply.outer(START_INTERVALS, np.maximum(weights, 1e-12)))
            return {"gap": gap, "log_tokens": start[None], "tokens": seen.tokens}
        drawn = seen.tokens - memory["tokens"]
        log_tokens = memory["log_tokens"][-1]
        if (total := drawn.sum()) > 0:  # counted in intervals, whatever their length
            kept = np.exp(log_tokens) * np.array(KEPT)[:, None]
            log_tokens = np.log(np.maximum(kept + drawn / total, 1e-12))
        rows = {"gap": gap, "log_tokens": log_tokens[None]}
        return {
            name: np.concatenate([memory[name], row])[-self.window :] for name, row in rows.items()
        } | {"tokens": seen.tokens}

    def redistribute(
        self, log_weights: Values, signal: Values, memory: Memory, moment: Moment
    ) -> tuple[Values, Memory]:
        """Goes from the weights towards the shares that the estimates make optimal."""
        largest = signal.max()
        if largest <= 0:  # level with the teacher everywhere
            return log_weights, {}
        level = np.maximum(signal / largest, SMALLEST)
        relative = relative_elasticities(signal, memory["gap"], memory["log_tokens"])
        target = normalised(self.power * np.log(level) + np.log(relative))
        moved = normalised((1 - self.rate) * log_weights + self.rate * target)
        return with_uniform(moved, self.floor), {}


def relative_elasticities(
    gap: Values,
    gaps: History,
    log_tokens: Float64[np.ndarray, "times kept domains"],
) -> Values:
    """Elasticity of every gap over the common one, shrunk to 1 as far as noise can explain it.

    Of the candidates for how fast a student forgets, the one that explains the history best is
    taken, where more tokens of a domain may not explain a larger gap of it.

    Args:
        gap: [n] now; one is positive.
        gaps: [m, n] the last ones, the present ones included; a time with a NaN does not count.
        log_tokens: [m, kept, n] logarithms of the tokens remembered at those times.

    Returns:
        [n] from `1 / MOST` to `MOST`; 1 while nothing can be told.
    """
    known = ~np.isnan(gaps).any(axis=1)
    times, domains = int(known.sum()), gap.size
    nothing = np.ones(domains)
    if times < 3 or domains < 2:
        return nothing
    scale = np.abs(gaps[known]).max()
    fits = [
        _slopes(gaps[known] / scale, log_tokens[known][:, i]) for i in range(log_tokens.shape[1])
    ]
    best = fits[int(np.argmin([fit.squares for fit in fits]))]
    level = np.maximum(gap / scale, SMALLEST * gap.max() / scale)
    # Of a slope with the standard error s, the elasticity slope / gap has s / gap.
    noise = best.squares / ((times - 2) * (domains - 1))
    precision = level**2 * best.spread  # times the noise
    whole = precision.sum()
    if not whole > 0:
        return nothing
    elasticity = best.falls / level
    common = float(precision @ elasticity) / whole
    # How much they differ: DerSimonian and Laird's estimate (1986), less what chance may add. Noise
    # alone gives a chi-squared sum, of mean n - 1 and standard deviation sqrt(2 (n - 1)).
    chance = domains - 1 + CONFIDENCE * math.sqrt(2 * (domains - 1))
    beyond = float(precision @ (elasticity - common) ** 2) - chance * noise
    divisor = whole - float(precision @ precision) / whole
    variance = max(0.0, beyond / divisor) if divisor > 0 else 0.0
    signal = variance * precision
    trust = np.divide(signal, signal + noise, out=np.zeros(domains), where=signal > 0)
    shrunk = common + trust * (elasticity - common)
    # Where no gap answers beyond the noise, the ratio is 1 and not that of two accidents.
    unsure = CONFIDENCE * math.sqrt(noise / whole)
    base = max(common, 0.0) + unsure
    return np.clip((shrunk + unsure) / base, 1 / MOST, MOST) if base > 0 else nothing


def _slopes(gaps: History, log_tokens: History) -> Slopes:
    """Regresses every gap on the logarithm of its domain's tokens."""
    x, y = log_tokens - log_tokens.mean(axis=0), gaps - gaps.mean(axis=0)
    spread = (x * x).sum(axis=0)
    falls = np.zeros_like(spread)
    np.divide(-(x * y).sum(axis=0), spread, out=falls, where=spread > 0)
    rest = y + x * np.maximum(falls, 0.0)
    rest = rest - rest.mean(axis=1, keepdims=True)
    return Slopes(falls, spread, float((rest * rest).sum()))
