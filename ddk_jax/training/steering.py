"""The mixture of a run: what the controller has seen, what it decided, and what is written of it.

Legend: D domains, K terms.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from ddk_jax.config import Config, MixtureConfig
from ddk_jax.errors import UserError
from ddk_jax.mixture.controller import Controller, ControllerState, FollowsTraining, observe
from ddk_jax.mixture.controllers import CONTROLLERS, Static, advice, settings_of
from ddk_jax.mixture.gaps import GAPS, measure
from ddk_jax.places import bucket_errors, resolve_place
from ddk_jax.plain import from_plain, suggest
from ddk_jax.training.metrics import MixtureEvent, to_json
from ddk_jax.training.rundir import SUMMARY
from ddk_jax.training.state import StepSums

_log = logging.getLogger(__name__)

Values = Float64[np.ndarray, "D"]


def make_controller(config: Config, domains: Sequence[str]) -> Controller:
    """The controller that the config names, with its settings.

    Args:
      config: the run's.
      domains: names, in order, for settings with a value for each.

    Raises:
      UserError: an unknown controller or setting, with a suggestion; a value out of its range; or
        something that the controller follows and the run does not have.
    """
    mixture = config.mixture
    name = mixture.controller
    if name not in CONTROLLERS:
        raise UserError(f"mixture.controller = {name!r}: {suggest(name, list(CONTROLLERS))}")
    kinds = settings_of(name)
    settings = {}
    for key, value in mixture.settings.items():
        if key not in kinds:
            known = [*kinds, *(f for f in vars(mixture) if f != "settings")]
            raise UserError(f"mixture: {name} has no {key!r}: {suggest(key, known)}")
        if key == "gap" and value not in GAPS:
            raise UserError(f"mixture.gap = {value!r}: {suggest(str(value), list(GAPS))}")
        if isinstance(value, Mapping):
            value = by_domain(f"mixture.{key}", value, domains)
        settings[key] = from_plain(kinds[key], value, f"mixture.{key}")
    try:
        controller = CONTROLLERS[name](warmup_intervals=mixture.warmup_intervals, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    _check_can_follow(controller, config)
    return controller


def _check_can_follow(controller: Controller, config: Config) -> None:
    """Refuse a controller whose signal the run does not have."""
    if "teacher_nats" in controller.needs and not config.teacher.path:
        raise UserError(
            f"mixture.controller = {controller.name!r} follows the gap to a teacher: set "
            f"teacher.path, or mixture.controller to {Static.name}"
        )
    if isinstance(controller, FollowsTraining):
        terms = [term.name or term.loss for term in config.objective.terms]
        if controller.term not in terms:
            raise UserError(
                f"mixture.term = {controller.term!r}: not a term of the objective; "
                f"{suggest(controller.term, terms)}"
            )
    if controller.steers == "loss" and controller.warmup_intervals:
        raise UserError(
            f"mixture.warmup_intervals: {controller.name} follows every step, and has no warm-up"
        )


def by_domain(setting: str, values: Mapping[str, Any], domains: Sequence[str]) -> list[Any]:
    """Values by name of the domain, in the order of the domains.

    Raises:
      UserError: an unknown domain, or one without a value.
    """
    for name in values:
        if name not in domains:
            raise UserError(f"{setting}: no domain {name!r}: {suggest(str(name), domains)}")
    if missing := [name for name in domains if name not in values]:
        raise UserError(f"{setting}: no value for {', '.join(missing)}")
    return [values[name] for name in domains]


def prior_weights(
    mixture: MixtureConfig, domains: Sequence[str], train_tokens: Sequence[int]
) -> Values:
    """Weights before any measurement, of sum 1.

    Args:
      mixture: says which.
      domains: names.
      train_tokens: training tokens of each domain.

    Raises:
      UserError: an unknown prior, or a run that has none for these domains.
    """
    if mixture.prior_weights:
        given = by_domain("mixture.prior_weights", mixture.prior_weights, domains)
        weights = np.array(given, np.float64)
    elif mixture.prior == "uniform":
        weights = np.ones(len(domains))
    elif mixture.prior == "natural":
        weights = np.array(train_tokens, np.float64)
    else:
        weights = np.array(_average_weights(mixture.prior, domains), np.float64)
    if not np.all((weights > 0) & np.isfinite(weights)):
        shares = ", ".join(f"{n} {w:g}" for n, w in zip(domains, weights, strict=True))
        raise UserError(f"the prior of the mixture must be positive for every domain: {shares}")
    weights = (weights / weights.max()) ** mixture.prior_power
    return weights / weights.sum()


def _average_weights(run_dir: str, domains: Sequence[str]) -> list[float]:
    """The average weights of a finished run, in the order of the domains."""
    path = resolve_place(run_dir) / SUMMARY
    try:
        with bucket_errors(path, "read"):
            summary = json.loads(path.read_text(encoding="utf-8"))
        found = dict(zip(summary["domains"], summary["average_weights"], strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"mixture.prior = {run_dir!r}: {suggest(run_dir, ('uniform', 'natural'))} Or name the "
            f"directory of a finished run, whose {SUMMARY} has average weights"
        ) from error
    return by_domain(f"mixture.prior = {run_dir!r}", found, domains)


class Steering:
    """The controller in a run: it counts what the steps report, and decides once in an interval.

    One that weighs the domains in the loss decides at every step.
    """

    def __init__(
        self,
        controller: Controller,
        prior: Values,
        *,
        domains: Sequence[str],
        terms: Sequence[str],
        teacher_nats: Values | None,
        rows_per_step: int,
        rows_per_interval: int,
    ) -> None:
        """Start with the prior.

        Args:
          controller: turns observations into weights.
          prior: [D] weights before any observation.
          domains: their names.
          terms: names of the terms of the objective.
          teacher_nats: [D] the teacher's validation losses; None without a teacher.
          rows_per_step: rows of a step.
          rows_per_interval: rows between two decisions.
        """
        self._controller, self._domains, self._teacher_nats = controller, domains, teacher_nats
        self._prior = prior
        self._rows_per_step, self._rows_per_interval = rows_per_step, rows_per_interval
        term = controller.term if isinstance(controller, FollowsTraining) else None
        self._term = None if term is None else list(terms).index(term)
        self._state = controller.init(prior)
        self._total, self._count = np.zeros((2, len(domains)))
        self._tokens = np.zeros(len(domains))
        self._student_nats: Values | None = None
        self._advised = False

    @property
    def weights(self) -> Values:
        """[D] shares of the rows."""
        return self._prior if self._weighs_loss else self._controller.weights(self._state)

    @property
    def loss_weights(self) -> Values | None:
        """[D] weights of the domains in the loss of the next step; None: rows are weighed."""
        return self._controller.weights(self._state) if self._weighs_loss else None

    @property
    def _weighs_loss(self) -> bool:
        return self._controller.steers == "loss"

    @property
    def average(self) -> list[float]:
        """[D] mean of the controller's weights over all decisions."""
        return list(self._state.average)

    def count(self, sums: StepSums) -> None:
        """Take the report of a step in; what is not finite is left out."""
        if self._term is not None:
            total, count = (x[self._term] for x in (sums.term_total, sums.term_count))
            finite = np.isfinite(total)
            self._total += np.where(finite, total, 0.0)
            self._count += np.where(finite, count, 0.0)
        if self._weighs_loss:
            nowhere = np.full(len(self._domains), np.nan)
            seen = observe(nowhere, training_nats=self._training_nats())
            self._state = self._controller.update(self._state, seen)
            self._total, self._count = np.zeros((2, len(self._domains)))

    def _training_nats(self) -> Values:
        """[D] mean of the term that is followed, in the steps counted since the last decision."""
        unknown = np.full(self._count.shape, np.nan)
        return np.divide(self._total, self._count, out=unknown, where=self._count > 0)

    def decide(
        self, step: int, student_nats: Values, tokens_per_domain: Int64[np.ndarray, "D"]
    ) -> MixtureEvent:
        """New weights from what has been seen since the last ones.

        Args:
          step: finished steps; the weights are for the rows after them.
          student_nats: [D] validation losses of the student at this step.
          tokens_per_domain: [D] training tokens so far.

        Returns:
          What to write of it. Its `start_row` follows from the step alone: every host has the same.
        """
        tokens = tokens_per_domain.astype(np.float64)
        drawn = tokens - self._tokens
        if not self._weighs_loss:
            training = self._training_nats()
            seen = observe(
                student_nats, self._teacher_nats, training_nats=training, tokens=tokens, step=step
            )
            self._state = self._controller.update(self._state, seen)
            if drawn.any() or "student_nats" in self._controller.needs:
                self._warn()
        event = self._event(step, student_nats, drawn)
        self._total, self._count = np.zeros((2, len(self._domains)))
        self._tokens, self._student_nats = tokens, student_nats
        return event

    def to_json(self) -> dict[str, Any]:
        """All that a resumed run needs, bit by bit."""
        return {
            "controller": self._state.to_json(),
            "total": self._total.tolist(),
            "count": self._count.tolist(),
            "tokens": self._tokens.tolist(),
            "student_nats": to_json(self._student_nats),
        }

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Go on where `to_json` was called."""
        self._state = ControllerState.from_json(tree["controller"])
        self._total, self._count, self._tokens = (
            np.array(tree[name], np.float64) for name in ("total", "count", "tokens")
        )
        last = tree["student_nats"]
        self._student_nats = None if last is None else np.array(last, np.float64)

    def _event(self, step: int, student_nats: Values, drawn: Values) -> MixtureEvent:
        gap = ratio = share = slope = None
        if self._teacher_nats is not None:
            gap = measure(self._controller.gap_kind, student_nats, self._teacher_nats)
            ratio = measure("ppl_ratio", student_nats, self._teacher_nats)
        if total := drawn.sum():
            share = drawn / total
            if self._student_nats is not None:
                slope = (student_nats - self._student_nats) / total * 1e6
        return MixtureEvent(
            step=step,
            start_row=step * self._rows_per_step,
            domains=self._domains,
            weights=self.weights,
            gap=gap,
            gap_kind=self._controller.gap_kind,
            controller=self._controller.name,
            ratio=ratio,
            share=share,
            slope=slope,
            loss_weights=self.loss_weights,
        )

    def _warn(self) -> None:
        for i in self._state.unmeasured:
            _log.warning(
                "domain %s has no finite measurement: it keeps its weight", self._domains[i]
            )
        text = advice(self._controller, self._state, self._domains, self._rows_per_interval)
        if text is not None and not self._advised:
            self._advised = True
            _log.warning("%s", text)
