"""What few seeds say: means, standard errors, paired differences with Student's t."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

LEVEL = 0.95
"""Confidence of the intervals."""
POWER = 0.8
"""Chance with which `Difference.detectable` would have been found."""


class Mean(NamedTuple):
    """A mean over seeds."""

    value: float
    error: float
    """Standard error; NaN from one seed."""
    seeds: int


class Difference(NamedTuple):
    """A method minus the reference, both with the same seeds."""

    value: float
    low: float
    """Lower end of the confidence interval; NaN from one seed, as `high` and `detectable`."""
    high: float
    """Upper end."""
    detectable: float
    """The smallest true difference that so many seeds, with this spread, would have shown."""
    seeds: int


def mean(values: Float64[np.ndarray, "seeds"]) -> Mean:
    """Mean and standard error; values that are NaN are left out."""
    values = values[~np.isnan(values)]
    count = values.size
    if not count:
        return Mean(math.nan, math.nan, 0)
    error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Mean(float(values.mean()), error, count)


def paired(
    values: Float64[np.ndarray, "seeds"], reference: Float64[np.ndarray, "seeds"]
) -> Difference:
    """The mean of the differences, its interval, and what the seeds could have shown.

    With the standard error s of n differences, the interval is the mean +- t(0.975, n - 1) s. A
    true difference d is found with a chance of about 80 % if d >= (t(0.975) + t(0.8)) s.

    Args:
      values: of the method, one for each seed; pairs with a NaN are left out.
      reference: of the reference, with the same seeds in the same order.
    """
    found = mean(values - reference)
    if found.seeds < 2:
        return Difference(found.value, math.nan, math.nan, math.nan, found.seeds)
    freedom = found.seeds - 1
    t = t_quantile((1 + LEVEL) / 2, freedom)
    reach = t * found.error
    detectable = (t + t_quantile(POWER, freedom)) * found.error
    return Difference(
        found.value, found.value - reach, found.value + reach, detectable, found.seeds
    )


def t_distribution(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom, in closed form.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    # cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ... or 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = math.sin(angle) * total
    return 0.5 + 0.5 * ((angle + inside) * 2 / math.pi if odd else inside)


def t_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t stays under with this probability, from 0.5 up."""
    high = 1.0
    while t_distribution(high, freedom) < probability:
        high *= 2
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        below = t_distribution(middle, freedom) < probability
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2
