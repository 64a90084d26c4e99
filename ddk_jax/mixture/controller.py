"""What every controller is: a frozen value that turns a state and an observation into a state.

What a controller has learned is in a `ControllerState`, which a checkpoint holds as JSON. All
arithmetic is float64 on log weights: a weight that is 0 in linear space is still there for the next
update.

What all controllers share:

- The first `warmup_intervals` intervals keep the prior. `update` is called once before the first
  step and then at the end of each interval, so this is that many calls.
- A controller follows one number for each domain, its *signal*: the gap, the loss of the training
  batches, ... A domain whose signal is not finite (a loss that overflowed, no tokens) keeps its
  weight. The others share what they had together, by the same rule among themselves; a uniform
  part of a rule, too, is a part of that share. If no domain has a signal, nothing changes.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64

from ddk_jax.mixture.gaps import LARGEST_GAP, Values, measure

Memory: TypeAlias = dict[str, Float64[np.ndarray, "..."]]
"""What a controller remembers beside the weights: arrays whose last axis is the domains. NaN: not
known."""


class Observation(NamedTuple):
    """What is known of a run when its weights are about to change; one value for each domain.

    A controller says in `needs` which of the fields it reads.
    """

    step: int
    """Finished optimiser steps."""
    tokens: Values
    """Predicted training tokens so far."""
    student_nats: Values
    """Validation loss of the student, nats per token; NaN if unknown, as below."""
    teacher_nats: Values
    """The teacher's."""
    training_nats: Values
    """Mean nats per token of one term of the objective (`FollowsTraining.term`) in the training
    batches since the last update; NaN for a domain that had no tokens."""


def observe(
    student_nats: npt.ArrayLike,
    teacher_nats: npt.ArrayLike | None = None,
    *,
    training_nats: npt.ArrayLike | None = None,
    tokens: npt.ArrayLike | None = None,
    step: int = 0,
) -> Observation:
    """An observation; what is not given is NaN, or 0 tokens.

    Raises:
        ValueError: the fields are not vectors of one length.
    """
    student = np.asarray(student_nats, np.float64)
    unknown = np.full(student.shape, np.nan)
    given = {
        "tokens": np.zeros(student.shape) if tokens is None else tokens,
        "student_nats": student,
        "teacher_nats": unknown if teacher_nats is None else teacher_nats,
        "training_nats": unknown if training_nats is None else training_nats,
    }
    fields = {name: np.asarray(values, np.float64) for name, values in given.items()}
    for name, values in fields.items():
        if values.ndim != 1 or values.shape != student.shape:
            raise ValueError(
                f"student_nats has shape {student.shape} and {name} {values.shape}: "
                "both need one value for each domain"
            )
    return Observation(step=step, **fields)


class Moment(NamedTuple):
    """When an update takes place."""

    step: int
    """Finished optimiser steps."""
    updates: int
    """Updates before this one."""
    first: bool
    """Whether this is the first update after the warm-up."""


