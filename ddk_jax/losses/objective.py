"""An objective: a weighted sum of named terms, each a mean over the tokens of its roles."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddk_jax.losses import divergences, ranked, sparse, truncated
from ddk_jax.losses.bild import bild
from ddk_jax.losses.divergences import ChunkView
from ddk_jax.losses.state_terms import StateLoss, StateTerm
from ddk_jax.losses.targets import clipped_excess, teacher_cross_entropy

PADDING, PROMPT, RESPONSE = 0, 1, 2
Roles: TypeAlias = Literal["all", "prompt", "response"]
Schedule: TypeAlias = Callable[[Int[Array, ""]], Float[Array, ""]]
"""A number as a function of the finished steps."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A divergence under its name in a config; its keyword arguments are its settings."""

    function: Callable[..., Float[Array, "N"]]
    """Nats per token of a `ChunkView`."""
    needs_teacher: bool = True
    same_vocabulary: bool = True
    """False: it compares models whose tokens differ as well."""

    @property
    def settings(self) -> tuple[str, ...]:
        """What can be set, without the temperature, which may follow a schedule."""
        found = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in found if p.kind is p.KEYWORD_ONLY and p.name != "temperature")

    @property
    def takes_temperature(self) -> bool:
        """Whether the softmaxes of this loss have a temperature."""
        return "temperature" in inspect.signature(self.function).parameters


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(function=divergences.cross_entropy, needs_teacher=False),
    "teacher_cross_entropy": Loss(function=teacher_cross_entropy),
    "clipped_excess": Loss(function=clipped_excess),
    "forward_kl": Loss(function=divergences.forward_kl),
    "reverse_kl": Loss(function=divergences.reverse_kl),
    "generalised_jsd": Loss(function=divergences.generalised_jsd),
    "skew_kl": Loss(function=divergences.skew_kl),
    "skew_reverse_kl": Loss(function=divergences.skew_reverse_kl),
    "symmetric_kl": Loss(function=divergences.symmetric_kl),
    "total_variation": Loss(function=divergences.total_variation),
    "spherical_kl": Loss(function=divergences.spherical_kl),
    "bild": Loss(function=bild),
    "adaptive_kl": Loss(function=ranked.adaptive_kl),
    "uld": Loss(function=ranked.uld, same_vocabulary=False),
    "top_k_overlap": Loss(function=ranked.top_k_overlap),
    "top_k_kl": Loss(function=truncated.top_k_kl),
    "top_p_kl": Loss(function=truncated.top_p_kl),
    "bounded_kl": Loss(function=truncated.bounded_kl),
    "sampled_kl": Loss(function=sparse.sampled_kl),
    "sampled_cross_entropy": Loss(function=sparse.sampled_cross_entropy),
}
STATE_LOSSES: tuple[StateLoss, ...] = typing.get_args(StateLoss)
"""Losses on inner states; their settings are the fields of `StateTerm`."""
METRICS = ("teacher_cross_entropy", "top_k_overlap")
"""They measure and have no gradient: not for an objective."""


@dataclass(frozen=True, kw_only=True)
class WeightedTerm:
    """A loss with its settings and its place in the objective."""

    name: str
    """In metrics and figures; unique in an objective."""
    loss: Callable[..., Float[Array, "N"]] | StateTerm
    """Of a `ChunkView`, and of a `temperature` if there is a schedule of it; or of inner states."""
    needs_teacher: bool
    same_vocabulary: bool
    weight: Schedule
    """Factor of the mean nats per token of this term."""
    temperature: Schedule | None
    temperature_squared: bool
    """Multiply the weight by the squared temperature, so that the gradient keeps its scale
    (Hinton et al. 2015). The logged nats of the term stay unscaled."""
    roles: Roles
    """Tokens that the mean is taken over."""

    def nats(self, view: ChunkView, temperature: Float[Array, ""]) -> Float[Array, "N"]:
        """Nats per token, of a term on logits."""
        assert not isinstance(self.loss, StateTerm)
        if self.temperature is None:
            return self.loss(view)
        return self.loss(view, temperature=temperature)


Objective: TypeAlias = tuple[WeightedTerm, ...]


def constant(value: float) -> Schedule:
    """The schedule that stays at `value`."""
    return lambda step: jnp.float32(value)


