"""An objective: a weighted sum of named terms, each a mean over the tokens of its roles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddk_jax.losses.divergences import Term, cross_entropy, forward_kl

PADDING, PROMPT, RESPONSE = 0, 1, 2
Roles: TypeAlias = Literal["all", "prompt", "response"]


@dataclass(frozen=True, kw_only=True)
class WeightedTerm:
    """A divergence with its place in the objective."""

    name: str
    term: Term
    needs_teacher: bool
    weight: float = 1.0
    """Factor of the mean nats per token of this term."""
    roles: Roles = "all"
    """Tokens that the mean is taken over."""


Objective: TypeAlias = tuple[WeightedTerm, ...]


@dataclass(frozen=True, kw_only=True)
class LossEntry:
    """How a loss is made from its settings."""

    make: Callable[..., Float[Array, "N"]]
    """A `Term`; with the keyword `temperature` when `takes_temperature`."""
    takes_temperature: bool
    needs_teacher: bool


LOSSES: dict[str, LossEntry] = {
    "cross_entropy": LossEntry(make=cross_entropy, takes_temperature=False, needs_teacher=False),
    "forward_kl": LossEntry(make=forward_kl, takes_temperature=True, needs_teacher=True),
}


def make_term(
    name: str,
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    roles: Roles = "all",
) -> WeightedTerm:
    """The loss called `name` in `LOSSES`, with its settings bound.

    Args:
      name: key of `LOSSES`.
      weight: factor of the term's mean.
      temperature: softmax temperature of both models; must be 1 for a loss on labels.
      temperature_squared: multiply by the squared temperature, so that the gradient keeps its scale
        (Hinton et al. 2015). The logged nats of the term stay unscaled.
      roles: tokens that the mean is taken over.
    """
    entry = LOSSES[name]
    term = partial(entry.make, temperature=temperature) if entry.takes_temperature else entry.make
    if not entry.takes_temperature and temperature != 1.0:
        raise ValueError(f"{name} has no temperature: leave it at 1.0, got {temperature}")
    return WeightedTerm(
        name=name,
        term=term,
        needs_teacher=entry.needs_teacher,
        weight=weight * (temperature**2 if temperature_squared else 1.0),
        roles=roles,
    )


def needs_teacher(objective: Objective) -> bool:
    """Whether any term looks at teacher logits."""
    return any(term.needs_teacher for term in objective)


def term_weights(
    objective: Objective, role: Int[Array, "*axes"], weights: Float[Array, "*axes"]
) -> Float[Array, "terms *axes"]:
    """The token weights of every term: `weights` where the role fits, else 0."""
    wanted = {"all": (PROMPT, RESPONSE), "prompt": (PROMPT,), "response": (RESPONSE,)}

    def of(term: WeightedTerm) -> Float[Array, "*axes"]:
        fits = jnp.zeros(role.shape, bool)
        for value in wanted[term.roles]:
            fits = fits | (role == value)
        return jnp.where(fits, weights, jnp.float32(0))

    return jnp.stack([of(term) for term in objective])
