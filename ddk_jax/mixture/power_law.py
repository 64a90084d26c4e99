"""A power law with a limit, fitted to a learning curve: deterministic, without an optimiser."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

Points = Float64[np.ndarray, "points"]

LARGEST_EXPONENT = 0.8
_SHARP = 1e-3
"""Relative errors above this count by their size, smaller ones by their square (Huber)."""
_EXPONENTS = 41
_REWEIGHTINGS = 12


class PowerLaw(NamedTuple):
    """`limit + reducible * (tokens / reference) ** -exponent`, in nats."""

    limit: float
    reducible: float
    """What is left to learn at `reference` tokens."""
    exponent: float
    reference: float

    def slope(self, tokens: float) -> float:
        """How fast the loss falls at so many tokens, in nats per token: not negative."""
        left = self.reducible * (tokens / self.reference) ** -self.exponent
        return self.exponent * left / tokens


def fit_power_law(tokens: Points, nats: Points, least_exponent: float = 0.0) -> PowerLaw:
    """The law with limit, reducible part and exponent not negative that fits best.

    For a given exponent the law is linear in its two other numbers, so that their best values,
    under Huber's loss of the relative error, follow from a few weighted least squares. The exponent
    is searched for on a grid, then on a finer one around the best.

    Args:
        tokens: positive.
        nats: positive.
        least_exponent: smallest exponent that is tried; the largest is `LARGEST_EXPONENT`.

    Raises:
        ValueError: fewer than three points, or one that is not positive and finite.
    """
    if tokens.size < 3 or nats.shape != tokens.shape:
        raise ValueError(f"a power law needs at least 3 points, got {tokens.size} and {nats.size}")
    if not all(np.all((x > 0) & np.isfinite(x)) for x in (tokens, nats)):
        raise ValueError("a power law is fitted to positive, finite tokens and nats")
    reference = float(tokens.max())
    low, high = least_exponent, LARGEST_EXPONENT
    for _ in range(2):
        exponents = np.linspace(low, high, _EXPONENTS)
        shape = (tokens / reference)[None, :] ** -exponents[:, None]
        limit, reducible, cost = _linear_fits(shape, nats)
        best = int(np.argmin(cost))
        low, high = (exponents[i] for i in (max(best - 1, 0), min(best + 1, _EXPONENTS - 1)))
    return PowerLaw(float(limit[best]), float(reducible[best]), float(exponents[best]), reference)


def _linear_fits(
    shape: Float64[np.ndarray, "exponents points"], nats: Points
) -> tuple[Float64[np.ndarray, "exponents"], ...]:
    """For every exponent the limit, the reducible part, and Huber's loss of the relative error."""
    base = np.broadcast_to(1.0 / nats, shape.shape)  # nats = limit + reducible * shape, relatively
    curve = shape / nats
    weights = np.ones_like(shape)
    limit = reducible = cost = np.zeros(len(shape))
    for _ in range(_REWEIGHTINGS):
        bb, bc, cc, b, c = (
            np.sum(weights * product, axis=1)
            for product in (base * base, base * curve, curve * curve, base, curve)
        )
        determinant = bb * cc - bc * bc
        with np.errstate(divide="ignore", invalid="ignore"):
            limit = (cc * b - bc * c) / determinant
            reducible = (bb * c - bc * b) / determinant
        # A constant curve says nothing about the reducible part, a negative number is not allowed.
        flat = (determinant <= 1e-12 * bb * cc) | ~(reducible > 0)
        to_zero = ~flat & ~(limit > 0)
        limit = np.where(flat, b / bb, np.where(to_zero, 0.0, limit))
        reducible = np.where(flat, 0.0, np.where(to_zero, c / cc, reducible))
        error = np.abs(limit[:, None] * base + reducible[:, None] * curve - 1.0)
        weights = _SHARP / np.maximum(error, _SHARP)
        huber = np.where(error > _SHARP, _SHARP * (error - 0.5 * _SHARP), 0.5 * error**2)
        cost = np.sum(huber, axis=1)
    return limit, reducible, cost