def make_term(
    loss: str,
    *,
    name: str = "",
    weight: float | Schedule = 1.0,
    temperature: float | Schedule = 1.0,
    temperature_squared: bool = False,
    roles: Roles = "all",
    settings: Mapping[str, Any] | None = None,
) -> WeightedTerm:
    """The loss of this name, with its settings bound.

    Args:
      loss: one of `LOSSES` or of `STATE_LOSSES`.
      name: of the term; default: that of the loss.
      weight: factor of the term's mean, a number or a schedule.
      temperature: softmax temperature of both models, likewise; 1 for a loss without.
      temperature_squared: multiply the weight by the squared temperature.
      roles: tokens that the mean is taken over.
      settings: keyword arguments of the loss.

    Raises:
      ValueError: a setting that the loss has not, of the wrong type or out of its range; a
        temperature for a loss without.
    """
    settings = dict(settings or {})
    if loss in STATE_LOSSES:
        _check_settings(loss, StateTerm.settings(loss), typing.get_type_hints(StateTerm), settings)
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        bound: Any = StateTerm(loss=loss, **lists)  # type: ignore[arg-type]
        with_teacher = not bound.of_labels or bound.through == "teacher"
    else:
        function = LOSSES[loss].function
        kinds = typing.get_type_hints(function)
        _check_settings(loss, LOSSES[loss].settings, kinds, settings)
        bound, with_teacher = partial(function, **settings), LOSSES[loss].needs_teacher
    takes_temperature = loss in LOSSES and LOSSES[loss].takes_temperature
    if not takes_temperature and (temperature != 1.0 or temperature_squared):
        raise ValueError(f"{loss} has no temperature: leave it out")
    if isinstance(temperature, float):
        temperature = constant(temperature)
    return WeightedTerm(
        name=name or loss,
        loss=bound,
        needs_teacher=with_teacher,
        same_vocabulary=loss not in LOSSES or LOSSES[loss].same_vocabulary,
        weight=weight if callable(weight) else constant(weight),
        temperature=temperature if takes_temperature else None,
        temperature_squared=temperature_squared,
        roles=roles,
    )


def _check_settings(
    loss: str, known: Sequence[str], kinds: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Names and types; the ranges are checked by the loss itself, when it is traced."""
    for key, value in settings.items():
        if key not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"{loss} has no setting {key!r}; it has: {listed}")
        if not _is_of(kinds[key], value):
            choices = typing.get_args(kinds[key])
            wanted = f"one of {choices}" if choices else kinds[key].__name__
            raise ValueError(f"{loss}: {key} = {value!r} is not {wanted}")


def _is_of(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(_is_of(choice, value) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return isinstance(value, list | tuple) and all(_is_of(item, x) for x in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def check_terms(objective: Objective, vocab_size: int = 2**20) -> None:
    """Trace every term once, so that a setting out of its range is refused here and not in a step.

    Args:
      objective: the terms.
      vocab_size: what numbers of candidates must not exceed; default: more than any has.

    Raises:
      ValueError: from the loss; it says which setting, and what it may be.
    """
    tokens = 2
    logits = jax.ShapeDtypeStruct((tokens, vocab_size), jnp.float32)
    numbers = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    draw = jax.ShapeDtypeStruct((tokens,), jnp.uint32)

    def trace(term: WeightedTerm, z: Array, integers: Array, draws: Array) -> Array:
        return term.nats(ChunkView(z, z, integers, integers, draws), jnp.float32(1))

    for term in objective:
        if not isinstance(term.loss, StateTerm):
            jax.eval_shape(partial(trace, term), logits, numbers, draw)


def settings_of(loss: str) -> tuple[str, ...]:
    """Names of the settings of a loss."""
    return StateTerm.settings(loss) if loss in STATE_LOSSES else LOSSES[loss].settings


def crosses_vocabularies(objective: Objective) -> bool:
    """Whether no term needs a teacher with the student's vocabulary."""
    return not any(term.needs_teacher and term.same_vocabulary for term in objective)


def needs_teacher(objective: Objective) -> bool:
    """Whether any term looks at a teacher."""
    return any(term.needs_teacher for term in objective)


def temperatures(objective: Objective, step: Int[Array, ""]) -> Float[Array, "K"]:
    """Temperature of every term at a step; 1 where there is none."""
    one = constant(1.0)
    return jnp.stack([(term.temperature or one)(step) for term in objective]).astype(jnp.float32)


def term_factors(objective: Objective, step: Int[Array, ""]) -> Float[Array, "K"]:
    """What the mean nats of every term are multiplied by at a step."""
    weights = jnp.stack([term.weight(step) for term in objective]).astype(jnp.float32)
    squared = jnp.array([term.temperature_squared for term in objective])
    return weights * jnp.where(squared, jnp.square(temperatures(objective, step)), jnp.float32(1))


def term_weights(
    objective: Objective, role: Int[Array, "*axes"], weights: Float[Array, "*axes"]
) -> Float[Array, "K *axes"]:
    """The token weights of every term: `weights` where the role fits, else 0."""
    wanted = {"all": (PROMPT, RESPONSE), "prompt": (PROMPT,), "response": (RESPONSE,)}

    def of(term: WeightedTerm) -> Float[Array, "*axes"]:
        fits = jnp.zeros(role.shape, bool)
        for value in wanted[term.roles]:
            fits = fits | (role == value)
        return jnp.where(fits, weights, jnp.float32(0))

    return jnp.stack([of(term) for term in objective])
