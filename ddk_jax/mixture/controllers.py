"""From the measured gaps to the weights of the domains: DDK's equations 1 and 2, and its ablations.

A controller is a frozen value without memory; what it learned is in a `ControllerState`, which a
checkpoint holds as JSON. All arithmetic is float64 on log weights: a weight that is 0 in linear
space is still there for the next update.

What all controllers share:

- The first `warmup_intervals` intervals keep the prior. `update` is called once before the first
  step and then at the end of each interval, so this is that many calls.
- A domain whose gap could not be measured (a loss that is not finite, no validation tokens) keeps
  its weight. The measured domains share what they had together, by the same equation among
  themselves; in equation 2 the uniform part, too, is a part of that share. If none was measured,
  nothing changes.

Source: DDK, arXiv 2407.16154, section 3.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ddk_jax.mixture.gaps import GAPS, Values, measure

SATURATED_GAP = 20.0
"""A larger gap makes equation 1 one-hot: exp(20) is 5e8."""


@dataclass(frozen=True, kw_only=True)
class ControllerState:
    """The weights and where they come from. Plain Python values, all floats finite."""

    log_weights: tuple[float, ...]
    """[D] natural logarithms of the weights, which sum to 1."""
    updates: int = 0
    """Calls of `Controller.update` so far."""
    gap: tuple[float | None, ...] | None = None
    """[D] the last gap; None for a domain that could not be measured, and before any update."""

    @property
    def unmeasured(self) -> tuple[int, ...]:
        """Domains that kept their weight in the last update because their gap was not finite."""
        return tuple(i for i, value in enumerate(self.gap or ()) if value is None)

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-able values; `from_json` gives it back bit by bit."""
        return {
            "log_weights": list(self.log_weights),
            "updates": self.updates,
            "gap": None if self.gap is None else list(self.gap),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ControllerState:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: the values are not a controller's state.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(f"a controller state has {sorted(names)}, not {sorted(values)}")
        log_weights = tuple(float(value) for value in values["log_weights"])
        if not log_weights or not all(map(math.isfinite, log_weights)):
            raise ValueError(f"log_weights of a controller state must be finite: {log_weights}")
        gap = values["gap"]
        if gap is not None and len(gap) != len(log_weights):
            raise ValueError(f"a controller state has {len(log_weights)} weights, {len(gap)} gaps")
        return cls(
            log_weights=log_weights,
            updates=int(values["updates"]),
            gap=None if gap is None else tuple(None if v is None else float(v) for v in gap),
        )


def equation_1(gap: Values) -> Values:
    """Log weights that are proportional to exp(gap). Without a floor: gaps in the tens are one-hot.

    Args:
        gap: [n] finite gaps.

    Returns:
        [n] log weights of sum 1.
    """
    # Shifted first, so that a large normaliser does not swallow small differences.
    shifted = gap - gap.max()
    return shifted - _log_sum(shifted)


def equation_2(log_weights: Values, gap: Values, alpha: float) -> Values:
    """The factor smooth update: weights times exp(gap), mixed with the uniform distribution.

    Args:
        log_weights: [n] current log weights.
        gap: [n] finite gaps.
        alpha: share of the measured part, from 0 to 1.

    Returns:
        [n] log weights of sum 1, each weight at least `(1 - alpha) / n`.
    """
    with np.errstate(divide="ignore"):  # log 0 where alpha is 0 or 1: that part vanishes
        log_measured, log_uniform = np.log(alpha), np.log1p(-alpha) - math.log(gap.size)
    return np.logaddexp(log_measured + equation_1(log_weights + gap), log_uniform)


@dataclass(frozen=True, kw_only=True)
class Controller(abc.ABC):
    """Turns measurements into weights. A subclass says how, once the warm-up is over."""

    name: ClassVar[str]
    """Name in `CONTROLLERS`, in the configuration and in the metrics."""

    gap: str = "ppl_ratio"
    """Key of `gaps.GAPS`."""
    alpha: float = 0.5
    """Share of the measured weights in equation 2, from 0 to 1; the rest is uniform."""
    warmup_intervals: int = 0
    """Intervals that keep the prior."""

    def __post_init__(self) -> None:
        if self.gap not in GAPS:
            raise ValueError(f"mixture.gap = {self.gap!r}: must be one of {', '.join(GAPS)}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"mixture.alpha = {self.alpha}: must be from 0 to 1")
        if self.warmup_intervals < 0:
            raise ValueError(
                f"mixture.warmup_intervals = {self.warmup_intervals}: must not be negative"
            )

    @abc.abstractmethod
    def redistribute(self, log_weights: Values, gap: Values, first: bool) -> Values:
        """Computes the next log weights.

        Args:
            log_weights: [D] the current ones.
            gap: [D] the measured gaps, NaN where there is none.
            first: whether this is the first update after the warm-up.

        Returns:
            [D] finite log weights of the same sum in linear space.
        """

    def init(self, prior: npt.ArrayLike) -> ControllerState:
        """The state before any measurement.

        Args:
            prior: [D] positive weights in any scale, such as the domains' numbers of tokens.

        Raises:
            ValueError: a weight is not positive, or there is none.
        """
        weights = np.asarray(prior, np.float64)
        if weights.ndim != 1 or not weights.size:
            raise ValueError(f"prior has shape {weights.shape}: needs one weight for each domain")
        if not np.all((weights > 0) & np.isfinite(weights)):
            raise ValueError(
                f"prior = {weights.tolist()}: every domain needs a positive weight; "
                "leave out the domains that have no training tokens"
            )
        log_weights = np.log(weights)
        return ControllerState(log_weights=tuple((log_weights - _log_sum(log_weights)).tolist()))

    def weights(self, state: ControllerState) -> Values:
        """[D] the weights in linear space: not negative, of sum 1."""
        log_weights = np.array(state.log_weights)
        return np.exp(log_weights - _log_sum(log_weights))

    def update(
        self, state: ControllerState, student_nats: npt.ArrayLike, teacher_nats: npt.ArrayLike
    ) -> ControllerState:
        """Takes a measurement in. Pure: equal arguments give equal results, bit by bit.

        Args:
            state: what `init` or the update before returned.
            student_nats: [D] validation loss of the student, nats per token; NaN if unknown.
            teacher_nats: [D] the teacher's.

        Returns:
            The next state; its `unmeasured` lists the domains that the caller should warn of.

        Raises:
            ValueError: the losses are not one for each domain of the state.
        """
        log_weights = np.array(state.log_weights)
        gap = measure(self.gap, student_nats, teacher_nats)
        if gap.shape != log_weights.shape:
            raise ValueError(f"{gap.size} losses were measured for {log_weights.size} domains")
        if state.updates >= self.warmup_intervals:
            first = state.updates == self.warmup_intervals
            log_weights = self.redistribute(log_weights, gap, first)
        return ControllerState(
            log_weights=tuple(log_weights.tolist()),
            updates=state.updates + 1,
            gap=tuple(None if math.isnan(value) else value for value in gap.tolist()),
        )


@dataclass(frozen=True, kw_only=True)
class DDK(Controller):
    """The paper's controller: equation 1 once, then equation 2, which is cumulative.

    Equation 1 has no floor. From the first equation 2 on, every domain of N keeps at least
    `(1 - alpha) / N`.
    """

    name: ClassVar[str] = "ddk"

    def redistribute(self, log_weights: Values, gap: Values, first: bool) -> Values:
        """Equation 1 (`first`) or equation 2."""
        if first:
            return _among_measured(log_weights, gap, lambda _, gap: equation_1(gap))
        return _among_measured(
            log_weights, gap, lambda log_weights, gap: equation_2(log_weights, gap, self.alpha)
        )


@dataclass(frozen=True, kw_only=True)
class DDKWithoutSmoothing(Controller):
    """The paper's ablation "w/o FS": equation 1 afresh at every measurement."""

    name: ClassVar[str] = "ddk_without_smoothing"

    def redistribute(self, log_weights: Values, gap: Values, first: bool) -> Values:
        """Equation 1; what the weights were does not matter."""
        return _among_measured(log_weights, gap, lambda _, gap: equation_1(gap))


@dataclass(frozen=True, kw_only=True)
class Static(Controller):
    """The prior for ever. With a uniform prior this is the paper's ablation "ES".

    Gaps are measured for the record only.
    """

    name: ClassVar[str] = "static"

    def redistribute(self, log_weights: Values, gap: Values, first: bool) -> Values:
        """The same weights, bit by bit."""
        return log_weights


CONTROLLERS: dict[str, type[Controller]] = {
    controller.name: controller for controller in (DDK, DDKWithoutSmoothing, Static)
}
"""The controllers by the name that `mixture.controller` gives them."""


def advice(
    controller: Controller,
    state: ControllerState,
    domains: Sequence[str],
    rows_per_interval: int,
) -> str | None:
    """What to tell the user about weights that the gaps have driven to an extreme, if they have.

    Args:
        controller: the one that made the state.
        state: the state after an update.
        domains: [D] their names.
        rows_per_interval: training rows between two updates.

    Returns:
        One line that names the settings to change; None while the prior is in force (static
        mixture, warm-up) and when the largest gap is at most `SATURATED_GAP` and every domain gets
        a row in an interval.
    """
    prior_holds = isinstance(controller, Static) or state.updates <= controller.warmup_intervals
    if prior_holds or state.gap is None:
        return None
    findings = []
    measured = [
        (gap, name) for gap, name in zip(state.gap, domains, strict=True) if gap is not None
    ]
    largest, worst = max(measured, default=(0.0, ""))
    if largest > SATURATED_GAP:
        findings.append(
            f"the largest {controller.gap} is {largest:.3g} (domain {worst}) and weights grow with "
            "its exponential"
        )
    rows = controller.weights(state) * rows_per_interval
    starved = [name for name, count in zip(domains, rows.tolist(), strict=True) if count < 1.0]
    if starved:
        findings.append(
            f"less than one of the {rows_per_interval} rows of an interval comes from "
            f"{', '.join(starved)}"
        )
    if not findings:
        return None
    other_gap = "" if controller.gap == "loss_difference" else "mixture.gap=loss_difference, or by "
    return (
        f"The mixture is extreme: {'; '.join(findings)}. A student this far behind is better "
        f"served by {other_gap}mixture.warmup_intervals of 1 or more, which trains on the prior "
        "before the gaps count."
    )


def _among_measured(
    log_weights: Values, gap: Values, equation: Callable[[Values, Values], Values]
) -> Values:
    """Applies an equation to the domains that were measured, within the weight they share."""
    measured = ~np.isnan(gap)
    if not measured.any():
        return log_weights
    if measured.all():
        return equation(log_weights, gap)
    updated = log_weights.copy()
    share = _log_sum(log_weights[measured])
    updated[measured] = share + equation(log_weights[measured] - share, gap[measured])
    return updated


def _log_sum(log_values: Values) -> float:
    """Logarithm of the sum of exponentials."""
    return float(np.logaddexp.reduce(log_values))
