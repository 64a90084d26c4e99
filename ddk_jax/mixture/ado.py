"""Adaptive data optimisation: shares by how fast a scaling law says that a domain is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ddk_jax.mixture.controller import (
    FollowsTraining,
    Memory,
    Moment,
    Observation,
    bounded,
    check,
)
from ddk_jax.mixture.gaps import Values
from ddk_jax.mixture.power_law import fit_power_law

LEAST_EXPONENT = 0.05
LEAST_SHARE = 0.01
NEWEST = 0.1
"""Share of the newest preference in the weights; the rest is the average of all."""
SMALLEST_NATS = 1e-9
"""A loss under this has nothing left to fall."""
POINTS = 4
"""Measurements before the first fit."""


@dataclass(frozen=True, kw_only=True)
class ADO(FollowsTraining):
    """ADO: a scaling law for every domain, fitted to the losses of the training batches.

    With n training tokens so far, of all domains, the law L(n) = E + A n^-b is fitted to the mean
    losses of the intervals. Then, for a domain with the share p in the prior and the share h in the
    last interval,

        preference ~ p * sqrt(h) * max(b, 0.05) (L(n) - E) / n,   at least 0.01
        weights    = 0.9 * average + 0.1 * preference
        average    = mean of the prior and of all preferences, over the updates

    `mixture.prior: natural` is the paper's. Where ours differs: one point for each interval takes
    the place of smoothed losses of single steps, h of the last interval that of a moving average
    over ten steps, and E has no lower bound (the authors' is 1.65 nats, more than code has).

    Source: arXiv 2410.11820 and the authors' code, which has sqrt(h (1 - h)).
    """

    name: ClassVar[str] = "ado"

    skip_intervals: int = 1
    """First intervals whose losses are not fitted: the law does not hold while training starts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.skip_intervals >= 0, self, "skip_intervals", "must not be negative")

    def remember(self, memory: Memory, seen: Observation, weights: Values) -> Memory:
        """Losses [m, D], tokens of all domains in the middle of their intervals [m, D], shares."""
        if not memory:
            return {"prior": weights, "average": weights, "tokens": seen.tokens, "share": weights}
        drawn = seen.tokens - memory["tokens"]
        total = drawn.sum()
        if total <= 0:
            return memory
        middle = np.full(drawn.shape, memory["tokens"].sum() + total / 2)
        points = {"nats": bounded(seen.training_nats), "middle": middle}
        grown = {
            name: np.vstack([memory[name], values]) if name in memory else values[None]
            for name, values in points.items()
        }
        return memory | grown | {"tokens": seen.tokens, "share": drawn / total}

    def redistribute(
        self, log_weights: Values, signal: Values, memory: Memory, moment: Moment
    ) -> tuple[Values, Memory]:
        """Fits the laws, prefers what falls fastest, and averages."""
        slopes = self._slopes(memory)
        preference = memory["prior"] * np.sqrt(memory["share"]) * slopes
        if not preference.sum() > 0:
            return log_weights, {}
        preference = np.maximum(preference / preference.sum(), LEAST_SHARE)
        preference = preference / preference.sum()
        held = memory["average"].sum()  # less than 1 where some domains have no signal
        average = memory["average"] / held
        weights = (1 - NEWEST) * average + NEWEST * preference
        average = average + (preference - average) / (moment.updates + 1)
        return np.log(weights / weights.sum()), {"average": average * held}

    def _slopes(self, memory: Memory) -> Values:
        """[n] how fast each loss falls, per token of all domains; 0 while there is too little."""
        none = np.zeros(memory["prior"].shape)
        if "nats" not in memory:
            return none
        nats, middle = (memory[name][self.skip_intervals :] for name in ("nats", "middle"))
        known = np.all(nats > SMALLEST_NATS, axis=1)  # not NaN
        if known.sum() < POINTS:
            return none
        tokens, now = middle[known, 0], float(middle[-1, 0])
        laws = [fit_power_law(tokens, column, LEAST_EXPONENT) for column in nats[known].T]
        return np.array([law.slope(now) for law in laws])