@dataclass(frozen=True, kw_only=True)
class ControllerState:
    """The weights and where they come from. Plain Python values, all floats finite."""

    log_weights: tuple[float, ...]
    """[D] natural logarithms of the weights, which sum to 1."""
    average: tuple[float, ...]
    """[D] mean of the weights over all updates; the prior before any. DoReMi's result, and what a
    later run takes as its static mixture."""
    updates: int = 0
    """Calls of `Controller.update` so far."""
    gap: tuple[float | None, ...] | None = None
    """[D] the last gap; None for a domain that could not be measured, and before any update."""
    unmeasured: tuple[int, ...] = ()
    """Domains that kept their weight in the last update because they had no signal."""
    memory: Mapping[str, Any] = field(default_factory=dict)
    """What else the controller remembers: arrays as nested tuples, None where not known."""

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-able values; `from_json` gives it back bit by bit."""
        return {
            name: _listed(value) if name != "memory" else {k: _listed(v) for k, v in value.items()}
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ControllerState:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: the values are not a controller's state.
        """
        names = {part.name for part in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(f"a controller state has {sorted(names)}, not {sorted(values)}")
        plain = {name: _tupled(value) for name, value in values.items() if name != "memory"}
        log_weights = plain["log_weights"]
        if not log_weights or not all(map(math.isfinite, log_weights)):
            raise ValueError(f"log_weights of a controller state must be finite: {log_weights}")
        memory = {name: _tupled(value) for name, value in values["memory"].items()}
        sizes = {"average": len(plain["average"]), "gap": len(plain["gap"] or log_weights)}
        sizes |= {name: np.shape(_array(value))[-1] for name, value in memory.items()}
        for name, size in sizes.items():
            if size != len(log_weights):
                raise ValueError(
                    f"a controller state has {len(log_weights)} weights, {size} values of {name}"
                )
        return cls(**plain, memory=memory)


@dataclass(frozen=True, kw_only=True)
class Controller(abc.ABC):
    """Turns observations into weights. A subclass says how, once the warm-up is over."""

    name: ClassVar[str]
    """Name in the configuration and in the metrics."""
    steers: ClassVar[Literal["rows", "loss"]] = "rows"
    """What the weights are: shares of the rows that are drawn, or weights of the domains in the
    loss, while the rows are drawn by the prior."""

    warmup_intervals: int = 0
    """Intervals that keep the prior."""

    def __post_init__(self) -> None:
        check(self.warmup_intervals >= 0, self, "warmup_intervals", "must not be negative")

    @property
    def needs(self) -> frozenset[str]:
        """The fields of `Observation` that must be known for the weights to move."""
        return frozenset({"student_nats", "teacher_nats"})

    @property
    def gap_kind(self) -> str:
        """Key of `gaps.GAPS`: the gap that is followed, or only recorded."""
        return "loss_difference"

    def signal(self, seen: Observation) -> Values:
        """What the weights follow, for every domain: the gap, unless a subclass says otherwise."""
        return measure(self.gap_kind, seen.student_nats, seen.teacher_nats)

    def remember(self, memory: Memory, seen: Observation, weights: Values) -> Memory:
        """The memory with this observation in it; called at every update, warm-up included.

        Args:
            memory: what it was; empty at the first update.
            seen: the observation.
            weights: [D] in force until now.
        """
        return memory

    @abc.abstractmethod
    def redistribute(
        self, log_weights: Values, signal: Values, memory: Memory, moment: Moment
    ) -> tuple[Values, Memory]:
        """Computes the next log weights, of the domains that have a signal, as if they were all.

        Args:
            log_weights: [n] the current ones, of sum 1 in linear space.
            signal: [n] finite.
            memory: of these domains, with the present observation.
            moment: when.

        Returns:
            [n] finite log weights of sum 1, and the entries of the memory that have changed.
        """

    def init(self, prior: npt.ArrayLike) -> ControllerState:
        """The state before any observation.

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
        log_weights = normalised(np.log(weights))
        average = tuple(np.exp(log_weights).tolist())
        return ControllerState(log_weights=tuple(log_weights.tolist()), average=average)

    def weights(self, state: ControllerState) -> Values:
        """[D] the weights in linear space: not negative, of sum 1."""
        return np.exp(normalised(np.array(state.log_weights)))

    def update(self, state: ControllerState, seen: Observation) -> ControllerState:
        """Takes an observation in. Pure: equal arguments give equal results, bit by bit.

        Args:
            state: what `init` or the update before returned.
            seen: the observation.

        Returns:
            The next state; its `unmeasured` lists the domains that the caller should warn of.

        Raises:
            ValueError: the observation is not of the domains of the state.
        """
        log_weights = np.array(state.log_weights)
        if seen.student_nats.shape != log_weights.shape:
            raise ValueError(
                f"{seen.student_nats.size} losses were measured for {log_weights.size} domains"
            )
        signal = bounded(self.signal(seen))
        before = {name: _array(value) for name, value in state.memory.items()}
        memory = self.remember(before, seen, self.weights(state))
        measured = ~np.isnan(signal)
        if state.updates >= self.warmup_intervals and measured.any():
            first = state.updates == self.warmup_intervals
            moment = Moment(seen.step, state.updates, first)
            log_weights, memory = self._among(measured, log_weights, signal, memory, moment)
        weights = np.exp(normalised(log_weights))
        average = np.array(state.average)
        average = average + (weights - average) / (state.updates + 1)
        gap = measure(self.gap_kind, seen.student_nats, seen.teacher_nats)
        return ControllerState(
            log_weights=tuple(log_weights.tolist()),
            average=tuple(average.tolist()),
            updates=state.updates + 1,
            gap=_nested(gap),
            unmeasured=tuple(np.flatnonzero(~measured).tolist()),
            memory={name: _nested(values) for name, values in memory.items()},
        )

    def _among(
        self,
        measured: npt.NDArray[np.bool_],
        log_weights: Values,
        signal: Values,
        memory: Memory,
        moment: Moment,
    ) -> tuple[Values, Memory]:
        """Redistributes among the domains with a signal, within the weight that they share."""
        share = 0.0 if measured.all() else log_sum(log_weights[measured])
        found, learned = self.redistribute(
            log_weights[measured] - share,
            signal[measured],
            {name: values[..., measured] for name, values in memory.items()},
            moment,
        )
        log_weights, memory = log_weights.copy(), dict(memory)
        log_weights[measured] = share + found
        for name, values in learned.items():
            memory[name] = memory[name].copy()
            memory[name][..., measured] = values
        return log_weights, memory


@dataclass(frozen=True, kw_only=True)
class FollowsTraining(Controller):
    """A controller that follows what the training batches say; it needs no validation."""

    term: str = "cross_entropy"
    """Name of the term of the objective whose nats are followed."""

    @property
    def needs(self) -> frozenset[str]:
        """The nats of the term, by domain."""
        return frozenset({"training_nats"})

    def signal(self, seen: Observation) -> Values:
        """Nats per token in the training batches since the last update."""
        return seen.training_nats


def check(holds: bool, controller: Controller, setting: str, rule: str) -> None:
    """Refuses a setting.

    Raises:
        ValueError: it does not hold.
    """
    if not holds:
        raise ValueError(f"mixture.{setting} = {getattr(controller, setting)!r}: {rule}")


def bounded(values: Values) -> Values:
    """At most `LARGEST_GAP` in size, so that sums stay finite; NaN where not finite."""
    return np.where(np.isfinite(values), np.clip(values, -LARGEST_GAP, LARGEST_GAP), np.nan)


def log_sum(log_values: Values) -> float:
    """Logarithm of the sum of exponentials."""
    return float(np.logaddexp.reduce(log_values))


def normalised(log_values: Values) -> Values:
    """Log weights of sum 1, proportional to the exponentials of the values."""
    # Shifted first, so that a large normaliser does not swallow small differences.
    shifted = log_values - log_values.max()
    return shifted - log_sum(shifted)


def with_uniform(log_weights: Values, share: float) -> Values:
    """Log weights of a mixture with the uniform distribution.

    Args:
        log_weights: [n] of sum 1.
        share: of the uniform part, from 0 to 1; every weight is then at least `share / n`.
    """
    with np.errstate(divide="ignore"):  # log 0 where the share is 0 or 1: that part vanishes
        own, uniform = np.log1p(-share), np.log(share) - math.log(log_weights.size)
    return np.logaddexp(own + log_weights, uniform)


def _array(value: Any) -> np.ndarray:
    """Nested tuples as float64, with NaN for None."""
    return np.array(value, np.float64)


def _nested(values: np.ndarray) -> Any:
    """The array as nested tuples, with None for NaN."""
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return _tupled(plain.tolist())


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list | tuple) else value


def _listed(value: Any) -> Any:
    return list(map(_listed, value)) if isinstance(value, list | tuple) else value
