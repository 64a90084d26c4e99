"""From the config's terms to the objective: losses by name, their settings, schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import jax.numpy as jnp
from jaxtyping import Array

from ddk_jax.config import ScheduleConfig, TermConfig
from ddk_jax.errors import UserError
from ddk_jax.losses.objective import (
    LOSSES,
    METRICS,
    STATE_LOSSES,
    Objective,
    Schedule,
    WeightedTerm,
    make_term,
    settings_of,
)
from ddk_jax.plain import suggest

FILTERED = ("hidden_mse", "hidden_cosine")
FILTER_SETTINGS = ("student_filters", "teacher_filters")
"""Runs that trained filters with `layer_cross_entropy` (TED's first stage): the student's begin as
they ended and go on learning, the teacher's are frozen."""


def make_objective(terms: Sequence[TermConfig]) -> Objective:
    """The weighted terms that the config names.

    Raises:
      UserError: an unknown loss or setting, with a suggestion; a value out of its range.
    """
    return tuple(_make_term(term) for term in terms)


def _make_term(term: TermConfig) -> WeightedTerm:
    losses = [*LOSSES, *STATE_LOSSES]
    if term.loss not in losses:
        raise UserError(
            f"objective.terms: unknown loss {term.loss!r}: {suggest(term.loss, losses)}"
        )
    if term.loss in METRICS:
        raise UserError(f"objective.terms: {term.loss} measures and teaches nothing")
    known = [*settings_of(term.loss), *(f.name for f in fields(term) if f.name != "settings")]
    if term.loss in FILTERED:
        known += FILTER_SETTINGS
    for key in term.settings:
        if key not in known:
            raise UserError(f"objective.terms: {term.loss} has no {key!r}: {suggest(key, known)}")
    try:
        return make_term(
            term.loss,
            name=term.name,
            weight=_schedule(term.weight),
            temperature=_schedule(term.temperature),
            temperature_squared=term.temperature_squared,
            roles=term.roles,
            settings={k: v for k, v in term.settings.items() if k not in FILTER_SETTINGS},
        )
    except ValueError as error:
        raise UserError(f"objective.terms: {error}") from error


def _schedule(value: float | ScheduleConfig) -> float | Schedule:
    if not isinstance(value, ScheduleConfig):
        return value

    def moving(step: Array) -> Array:
        length = value.last_step - value.first_step
        done = jnp.clip((step - value.first_step).astype(jnp.float32) / length, 0, 1)
        if value.kind == "cosine":
            done = (1 - jnp.cos(jnp.pi * done)) / 2
        return value.start + (value.end - value.start) * done

    return moving
